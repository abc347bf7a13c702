"""Clocks, rounds in which systems take turns, and the device's ceilings."""

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch

System = TypeVar("System")
MATMUL_SIDE = 8192  # of the product whose rate a GPU is judged by
LEAST_ROUNDS = 2  # that are measured however little time there is


def quantile(values: Sequence[float], share: float) -> float:
    """By linear interpolation."""
    return float(torch.tensor(values, dtype=torch.float64).quantile(share))


def spread(values: Sequence[float], unit: float, digits: int, name: str = "ms") -> dict[str, float]:
    """The 20th, 50th and 80th percentile as columns ``<name>_p20`` and so on; ``unit``: how many make a second."""
    return {f"{name}_p{share}": round(quantile(values, share / 100) * unit, digits) for share in (20, 50, 80)}


def median_ratio(theirs: Sequence[float], ours: Sequence[float]) -> float:
    """Of two systems' seconds, round by round."""
    return statistics.median(one / other for one, other in zip(theirs, ours, strict=True))


def synchronize(device: str) -> None:
    """Wait for a GPU; nothing on a CPU."""
    if device != "cpu":
        torch.cuda.synchronize(device)


def seconds_each(call: Callable[[], Any], count: int, device: str) -> float:
    """Seconds by the wall clock of each of ``count`` calls, the device waited for before and after."""
    synchronize(device)
    begin = time.perf_counter()
    for _ in range(count):
        call()
    synchronize(device)
    return (time.perf_counter() - begin) / count


def timed(call: Callable[[], Any], device: str) -> float:
    """Seconds of one call, on a GPU by its own clock."""
    if device == "cpu":
        return seconds_each(call, 1, device)
    with torch.cuda.device(device):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def take_turns(
    systems: Mapping[System, Callable[[], float]], rounds: int, warm_up: int = 1, until: float = math.inf
) -> dict[System, list[float]]:
    """Measure every system once a round, so that a change in the machine's speed hits all of them.

    Args:
        systems: each measures itself once.
        rounds: how many count.
        warm_up: how many do not, before them.
        until: a time of ``time.monotonic()``; no round is begun that would end after it, beyond `LEAST_ROUNDS`.

    Returns:
        What each measured, by round.
    """
    found: dict[System, list[float]] = {system: [] for system in systems}
    lasted = 0.0
    for index in range(-warm_up, rounds):
        begin = time.monotonic()
        if index >= LEAST_ROUNDS and begin + lasted > until:
            break
        for system, measure in systems.items():
            value = measure()
            if index >= 0:
                found[system].append(value)
        lasted = time.monotonic() - begin
    return found


def copy_bandwidth(device: str) -> float:
    """Bytes per second of a large copy on the device, read and written, median of 20."""
    size = 2**30 if device != "cpu" else 2**27
    source = torch.randint(0, 255, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    target.copy_(source)
    return 2 * size / statistics.median(timed(lambda: target.copy_(source), device) for _ in range(20))


def matmul_rate(device: str, dtype: torch.dtype) -> float:
    """FLOP/s of a large square matrix product on the device, the best of 10 after a warm-up."""
    side = MATMUL_SIDE if device != "cpu" else 1536
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    out = a @ b
    best = min(timed(lambda: torch.mm(a, b, out=out), device) for _ in range(10))
    return 2 * side**3 / best
