"""An image whose step is not finite is stopped, and leaves the others alone."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import pytest
import torch
from torch import Tensor

from smi_fast.engine import Progress
from smi_fast.engine.randomness import start_canvas
from smi_fast.method.view import View
from smi_fast.model.sparse_vit import SparseViT
from smi_fast.plugins import register
from tests.engine.test_inverter import CONFIG, assert_same, invert

MakeModel = Callable[..., SparseViT]


@register("prior", "test_faulty")
@dataclass(frozen=True)
class Faulty:
    """Not a number for one label, from one iteration on."""

    label: int
    iteration: int
    weight: float = 1.0

    def __call__(self, view: View) -> Tensor:
        bad = (view.labels == self.label) & (view.iteration >= self.iteration)
        return torch.where(bad, float("nan"), 0.0) * view.patches.flatten(1).sum(1)


@pytest.mark.parametrize("iteration", [0, 4, 7])
def test_a_nan_stops_that_image_alone(make_model: MakeModel, iteration: int) -> None:
    @dataclass
    class Told(Progress):
        failures: list[tuple[int, int]] = field(default_factory=list)

        def image_failed(self, image_id: int, iteration: int) -> None:
            self.failures.append((image_id, iteration))

    model, told = make_model(), Told()
    whole = invert(model, [0, 1, 2])
    config = replace(CONFIG, priors=(*CONFIG.priors, Faulty(1, iteration)))
    hurt = invert(model, [0, 1, 2], config, progress=told)
    assert told.failures == [(1, iteration)]
    assert hurt.failed_at.tolist() == [-1, iteration, -1]
    assert hurt.pixels.isfinite().all()
    others = torch.tensor([0, 2])
    assert_same(whole[others], hurt[others])
    if iteration == 0:
        assert torch.equal(hurt.pixels[1], start_canvas(5, [1], model.grid)[0])


@register("prior", "test_steep")
@dataclass(frozen=True)
class Steep:
    """A value of 0 whose gradient is not a number, at the windows or at the pixels, for the image of label 1."""

    at: str
    weight: float = 1.0

    def __call__(self, view: View) -> Tensor:
        flat = (0 * getattr(view, self.at).flatten(1)).sum(1)
        return torch.where(view.labels == 1, flat, 1.0).sqrt()


@pytest.mark.parametrize("at", ["windows", "patches"])
def test_a_gradient_that_is_not_finite_stops_that_image_alone(make_model: MakeModel, at: str) -> None:
    model = make_model()
    hurt = invert(model, [0, 1, 2], replace(CONFIG, priors=(*CONFIG.priors, Steep(at))))
    assert hurt.failed_at.tolist() == [-1, 0, -1]
    assert hurt.pixels.isfinite().all()
    others = torch.tensor([0, 2])
    assert_same(invert(model, [0, 1, 2])[others], hurt[others])
