"""The stopping schedule: pure functions from ``(L, stops, iterations)`` to stages."""

from dataclasses import dataclass

from smi_fast.config import check_stops


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
    """
    return int(kept * (1 - ratio) + 1e-9)


def plan_stages(patches: int, stops: tuple[tuple[int, float], ...], iterations: int) -> tuple[Stage, ...]:
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


def sparsity(stages: tuple[Stage, ...], patches: int) -> float:
    """Share of all patches that the last stage has dropped: ``1 - K / L``."""
    return 1 - stages[-1].kept / patches
