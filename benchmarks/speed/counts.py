"""Launches of a captured step, and bytes of its pointwise kernels, by the blocks of the model.

Counted for DeiT-Base (batch 64, 46 kept patches, bf16, torch 2.15) by running the compiled step without a device,
where each launch is recorded (``tests/offline_cuda/tables``), and told apart by blocks. Of other shapes the same
structure is assumed. The formula gives the 190 launches of that step exactly, and its 1308 MB within a percent. With
flash attention, GELU and norms by inductor and the notes of a step in kernels of their own it was 255 and 2483 MB.

Traffic is counted in tensors of ``[B * N, D]`` (or ``H * d``) that are read or written.
"""

import math

from benchmarks.speed.parts import Bucket, Part, linear_products, product_work, work_of_parts
from smi_fast.kernels.cls_attention import power_of_two
from smi_fast.kernels.tile_attention import LEAST_SIDE, MOST_TOKENS, MOST_WIDTH

# kernels of a block that computes all tokens, forward and backward, besides its eight products
NORM_KERNELS = 4  # two of residual sum and norm, one each way
GELU_KERNELS = 2  # one each way; none in 16 bits, where products do both
TILE_KERNELS = 2  # of attention, one each way
FLASH_KERNELS = 5  # one forward, three backward, and the copy that puts three gradients together
# all else but products: gather, embedding, last block, head, loss, update, notes, indices
OTHER_KERNELS = 22

NORM_TENSORS = 16  # [B * N, D], a block: four each way of each norm
SLOPE_SHARE = 2 / 5  # of GELU's own traffic, in 16 bits: its derivative is written and read
STACKED_TENSORS = 6  # [B * N, H * d], a block with flash: three gradients, read and written
LAST_STACKED_TENSORS = 4  # two of them in the last block, whatever the others have
OTHER_TENSORS = 15  # [B * N, D]: embedding, the last block's first norm, gradient of the windows

TILE_QUERIES = 32  # a block of the tile kernel
FLASH_SIDE = 128  # of flash's tiles, queries and keys


def uses_tiles(b: Bucket) -> bool:
    """Does the tile kernel attend, as it does by default for few tokens in 16 bits? Flash is counted otherwise."""
    return b.dtype.itemsize == 2 and b.tokens <= MOST_TOKENS and b.shape.head_width <= MOST_WIDTH


def padding(b: Bucket) -> float:
    """How many times the products of attention that count its tiles multiply, at least 1."""
    if uses_tiles(b):
        keys, queries = max(LEAST_SIDE, power_of_two(b.tokens)), math.ceil(b.tokens / TILE_QUERIES) * TILE_QUERIES
    else:
        keys = queries = math.ceil(b.tokens / FLASH_SIDE) * FLASH_SIDE
    return keys * queries / b.tokens**2


def launches(b: Bucket) -> int:
    """Kernels and products of one iteration."""
    block = NORM_KERNELS + (TILE_KERNELS if uses_tiles(b) else FLASH_KERNELS)
    block += 0 if b.dtype.itemsize == 2 else GELU_KERNELS
    return len(linear_products(b)) + block * b.full_blocks + OTHER_KERNELS


def pointwise_bytes(b: Bucket) -> int:
    """What GELU, norms, residuals and stacked gradients read and write in one iteration."""
    s, rows = b.shape, b.batch * b.tokens
    stacked = LAST_STACKED_TENSORS * (s.reads > 0) + STACKED_TENSORS * b.full_blocks * (not uses_tiles(b))
    values = rows * (s.width * (NORM_TENSORS * b.full_blocks + OTHER_TENSORS) + b.inner * stacked)
    gelu = work_of_parts(b)[Part.GELU].bytes * (SLOPE_SHARE if b.dtype.itemsize == 2 else 1)
    return round(gelu) + values * b.dtype.itemsize


def other_bytes(b: Bucket) -> int:
    """What the rest reads and writes besides products and attention: pixels, moments, ids, the last block's attention.

    The least that must move, see `work_of_parts`.
    """
    parts = (Part.GATHER, Part.UPDATE, Part.STATE, Part.LAST, Part.HEAD)
    of_products = sum(product_work(part, sizes, b.dtype).bytes for part, sizes in linear_products(b) if part in parts)
    work = work_of_parts(b)
    return sum(work[part].bytes for part in parts) - of_products
