"""Launches of a captured step, and bytes of its pointwise kernels, by the blocks of the model.

Counted for DeiT-Base (batch 64, 46 kept patches, bf16, torch 2.15) by running the compiled step without a device, where
each launch is recorded, and told apart by blocks. Of other shapes the same structure is assumed. The formula gives
the 255 launches of that step exactly, and its 2483 MB within a percent.

Inductor's kernels are counted in tensors of ``[B * N, D]`` (or ``H * d``) that they read or write. Some blocks read a
residual more than once and others less, since inductor rather computes a sum again than stores it: the figure is the
mean of a block.
"""

from benchmarks.speed.parts import Bucket, Part, linear_products, product_work, work_of_parts

# kernels of a block that computes all tokens, forward and backward, besides its eight products
BLOCK_KERNELS = {
    "GELU": 2,
    "LayerNorm, residual": 4,
    "attention": 4,  # flash: one forward, three backward
    "gradients of q, k, v stacked": 1,
}
# all else but products: gather, embedding, last block, head, loss, finite check, update, indices
OTHER_KERNELS = 32

NORM_TENSORS = 22  # [B * N, D], a block
STACKED_TENSORS = 6  # [B * N, H * d], a block: three gradients, read and written; two of them in the last block
OTHER_TENSORS = 6  # [B * N, D]: embedding with its first norm, gradient of the windows, finite check


def launches(b: Bucket) -> int:
    """Kernels and products of one iteration."""
    return len(linear_products(b)) + sum(BLOCK_KERNELS.values()) * b.full_blocks + OTHER_KERNELS


def pointwise_bytes(b: Bucket) -> int:
    """What inductor's kernels read and write in one iteration: GELU, norms, residuals, stacked gradients."""
    s, rows = b.shape, b.batch * b.tokens
    stacked = STACKED_TENSORS * b.full_blocks + 4 * (s.reads > 0)
    values = rows * (s.width * (NORM_TENSORS * b.full_blocks + OTHER_TENSORS) + b.inner * stacked)
    return work_of_parts(b)[Part.GELU].bytes + values * b.dtype.itemsize


def other_bytes(b: Bucket) -> int:
    """What the rest reads and writes besides products and attention: pixels, moments, ids, the last block's attention.

    The least that must move, see `work_of_parts`.
    """
    parts = (Part.GATHER, Part.UPDATE, Part.STATE, Part.LAST, Part.HEAD)
    of_products = sum(product_work(part, sizes, b.dtype).bytes for part, sizes in linear_products(b) if part in parts)
    work = work_of_parts(b)
    return sum(work[part].bytes for part in parts) - of_products
