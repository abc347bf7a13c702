"""Stages: runs of iterations in which the number of kept patches is constant."""

from dataclasses import dataclass

from smi_fast.checks import is_finite, is_int

StopList = tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Stage:
    """Iterations ``start..end-1`` (counted from 0), in which ``kept`` patches are inverted."""

    start: int
    end: int
    kept: int

    @property
    def length(self) -> int:
        """Iterations in the stage."""
        return self.end - self.start


def kept_after(kept: int, ratio: float) -> int:
    """``int(kept * (1 - ratio))``, as the published code counts.

    The product is nudged by 1e-9, so that dropping 0.9 of 10 leaves 1 although ``10 * (1 - 0.9)`` is below 1 in
    floating point.

    >>> kept_after(196, 0.3)
    137
    """
    return int(kept * (1 - ratio) + 1e-9)


def plan_stages(patches: int, stops: StopList, iterations: int) -> tuple[Stage, ...]:
    """Split ``iterations`` into stages of constant ``K``.

    A stop at ``(n, ratio)`` means: after ``n`` iterations, drop the ``ratio`` of the kept patches with the lowest CLS
    score of iteration ``n``. Consecutive stops give a stage of one iteration; a stop at 1 gives a first stage of one.

    Args:
        patches: ``L``.
        stops: ascending ``(iteration, ratio)``.
        iterations: the whole run.

    Raises:
        ValueError: a stop that breaks a rule of `check_stops`, leaves no patch, or drops none.
    """
    check_stops(stops, iterations)
    stages, start, kept = [], 0, patches
    for iteration, ratio in stops:
        stages.append(Stage(start, iteration, kept))
        remaining = kept_after(kept, ratio)
        if remaining < 1:
            raise ValueError(f"stops: ({iteration}, {ratio}): leaves no patch of the {kept} that are kept by then")
        if remaining == kept:
            raise ValueError(f"stops: ({iteration}, {ratio}): drops none of the {kept} patches that are kept by then")
        start, kept = iteration, remaining
    return (*stages, Stage(start, iterations, kept))


def check_stops(stops: StopList, iterations: int | None = None) -> None:
    """Check what does not depend on the number of patches.

    Args:
        stops: ``(iteration, ratio)`` pairs.
        iterations: of the whole run; None where it is not known yet.

    Raises:
        ValueError: an iteration outside ``1..iterations-1``, out of order or twice; a ratio outside ``(0, 1)``.
    """
    previous = 0
    for iteration, ratio in stops:
        where = f"stops: ({iteration}, {ratio})"
        if not is_int(iteration) or iteration < 1:
            raise ValueError(f"{where}: the iteration must be an integer of at least 1, a stop needs CLS scores")
        if iterations is not None and iteration >= iterations:
            raise ValueError(f"{where}: must come before the last iteration; iterations={iterations}")
        if iteration == previous:
            raise ValueError(f"{where}: iteration {iteration} is named twice; give one stop with the joint ratio")
        if iteration < previous:
            raise ValueError(f"{where}: comes after a stop at {previous}; stops must ascend")
        if not (is_finite(ratio) and 0 < ratio < 1):
            raise ValueError(f"{where}: the ratio must lie strictly between 0 and 1")
        previous = iteration


def sparsity(stages: tuple[Stage, ...], patches: int) -> float:
    """Share of all patches that the last stage has dropped: ``1 - K / L``."""
    return 1 - stages[-1].kept / patches
