"""Options that several commands share."""

from pathlib import Path
from typing import Annotated

import torch
import typer

from smi_fast.config import PAPER_STOPS
from smi_fast.model.fp8 import why_not_fp8
from smi_fast.model.scaled_linear import FP8

Model = Annotated[str, typer.Option(help="'demo' (bundled), or the name of a timm Vision Transformer.")]
Checkpoint = Annotated[
    Path | None, typer.Option(help="Weights for the model (.safetensors, or .pth of plain weights).")
]
Pretrained = Annotated[
    bool | None, typer.Option(help="Fetch timm's pretrained weights. [default: yes, if no --checkpoint]")
]
ImageSize = Annotated[int | None, typer.Option(help="Side of the images in pixels. [default: the model's]")]
Iterations = Annotated[int, typer.Option(help="Optimiser steps an image gets.")]
Stops = Annotated[
    list[str] | None,
    typer.Option(
        "--stop",
        help="ITERATION:RATIO, repeated: after ITERATION steps, drop RATIO of the kept patches. [default: the paper's]",
    ),
]
Dense = Annotated[bool, typer.Option("--dense", help="No stops: every patch is inverted to the end.")]
BatchSize = Annotated[
    str,
    typer.Option(
        help="Images in work at a time: a number, one for each stage (each divides the largest, commas between), or "
        "'auto': as `smi-fast tune` chose, else 64."
    ),
]
Impl = Annotated[str, typer.Option(help="compiled or eager.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress, only the result.")]
DType = Annotated[
    str,
    typer.Option(
        help="Compute dtype: fp32, bf16, or fp8 (linear layers of the blocks, the rest in bf16; not on every GPU). "
        "[default: bf16 on CUDA, else fp32]"
    ),
]
Device = Annotated[str, typer.Option(help="'auto', 'cpu', 'cuda' or 'cuda:N'.")]

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp8": FP8}


def check_impl(impl: str) -> None:
    """Raises ``ValueError`` for another name than the two."""
    if impl not in ("compiled", "eager"):
        raise ValueError(f"--impl {impl!r}: must be compiled or eager")


def parse_device(text: str) -> torch.device:
    """``auto`` takes the GPU where there is one.

    Raises:
        ValueError: no such device on this machine.
    """
    if text == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(text)
    except RuntimeError:
        raise ValueError(f"--device {text!r}: must be 'auto', 'cpu', 'cuda' or 'cuda:N'") from None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device {text!r}: only cpu and cuda are supported")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"--device {text!r}: this machine has {torch.cuda.device_count()} CUDA devices")
    return device


def parse_dtype(text: str, device: torch.device) -> torch.dtype:
    """``auto`` is bf16 on CUDA and fp32 on a CPU.

    Raises:
        ValueError: another name, or fp8 on a device that has none.
    """
    if text == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    if text not in DTYPES:
        raise ValueError(f"--dtype {text!r}: must be one of {', '.join(DTYPES)}")
    if DTYPES[text] is FP8 and (reason := why_not_fp8(device)):
        raise ValueError(f"--dtype {text!r}: device {str(device)!r} has {reason}; use --dtype bf16")
    return DTYPES[text]


def parse_stops(texts: list[str] | None, dense: bool, iterations: int) -> tuple[tuple[int, float], ...]:
    """``["50:0.3"]`` to ``((50, 0.3),)``; without any, the paper's four stops.

    Raises:
        ValueError: not of the form ITERATION:RATIO, stops together with ``dense``, or too few iterations for the
            default stops.
    """
    if dense:
        if texts:
            raise ValueError("--dense and --stop exclude each other: --dense means no stop at all")
        return ()
    if not texts:
        last = PAPER_STOPS[-1][0]
        if iterations <= last:
            raise ValueError(
                f"--iterations {iterations}: the default stops need more than {last}; give --stop or --dense"
            )
        return PAPER_STOPS
    stops = []
    for text in texts:
        iteration, colon, ratio = text.partition(":")
        try:
            if not colon:
                raise ValueError
            stops.append((int(iteration), float(ratio)))
        except ValueError:
            raise ValueError(f"--stop {text!r}: must be ITERATION:RATIO, such as 50:0.3") from None
    return tuple(stops)
