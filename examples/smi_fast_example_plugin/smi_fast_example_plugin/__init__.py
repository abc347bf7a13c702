"""A prior and a strategy, registered when smi_fast imports this module."""

from dataclasses import dataclass

import torch
from torch import Tensor

from smi_fast.checks import check_rules, not_negative
from smi_fast.method.view import StopView, View
from smi_fast.plugins import register
from smi_fast.schedule import Stage, StopList, check_stops, plan_stages


@register("prior", "contrast")
@dataclass(frozen=True)
class Contrast:
    """Rewards contrast: minus the standard deviation of each kept patch, mean over patches and channels.

    Raises:
        ValueError: a weight that is negative or not finite.
    """

    weight: float = 0.1

    def __post_init__(self) -> None:
        check_rules(self, {"weight": not_negative(self.weight)})

    def __call__(self, view: View) -> Tensor:
        """``[B]``; a flat patch has no gradient."""
        values = view.patches.flatten(3)  # [B, A, 3, P * P]
        variance = values.var(-1, correction=0)
        return -(variance + 1e-12).sqrt().mean((1, 2))


@register("strategy", "centre")
@dataclass(frozen=True)
class Centre:
    """Keeps the patches that are nearest to the middle of the image, whatever CLS attends to: a control for `stops`.

    Raises:
        ValueError: a stop that breaks a rule of `smi_fast.schedule.check_stops`.
    """

    stops: StopList = ((50, 0.3), (100, 0.3), (200, 0.3), (300, 0.3))
    stop_updates: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "stops", tuple((iteration, float(ratio)) for iteration, ratio in self.stops))
        check_stops(self.stops)

    def check(self, iterations: int) -> None:
        """See `check_stops`."""
        check_stops(self.stops, iterations)

    def stages(self, patches: int, iterations: int) -> tuple[Stage, ...]:
        """See `plan_stages`."""
        return plan_stages(patches, self.stops, iterations)

    def still_iterations(self, iterations: int) -> frozenset[int]:
        """None: no scores are read."""
        return frozenset()

    def select(self, stop: StopView, count: int) -> Tensor:
        """``[B, count]``; of patches at equal distance, those of lower ids."""
        row = stop.keep // stop.grid.columns - (stop.grid.rows - 1) / 2
        column = stop.keep % stop.grid.columns - (stop.grid.columns - 1) / 2
        order = torch.sort(row.square() + column.square(), dim=1, stable=True).indices
        return order[:, :count].sort(dim=1).values
