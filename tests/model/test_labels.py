"""Labels as a user writes them."""

from typing import Any

import pytest
import torch

from smi_fast.model import ModelInfo, load_model
from smi_fast.model.labels import label_name, parse_labels

ANIMALS = ModelInfo(
    name="animals",
    sha256="",
    mean=(0.0, 0.0, 0.0),
    std=(1.0, 1.0, 1.0),
    class_names=(
        "cat, house cat",
        "Dog",
        "crane, bird",
        "crane",
        "tiger cat, cat",
        "panther, big cat",
        "puma, big cat",
    ),
)
COUNT = 7
NAMELESS = ModelInfo(name="nameless", sha256="", mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))


@pytest.mark.parametrize(
    ("labels", "indices"),
    [
        ("all", list(range(COUNT))),
        (" ALL ", list(range(COUNT))),
        ("3,5", [3, 5]),
        ("5", [5]),
        ("dog, 2 ,CAT", [1, 2, 0]),
        ([3, "1", "dog", 3], [3, 1, 1, 3]),
        (torch.tensor([4, 2]), [4, 2]),
        ("crane", [3]),  # the whole name of one class, the first synonym of another
        ("tiger cat", [4]),
        ("bird", [2]),  # a later synonym of one class alone
        ("cat, house cat", [0]),  # a whole name with a comma
        (["Tiger Cat, cat", "house cat"], [4, 0]),
    ],
)
def test_labels(labels: Any, indices: list[int]) -> None:
    assert parse_labels(labels, ANIMALS, COUNT) == indices


@pytest.mark.parametrize(
    ("labels", "info", "message"),
    [
        ("big cat", ANIMALS, r"label='big cat': fits several classes .*: 5 'panther, big cat'; 6 'puma, big cat'"),
        ("dgo", ANIMALS, "label='dgo': no class of 'animals'; did you mean 1 'dog'"),
        ("zzz", ANIMALS, "label='zzz': no class of 'animals'$"),
        ("7", ANIMALS, r"label='7': model 'animals' has classes 0\.\.6"),
        ([-1], ANIMALS, r"label=-1: model 'animals' has classes 0\.\.6"),
        ("-1", ANIMALS, r"label='-1': model 'animals' has classes 0\.\.6"),
        ([1.0], ANIMALS, "label=1.0: must be a class index or name, not a float"),
        ([None], ANIMALS, "label=None: must be"),
        ([True], ANIMALS, "label=True: must be"),
        ("", ANIMALS, "label='': an empty label"),
        ("1,,2", ANIMALS, "label='': an empty label"),
        ([], ANIMALS, r"labels=\[\]: must hold at least one label"),
        ("dog", NAMELESS, "label='dog': model 'nameless' has no class names"),
    ],
)
def test_label_refused(labels: Any, info: ModelInfo, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_labels(labels, info, COUNT)


def test_label_names() -> None:
    assert [label_name(index, ANIMALS) for index in (1, 3)] == ["Dog", "crane"]
    assert label_name(3, NAMELESS) == "3"
    assert parse_labels(list(ANIMALS.class_names or ()), ANIMALS, COUNT) == list(range(COUNT))


def test_imagenet_name_of_two_classes() -> None:
    info = load_model("deit_tiny_patch16_224", pretrained=False, img_size=16).info
    with pytest.raises(ValueError, match=r"label='crane': fits several classes .*: 134 'crane'; 517 'crane'"):
        parse_labels("crane", info, 1000)
