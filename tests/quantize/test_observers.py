"""Ranges against brute force on the values themselves, and calibration sets."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from smi_fast.images import SparseImages
from smi_fast.kernels.common.grid import Grid
from smi_fast.kernels.patch_cells import put_patches_, take_patches
from smi_fast.model import SparseViT
from smi_fast.quantize import Calibration, QuantConfig, observers, quantize
from smi_fast.quantize.forward import forward_sites
from smi_fast.quantize.observers import BINS, bin_counts, extremes, mse_range, observe, percentile_range
from smi_fast.quantize.scheme import OBSERVERS, Affine, asymmetric
from tests.fakes import make_images

GRID = Grid(24, 32, 8)  # of `make_model`


@pytest.fixture
def few_bins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Histograms are quick, and as good where ranges are only compared."""
    monkeypatch.setattr(observers, "BINS", 256)


def images_for(model: SparseViT, n: int = 6, sha256: str | None = None) -> SparseImages:
    """Random images that fit the model; the second one failed."""
    images = make_images(n, GRID, kept=5, names=None)
    info = model.info
    origin = replace(images.provenance, mean=info.mean, std=info.std, model_sha256=sha256 or info.sha256)
    return replace(images, provenance=origin)


def values(model: SparseViT, calibration: Calibration) -> dict[str, Tensor]:
    seen: dict[str, list[Tensor]] = {}
    for pixels, keep in calibration.batches:
        forward_sites(model, pixels, keep, lambda name, x: seen.setdefault(name, []).append(x.flatten()) or x)
    return {name: torch.cat(parts) for name, parts in seen.items()}


def test_extremes(model: SparseViT) -> None:
    calibration = Calibration.gaussian(GRID, 40, seed=1)
    truth = {name: (float(x.min()), float(x.max())) for name, x in values(model, calibration).items()}
    assert extremes(model, calibration) == truth
    chosen = observe(model, calibration, QuantConfig(act_bits=6))
    for name, (low, high) in truth.items():
        wanted = asymmetric(torch.tensor(low), torch.tensor(high), 6)
        assert (chosen[name].scale, chosen[name].zero_point) == (wanted.scale, wanted.zero_point)


@pytest.mark.parametrize("percentile", [99.0, 90.0, 99.99, 100.0])
def test_percentile(percentile: float) -> None:
    x = torch.randn(20_000, generator=torch.Generator().manual_seed(0)).double() ** 3
    low, high = float(x.min()), float(x.max())
    width = (high - low) / BINS
    got = percentile_range(bin_counts(x, low, high), low, high, percentile)
    ordered = x.sort().values
    spare = int(len(x) * (100 - percentile) / 100)
    assert ordered[spare] - width <= got[0] <= ordered[spare]
    assert ordered[-1 - spare] <= got[1] <= ordered[-1 - spare] + width * (1 + 1e-9)
    assert int((x < got[0]).sum()) <= spare
    assert int((x > got[1]).sum()) <= spare


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("shift", [0.0, 5.0, -5.0])
def test_mse(bits: int, shift: float) -> None:
    """As good as the best of the same ranges, tried on the values themselves."""
    x = torch.randn(20_000, generator=torch.Generator().manual_seed(0)) + shift
    x[:3] *= 10
    low, high = float(x.min()), float(x.max())

    def error(r: float) -> float:
        affine = asymmetric(torch.tensor(min(low, 0) * r), torch.tensor(max(high, 0) * r), bits)
        return float((affine.fake(x) - x).double().square().sum())

    best = min(error(step / 100) for step in range(1, 101))
    found = mse_range(bin_counts(x, low, high), low, high, bits)
    share = found[1] / max(high, 0) if high > 0 else found[0] / low
    assert error(share) <= 1.01 * best
    assert bits == 8 or share < 1


def test_a_constant_keeps_its_range() -> None:
    counts = bin_counts(torch.full((7,), 2.0), 2.0, 2.0)
    assert int(counts.sum()) == 7
    assert percentile_range(counts, 2.0, 2.0, 99.99) == (2.0, 2.0)
    assert mse_range(counts, 2.0, 2.0, 8)[1] == 2.0


def assert_alike(ours: dict[str, Affine], theirs: dict[str, Affine]) -> None:
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert float(ours[name].scale) == pytest.approx(float(theirs[name].scale), rel=1e-4), name
        assert abs(int(ours[name].zero_point) - int(theirs[name].zero_point)) <= 1, name


