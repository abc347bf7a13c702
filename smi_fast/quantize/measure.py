"""What real low-bit execution is worth: speed, size and accuracy beside float32, measured in the same process."""

import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from smi_fast.device import wait
from smi_fast.model.sparse_vit import SparseViT
from smi_fast.quantize.execute import LowBitViT, float32_bytes, low_bit_bytes
from smi_fast.quantize.forward import forward_sites
from smi_fast.storage.environment import device_name, versions

UNITS = {"dynamic": "int8", "static": "int8", "fp8": "float8_e4m3"}
Forward = Callable[[Tensor, Tensor | None], Tensor]
# below it, the two are called equally fast: repeated measurements of one system on a shared machine differ by as much
LEVEL = 0.05


@dataclass(frozen=True)
class Timing:
    """How `real_report` measures.

    Raises:
        ValueError: no round.
    """

    rounds: int = 9  # in which the systems take turns
    compiled: bool = True  # beside the eager forwards

    def __post_init__(self) -> None:
        if self.rounds < 1:
            raise ValueError(f"rounds={self.rounds}: must be at least 1")


def compiled(forward: Forward, device: torch.device) -> Forward:
    """``forward`` compiled by inductor, for the shapes of its first call; on a CPU with weights as constants.

    Frozen weights let inductor fold what depends on them alone, and pack them for oneDNN. They are copies: what is
    changed afterwards is not seen.
    """
    options: dict[str, Any] = {"freezing": True} if device.type == "cpu" else {}
    return torch.compile(forward, fullgraph=True, dynamic=False, options=options)


