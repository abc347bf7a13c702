"""The paper's strategy: at each stop, the patches that CLS attends to least are dropped."""

from dataclasses import dataclass

from torch import Tensor

from smi_fast.checks import check_rules, flag
from smi_fast.kernels.select_patches import select_patches
from smi_fast.method.view import StopView
from smi_fast.plugins import register
from smi_fast.schedule import Stage, StopList, check_stops, plan_stages

# Of the paper, for 4000 iterations: 196 -> 137 -> 95 -> 66 -> 46 patches.
PAPER_STOPS: StopList = ((50, 0.3), (100, 0.3), (200, 0.3), (300, 0.3))


@register("strategy", "stops")
@dataclass(frozen=True)
class Stops:
    """Sparse Model Inversion (Hu et al., ICML 2024, section 4.1). Without stops: dense inversion.

    Raises:
        ValueError: a stop that breaks a rule of `check_stops`.
    """

    stops: StopList = PAPER_STOPS  # (after this many iterations, drop this share of the kept patches)
    # True: a stopped patch gets no prior and no optimiser step. False: those go on, as in the published code
    stop_updates: bool = True

    def __post_init__(self) -> None:
        try:
            object.__setattr__(self, "stops", tuple((iteration, float(ratio)) for iteration, ratio in self.stops))
        except (TypeError, ValueError):
            raise ValueError(f"stops={self.stops!r}: must be pairs of an iteration and a ratio") from None
        check_stops(self.stops)
        check_rules(self, {"stop_updates": flag(self.stop_updates)})

    def check(self, iterations: int) -> None:
        """See `check_stops`."""
        check_stops(self.stops, iterations)

    def stages(self, patches: int, iterations: int) -> tuple[Stage, ...]:
        """See `plan_stages`."""
        return plan_stages(patches, self.stops, iterations)

    def still_iterations(self, iterations: int) -> frozenset[int]:
        """The iterations whose scores a stop reads, so that a keep set does not depend on the last random shift.

        The published code also runs the first iteration after a stop that way, and so does ``stop_updates=False``.
        """
        still = {iteration - 1 for iteration, _ in self.stops}
        return frozenset(still if self.stop_updates else still | {iteration for iteration, _ in self.stops})

    def select(self, stop: StopView, count: int) -> Tensor:
        """The patches of the ``count`` highest CLS scores; of equal ones, those of lower ids."""
        return select_patches(stop.scores, count)
