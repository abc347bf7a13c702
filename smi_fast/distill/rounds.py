"""Where images come from while a student is trained, and the rounds of them on disk."""

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from smi_fast.checks import check_rules, count
from smi_fast.distill.checkpoint import saving
from smi_fast.images import SparseImages
from smi_fast.storage.files import write_json

Invert = Callable[[list[int], list[int]], SparseImages]


@dataclass(frozen=True)
class Alternating:
    """Invert some images, add them to the pool, train for some steps, and again, as the paper does.

    Raises:
        ValueError: a number below 1.
    """

    invert: Invert  # (labels, image ids) -> images, such as an `Inverter`
    images_per_round: int = 128
    steps_per_round: int = 100
    # what the images depend on besides the teacher, JSON-able; a resume with anything else is refused
    identity: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_rules(self, {name: count(getattr(self, name)) for name in ("images_per_round", "steps_per_round")})

    def request(self, number: int, classes: int) -> tuple[list[int], list[int]]:
        """Labels and image ids of a round: ids go on counting, and the classes take turns."""
        first = number * self.images_per_round
        ids = list(range(first, first + self.images_per_round))
        return [i % classes for i in ids], ids


class Rounds:
    """The images of each round, made once. With a folder, each round is stored, and read from there after a resume."""

    def __init__(self, source: Alternating, classes: int, folder: Path | None) -> None:
        self.source, self.classes, self.folder = source, classes, folder
        self.seconds: dict[int, float] = {}  # of the inversion, by round

    def stored(self, number: int) -> bool:
        """Need the round not be inverted any more?"""
        return self.folder is not None and self._path(self.folder, number).exists()

    def images(self, number: int) -> SparseImages:
        """The images of a round.

        Raises:
            OSError: they could not be stored.
            ValueError: a stored file is damaged.
        """
        if self.folder is not None and self.stored(number):
            return SparseImages.load(self._path(self.folder, number))
        begin = time.perf_counter()
        images = self.source.invert(*self.source.request(number, self.classes))
        self.seconds[number] = time.perf_counter() - begin
        if self.folder is not None:
            path = self._path(self.folder, number)
            with saving(path):
                # first, so that whatever is stored has its seconds
                write_json(path.with_suffix(".json"), {"seconds": self.seconds[number]}, overwrite=True)
                images.save(path)
        return images

    def seconds_until(self, rounds: int) -> float:
        """What the first rounds took to invert."""
        for number in range(rounds):
            if number not in self.seconds and self.folder is not None:
                entry = json.loads(self._path(self.folder, number).with_suffix(".json").read_text())
                self.seconds[number] = entry["seconds"]
        return sum(self.seconds[number] for number in range(rounds))

    @staticmethod
    def _path(folder: Path, number: int) -> Path:
        return folder / f"{number:06d}.safetensors"