@pytest.mark.usefixtures("few_bins")
@pytest.mark.parametrize("observer", OBSERVERS)
def test_order_and_batches_do_not_matter(model: SparseViT, observer: str) -> None:
    config = QuantConfig(observer=observer, percentile=99.0)
    images = images_for(model, 12)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    one = Calibration.from_pixels(images.pixels, images.keep)
    batches = [(images.pixels[rows], images.keep[rows]) for rows in order.split(5)]
    assert_alike(observe(model, one, config), observe(model, Calibration("split", tuple(batches)), config))


@pytest.mark.usefixtures("few_bins")
@pytest.mark.parametrize("observer", OBSERVERS)
def test_dropped_pixels_do_not_matter(model: SparseViT, observer: str) -> None:
    config = QuantConfig(observer=observer)
    images = images_for(model)
    kept = take_patches(images.pixels, images.keep, images.grid)
    other = torch.full_like(images.pixels, 1e6)
    put_patches_(other, images.keep, kept)
    ours = observe(model, Calibration.from_images(images, model, 5), config)
    theirs = observe(model, Calibration.from_images(replace(images, pixels=other), model, 5), config)
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert (ours[name].scale, ours[name].zero_point) == (theirs[name].scale, theirs[name].zero_point)


def test_failed_images_are_left_out(model: SparseViT) -> None:
    images = images_for(model)  # the second one failed
    (pixels, keep), *rest = Calibration.from_images(images, model, 5).batches
    assert not rest
    whole = [0, 2, 3, 4, 5]
    assert torch.equal(pixels, images.pixels[whole])
    assert torch.equal(keep, images.keep[whole])


def test_images_are_chosen_by_seed(model: SparseViT) -> None:
    images = images_for(model, 40)
    first, again, other = (Calibration.from_images(images, model, 8, seed).batches[0][0] for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    noise = Calibration.gaussian(GRID, 40, 3)
    assert [len(pixels) for pixels, _ in noise.batches] == [32, 8]
    assert len(noise) == 40
    assert torch.equal(noise.batches[0][0], Calibration.gaussian(GRID, 40, 3).batches[0][0])


def test_bad_calibration(model: SparseViT) -> None:
    images = images_for(model)
    with pytest.raises(ValueError, match=r"count=6: there are 5 images that were finished, and 1 failed"):
        Calibration.from_images(images, model, 6)
    with pytest.raises(ValueError, match=r"count=1: there are 0 images"):
        Calibration.from_images(images[1:2], model, 1)
    with pytest.raises(ValueError, match="count=0: must be an integer of at least 1"):
        Calibration.from_images(images, model, 0)
    with pytest.raises(ValueError, match="count=0"):
        Calibration.gaussian(GRID, 0)
    with pytest.raises(ValueError, match=r"images of Grid.*must be of Grid\(height=24, width=32, patch=8\)"):
        Calibration.from_images(make_images(4, Grid(16, 24, 4)), model, 2)
    with pytest.raises(ValueError, match=r"images of Grid\(height=24, width=32, patch=4\)"):
        Calibration.from_images(make_images(4, Grid(24, 32, 4)), model, 2)
    with pytest.raises(ValueError, match="images normalised with mean="):
        Calibration.from_images(make_images(4, GRID), model, 2)
    with pytest.raises(ValueError, match="'pixels' is empty"):
        Calibration.from_pixels(torch.zeros(0, 3, 24, 32))
    with pytest.raises(ValueError, match=r"pixels is \[2, 3, 8, 8\] torch.float64"):
        Calibration.from_pixels(torch.zeros(2, 3, 8, 8).double())
    with pytest.raises(ValueError, match=r"keep is \[1, 4\]"):
        Calibration.from_pixels(torch.zeros(2, 3, 8, 8), torch.zeros(1, 4).long())


def test_bad_images_for_the_model(model: SparseViT, make_model: Callable[..., SparseViT]) -> None:
    with pytest.raises(ValueError, match=r"is of \[3, 32, 32\]: tiny takes \[3, 24, 32\]"):
        quantize(model, Calibration.gaussian(Grid(32, 32, 8), 2))
    with pytest.raises(ValueError, match=r"keep\[0, 0\]=12"):
        quantize(model, Calibration.from_pixels(torch.zeros(1, 3, 24, 32), torch.tensor([[12]])))
    with pytest.raises(ValueError, match="values at input are not finite"):
        quantize(model, Calibration.from_pixels(torch.full((1, 3, 24, 32), float("nan"))))
    with pytest.raises(ValueError, match="model is float64: must be float32"):
        quantize(make_model(), Calibration.gaussian(GRID, 2))


def test_images_of_other_weights_warn(model: SparseViT) -> None:
    with pytest.warns(UserWarning, match="'tiny' with other weights than those of 'tiny'"):
        Calibration.from_images(images_for(model, sha256="1" * 64), model, 2)
