"""Checks of what the public ops are given. They look at shapes, dtypes and devices, never at values on a device."""

from collections.abc import Mapping

import torch
from torch import Tensor

from smi_fast.kernels.common.grid import Moves

IDS = (torch.int64,)
BOOL = (torch.bool,)
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
EXACT = (torch.float64, torch.float32)

Expected = tuple[Tensor, str, tuple[torch.dtype, ...]]


def check(op: str, expected: Mapping[str, Expected], **known: int) -> dict[str, int]:
    """Check tensors against shapes written as letters.

    Args:
        op: name of the op, for messages.
        expected: by argument name: tensor, shape such as ``"B 3 H W"`` and the dtypes allowed. A number is an exact
            side; a letter must be the same wherever it stands, and at least 1.
        known: letters that are fixed beforehand.

    Returns:
        the letters' values.

    Raises:
        ValueError: wrong rank, side or dtype, an empty side, or tensors on different devices.
    """
    sizes = dict(known)
    device = next(iter(expected.values()))[0].device
    for name, (tensor, shape, dtypes) in expected.items():
        letters = shape.split()
        told = f"{op}: {name} of shape {tuple(tensor.shape)}"
        if tensor.ndim != len(letters):
            raise ValueError(f"{told}: must be [{', '.join(letters)}]")
        for letter, side in zip(letters, tensor.shape, strict=True):
            wanted = int(letter) if letter.isdigit() else sizes.setdefault(letter, side)
            if side != wanted:
                fixed = "" if letter.isdigit() else f" with {letter}={wanted}"
                raise ValueError(f"{told}: must be [{', '.join(letters)}]{fixed}")
            if side == 0:
                raise ValueError(f"{told}: {letter} is 0, must be at least 1")
        if tensor.dtype not in dtypes:
            allowed = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
            raise ValueError(f"{op}: {name} is {str(tensor.dtype).removeprefix('torch.')}: must be {allowed}")
        if tensor.device != device:
            first = next(iter(expected))
            raise ValueError(f"{op}: {name} is on {tensor.device}, {first} on {device}: must be on one device")
    return sizes


def leading_letters(tensor: Tensor) -> str:
    """The shape ``[..., D]`` of a tensor of any rank, for `check`: a letter of its own for each axis but the last."""
    return " ".join([f"n{axis}" for axis in range(tensor.ndim - 1)] + ["D"])


def expected_moves(moves: Moves, prefix: str = "moves") -> dict[str, Expected]:
    """The shapes and dtypes of moves, for `check`."""
    return {f"{prefix}.shift": (moves.shift, "B 2", IDS), f"{prefix}.flip": (moves.flip, "B", BOOL)}


def check_ids(name: str, ids: Tensor, patches: int) -> None:
    """Patch ids that name patches of a grid, ascending and so distinct in each row.

    Reads the ids, and so waits for the device: for the edges of the library, not for a loop.

    Raises:
        ValueError: names the first row that is wrong.
    """
    wrong = (ids < 0) | (ids >= patches)
    if bool(wrong.any()):
        row, slot = wrong.nonzero()[0].tolist()
        raise ValueError(f"{name}[{row}, {slot}]={int(ids[row, slot])}: must be a patch id in 0..{patches - 1}")
    falling = ids[:, 1:] <= ids[:, :-1]
    if bool(falling.any()):
        row, slot = falling.nonzero()[0].tolist()
        pair = ids[row, slot : slot + 2].tolist()
        raise ValueError(f"{name}[{row}] goes from {pair[0]} to {pair[1]}: ids must ascend in each row")
