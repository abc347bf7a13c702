"""Class labels as people write them, to class indices."""

import operator
import re
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from typing import SupportsIndex

from smi_fast.model.spec import ModelInfo


def parse_labels(labels: str | Sequence[int | str], info: ModelInfo, num_classes: int) -> list[int]:
    """Class indices from "all", "3,5", "cat,dog", or a list of indices, digit strings and names.

    A name is matched without regard to case: against the whole name of a class, else against its first synonym
    ("tench" of "tench, Tinca tinca"), else against any of its synonyms.

    Args:
        labels: what the user gave; repeated labels stay repeated.
        info: of the model, for its class names.
        num_classes: ``C``.

    Returns:
        Indices in ``0..C-1``, in the order given.

    Raises:
        ValueError: no label, an index out of range, or a name that is unknown or fits several classes.
    """
    if isinstance(labels, str):
        if labels.strip().casefold() == "all":
            return list(range(num_classes))
        # a class name may hold a comma itself
        whole = labels.strip().casefold() in map(str.casefold, info.class_names or ())
        labels = [labels] if whole else labels.split(",")
    if not len(labels):
        raise ValueError(f"labels={labels!r}: must hold at least one label")
    return [_parse(label, info, num_classes) for label in labels]


def label_name(index: int, info: ModelInfo) -> str:
    """The name of a class, or its index as text for a model without class names."""
    return str(index) if info.class_names is None else info.class_names[index]


def _parse(label: int | str, info: ModelInfo, num_classes: int) -> int:
    if isinstance(label, str) and not re.fullmatch(r"[+-]?\d+", label.strip()):
        return _find(label, info)
    if isinstance(label, bool) or not isinstance(label, str | SupportsIndex):
        raise ValueError(f"label={label!r}: must be a class index or name, not a {type(label).__name__}")
    index = int(label) if isinstance(label, str) else operator.index(label)
    if not 0 <= index < num_classes:
        raise ValueError(f"label={label!r}: model {info.name!r} has classes 0..{num_classes - 1}")
    return index


def _synonyms(name: str) -> list[str]:
    return [part.strip().casefold() for part in name.split(",")]


# from strict to loose: the first rule that any class fulfils decides
_RULES: tuple[Callable[[str, str], bool], ...] = (
    lambda wanted, name: wanted == name.casefold(),
    lambda wanted, name: wanted == _synonyms(name)[0],
    lambda wanted, name: wanted in _synonyms(name),
)


def _find(label: str, info: ModelInfo) -> int:
    wanted = label.strip().casefold()
    if not wanted:
        raise ValueError(f"label={label!r}: an empty label")
    if info.class_names is None:
        raise ValueError(f"label={label!r}: model {info.name!r} has no class names, give class indices")
    for fits in _RULES:
        hits = [index for index, name in enumerate(info.class_names) if fits(wanted, name)]
        if len(hits) == 1:
            return hits[0]
        if hits:
            several = "; ".join(f"{index} {info.class_names[index]!r}" for index in hits)
            raise ValueError(f"label={label!r}: fits several classes of {info.name!r}, give the index: {several}")
    known = {synonym: index for index, name in enumerate(info.class_names) for synonym in _synonyms(name)}
    close = "; ".join(f"{known[match]} {match!r}" for match in get_close_matches(wanted, known))
    raise ValueError(f"label={label!r}: no class of {info.name!r}" + (f"; did you mean {close}?" if close else ""))