@torch.no_grad()
def take_turns(
    systems: Mapping[str, Forward], pixels: Tensor, keep: Tensor | None, rounds: int
) -> dict[str, list[float]]:
    """Seconds of a forward by system and round; every round runs each system once, after one that is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in systems}
    for index in range(rounds + 1):
        for name, forward in systems.items():
            begin = time.perf_counter()
            forward(pixels, keep)
            wait(pixels.device)
            if index > 0:
                seconds[name].append(time.perf_counter() - begin)
    return seconds


def signal_to_noise(found: Tensor, truth: Tensor) -> float:
    """SQNR in decibels, ``10 log10(|truth|^2 / |found - truth|^2)``; infinite where they are equal."""
    found, truth = found.double(), truth.double()
    return float(10 * torch.log10(truth.square().sum() / (found - truth).square().sum()))


@torch.no_grad()
def real_report(
    model: SparseViT, low: LowBitViT, pixels: Tensor, labels: Tensor | None = None, timing: Timing = Timing()
) -> dict[str, Any]:
    """Run a model in 8 bits and in float32, and compare them: JSON-able, for ``report.json``.

    Args:
        model: in float32.
        low: the same in 8 bits, of `to_low_bit`.
        pixels: ``[B, 3, H, W]``, what both are measured on, all patches.
        labels: ``[B]`` true classes of ``pixels``, for accuracy; None where there are none.
        timing: how speed is measured.

    Raises:
        ValueError: a model that is not in float32; logits that are not finite.
    """
    if model.precision != "float32":
        raise ValueError(f"model is {model.precision}: must be float32, which 8 bits are compared with")
    pixels = pixels.to(model.device)
    truth, found = forward_sites(model, pixels), low(pixels)
    if not (found.isfinite().all() and truth.isfinite().all()):
        raise ValueError(f"mode={low.mode!r}: logits of {model.info.name} are not finite")
    sqnr = signal_to_noise(found, truth)
    speed = _speed(model, low, pixels, timing)
    sizes = {"float32": len(float32_bytes(model)), "real": len(low_bit_bytes(low))}
    return {
        "execution": "real",
        "mode": low.mode,
        "words": _words(low, speed, sizes),
        "layers": {UNITS[low.mode]: low.layers},
        "sqnr_db": sqnr if sqnr < float("inf") else None,
        "same_class": _share(found.argmax(1) == truth.argmax(1)),
        "accuracy": None if labels is None else _accuracy(found, truth, labels.to(model.device)),
        "speed": speed,
        "bytes": sizes | {"ratio": sizes["float32"] / sizes["real"]},
        "batch": len(pixels),
        "device": device_name(model.device),
        "versions": versions(),
    }


def _speed(model: SparseViT, low: LowBitViT, pixels: Tensor, timing: Timing) -> dict[str, Any]:
    """By way of running: milliseconds of both, and how many times faster 8 bits are."""

    def float32(pixels: Tensor, keep: Tensor | None = None) -> Tensor:
        return forward_sites(model, pixels, keep)

    ways: dict[str, dict[str, Forward]] = {"eager": {"float32": float32, "real": low}}
    found: dict[str, Any] = {}
    if timing.compiled:
        try:
            ways["compiled"] = {name: first_run(system, pixels) for name, system in ways["eager"].items()}
        except Exception as error:  # a compiler that cannot is a result, whatever it raises
            found["compiled"] = {"why_not": f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200]}"}
    systems = {f"{way} {name}": run for way, pair in ways.items() for name, run in pair.items()}
    seconds = take_turns(systems, pixels, None, timing.rounds)
    for way in ways:
        found[way] = _compare(seconds[f"{way} float32"], seconds[f"{way} real"])
    return found


def first_run(forward: Forward, pixels: Tensor) -> Forward:
    """`compiled`, with the compilation done."""
    torch._dynamo.reset()
    run = compiled(forward, pixels.device)
    with warnings.catch_warnings():
        # torchao's tensors do not say how they are hashed: a graph is then not kept on disk
        warnings.filterwarnings("ignore", message=".*_stable_hash_for_caching")
        with torch.no_grad():
            run(pixels, None)
    return run


def quantiles(values: list[float]) -> tuple[float, float, float]:
    """The 20th, 50th and 80th percentile, by linear interpolation."""
    p20, p50, p80 = torch.tensor(values, dtype=torch.float64).quantile(torch.tensor([0.2, 0.5, 0.8]).double()).tolist()
    return p20, p50, p80


def _compare(float32: list[float], real: list[float]) -> dict[str, Any]:
    ratios = quantiles([theirs / ours for theirs, ours in zip(float32, real, strict=True)])
    by_name = {"float32_ms": [s * 1e3 for s in float32], "real_ms": [s * 1e3 for s in real]}
    found = {name: dict(zip(("p20", "p50", "p80"), quantiles(v), strict=True)) for name, v in by_name.items()}
    return {**found, "times_faster": dict(zip(("p20", "p50", "p80"), ratios, strict=True)), "rounds": len(real)}


def _words(low: LowBitViT, speed: dict[str, Any], sizes: dict[str, int]) -> str:
    """What was done, and whether it is faster."""
    parts = []
    for way in ("eager", "compiled"):
        if way not in speed:
            continue
        if "why_not" in speed[way]:
            parts.append(f"{way} it does not run ({speed[way]['why_not']})")
            continue
        ratio = speed[way]["times_faster"]["p50"]
        word = "faster than" if ratio > 1 + LEVEL else "slower than" if ratio < 1 - LEVEL else "as fast as"
        parts.append(f"{way} it is {word} float32 ({ratio:.2f} times its speed)")
    return (
        f"Real execution, not simulated: {len(low.layers)} linear layers multiply {UNITS[low.mode]} numbers through "
        f"torchao, {low.mode} scales. On this machine {'; '.join(parts)}. The file is "
        f"{sizes['float32'] / sizes['real']:.1f} times smaller."
    )


def _share(hits: Tensor) -> float:
    return float(hits.double().mean())


def _accuracy(found: Tensor, truth: Tensor, labels: Tensor) -> dict[str, float]:
    return {"float32": _share(truth.argmax(1) == labels), "real": _share(found.argmax(1) == labels)}
