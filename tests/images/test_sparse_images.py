"""`SparseImages` and `Process` in memory: their rules, subsets and colours."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from smi_fast.images import SparseImages, sparse_images
from smi_fast.images.sparse_images import to_uint8
from smi_fast.kernels.common.grid import Grid
from tests.fakes import MEAN, STD, assert_same_images, make_images, make_process, provenance

ROWS = make_images().keep


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("pixels", torch.zeros(5, 16, 24), r"pixels is \[5, 16, 24\].*\[any, 3, any, any\]"),
        ("pixels", torch.zeros(5, 1, 16, 24), "pixels is"),
        ("pixels", torch.zeros(5, 3, 16, 24).half(), "pixels is .*float16.*float32"),
        ("pixels", torch.zeros(5, 3, 16, 23), "width=23"),
        ("pixels", torch.zeros(4, 3, 16, 24), r"keep is \[5, 5\].*\[4, any\]"),
        ("keep", ROWS.int(), "keep is .*int32"),
        ("keep", ROWS[:, :0], r"K=0.*1\.\.24"),
        ("keep", ROWS.flip(1), r"keep\[0\]=.*strictly ascending"),
        ("keep", ROWS[:, [0, 1, 2, 3, 3]], "strictly ascending"),
        ("keep", ROWS - 24, "keep has the id -"),
        ("keep", torch.arange(20, 25).expand(5, 5), r"keep has the id 24: .*0\.\.23"),
        ("labels", torch.arange(4), r"labels is \[4\]"),
        ("labels", torch.tensor([0, 1, 2, 3, -1]), r"labels=\[3, -1\].*0\.\.2"),
        ("image_ids", torch.zeros(5), "image_ids is .*float32"),
        ("confidence", torch.zeros(5).double(), "confidence is .*float64"),
        ("predicted", torch.zeros(5, 1).long(), r"predicted is \[5, 1\]"),
        ("failed_at", torch.zeros(5).int(), "failed_at is .*int32"),
    ],
)
def test_images_that_break_a_rule(name: str, value: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(make_images(), **{name: value})


def test_labels_without_names_must_not_be_negative() -> None:
    images = make_images(names=None)
    replace(images, labels=torch.full((5,), 1000))
    with pytest.raises(ValueError, match=r"labels=\[-1, .*at least 0"):
        replace(images, labels=torch.full((5,), -1))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("mean", (0.5, 0.5), "mean=.*three numbers"),
        ("std", (0.5,), "std=.*three numbers"),
        ("std", (0.5, 0.0, 0.5), "std=.*positive"),
        ("patch", 0, "patch=0: must be at least 1"),
        ("config", {"a": torch.zeros(1)}, "config=.*JSON"),
    ],
)
def test_provenance_that_breaks_a_rule(name: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(provenance(), **{name: value})


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("iterations", (), r"iterations=\(\)"),
        ("iterations", (-1, 0, 1), "iterations=.*not negative"),
        ("iterations", (0, 50, 50), "iterations=.*strictly ascending"),
        ("iterations", (0, 50), r"pixels is .*\[2, any, 3, any, any\]"),
        ("pixels", torch.zeros(3, 5, 3, 16, 24), "pixels is .*float32"),
        ("pixels", torch.zeros(3, 0, 3, 16, 24, dtype=torch.uint8), "at least one image"),
        ("kept", torch.zeros(3, 5, 23, dtype=torch.bool), r"kept is .*\[3, 5, 24\]"),
        ("kept", torch.zeros(3, 5, 24), "kept is .*float32"),
        ("labels", torch.arange(4), r"labels is \[4\]"),
        ("image_ids", torch.arange(4), r"image_ids is \[4\]"),
        ("patch", 5, "height=16"),
    ],
)
def test_a_process_that_breaks_a_rule(name: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(make_process(make_images()), **{name: value})


@pytest.mark.parametrize(
    ("index", "ids"),
    [
        (0, [10]),
        (-1, [14]),
        (slice(1, 3), [11, 12]),
        (slice(0, 0), []),
        (torch.tensor([True, False, False, True, False]), [10, 13]),
        (torch.tensor([4, 0, 0]), [14, 10, 10]),
        (torch.tensor([4, 1], dtype=torch.uint8), [14, 11]),
    ],
)
def test_subsets(index: Any, ids: list[int]) -> None:
    images = make_images()
    subset = images[index]
    assert subset.image_ids.tolist() == ids
    rows = torch.tensor(ids, dtype=torch.int64) - 10
    for name in sparse_images.TENSORS:
        assert torch.equal(getattr(subset, name), getattr(images, name)[rows]), name


def test_subsets_that_do_not_exist() -> None:
    images = make_images()
    for outside in (5, -6, torch.tensor([5])):
        with pytest.raises(IndexError):
            images[outside]
    for wrong in (torch.tensor([0.0]), torch.tensor([[0]]), torch.tensor(0)):
        with pytest.raises(ValueError, match=r"index is .*must be \[any\]"):
            images[wrong]
    assert [int(image.image_ids) for image in images] == [10, 11, 12, 13, 14]  # iteration ends


def test_cat_is_the_inverse_of_slicing() -> None:
    images = make_images()
    assert_same_images(SparseImages.cat([images[:2], images[2:2], images[2:]]), images)


def test_cat_refuses_what_does_not_fit() -> None:
    images = make_images()
    other = replace(images, provenance=replace(images.provenance, seed=8))
    with pytest.raises(ValueError, match=r"parts\[1\].*provenance"):
        SparseImages.cat([images, other])
    with pytest.raises(ValueError, match=r"parts\[1\]\.keep is \[4\]"):
        SparseImages.cat([images, make_images(kept=4)])
    with pytest.raises(ValueError, match=r"parts\[1\]\.pixels is \[3, 24, 24\]"):
        SparseImages.cat([images, make_images(grid=Grid(24, 24, 4))])
    with pytest.raises(ValueError, match="parts is empty"):
        SparseImages.cat([])


def test_figures() -> None:
    images = make_images(6)  # labels 0 1 2 0 1 2, predicted 0 1 0 1 0 1
    assert images.top1 == 2 / 6
    assert images.sparsity == 1 - 5 / 24
    assert images.grid == Grid(16, 24, 4)
    assert np.isnan(images[:0].top1)


def test_colours_are_rounded_to_nearest_and_clamped() -> None:
    values = torch.arange(256.0)
    for offset, expected in ((0.0, values), (0.49, values), (-0.49, values), (0.51, values + 1), (-0.51, values - 1)):
        pixels = ((values + offset) / 255).expand(3, 1, 256)
        got = to_uint8(pixels, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
        assert torch.equal(got[0, 0].float(), expected.clamp(0, 255)), offset
    odd = torch.tensor([float("nan"), float("inf"), -float("inf"), 1e30, -5.0]).expand(3, 1, 5)
    assert to_uint8(odd, MEAN, STD)[2, 0].tolist() == [0, 255, 0, 255, 0]


def test_colours_are_denormalised_channel_by_channel() -> None:
    colours = torch.randint(0, 256, (5, 3, 16, 24), generator=torch.Generator().manual_seed(3), dtype=torch.uint8)
    mean, std = (torch.tensor(c)[:, None, None] for c in (MEAN, STD))
    images = replace(make_images(), pixels=(colours / 255 - mean) / std)
    assert torch.equal(images.to_uint8(), colours)
