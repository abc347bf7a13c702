"""Replicates put together: means and deviations, and the curves of `transfer`, as in Figure 4 of the paper."""

import statistics
from dataclasses import dataclass
from pathlib import Path

from benchmarks.experiment import Row
from benchmarks.harness.tables import measured_on

AXES = {"images": "images", "seconds": "seconds to invert and train"}


def mean_and_deviation(values: list[float]) -> str:
    """In percent, and of how many; empty where there are none."""
    if not values:
        return ""
    mean = f"{statistics.mean(values) * 100:.2f}"
    return f"{mean} +- {statistics.stdev(values) * 100:.2f} ({len(values)})" if len(values) > 1 else f"{mean} (1)"


def measured_with(row: Row, images: str) -> str:
    """Where and with what a table of top-1 was measured; ``images``: how many it was judged on."""
    return (
        f"Teacher {row['teacher']}, top-1 in percent on {images} test images of {row['data']}; mean, deviation "
        f"and, in brackets, number of replicates. Inversions of {row['iterations']} iterations. {measured_on(row)}."
    )


@dataclass(frozen=True)
class Point:
    """Of a curve: means over the replicates at a number of images."""

    images: int
    seconds: float
    top1: float
    deviation: float  # of top-1


def points(rows: list[Row]) -> list[Point]:
    """The curve of one student and one kind of images, by number of images."""
    found = []
    for count in sorted({int(row["images"]) for row in rows}):
        some = [row for row in rows if int(row["images"]) == count]
        values = [float(row["top1"]) for row in some]
        seconds = statistics.mean(float(row["inversion_s"]) + float(row["training_s"]) for row in some)
        deviation = statistics.stdev(values) if len(values) > 1 else 0.0
        found.append(Point(count, seconds, statistics.mean(values), deviation))
    return found


def plot(rows: list[Row], path: Path) -> None:
    """A row of panels a student that learned from more than one number of images; a curve a kind of images."""
    from matplotlib.figure import Figure

    students = [
        name
        for name in dict.fromkeys(row["student"] for row in rows)
        if len({row["images"] for row in rows if row["student"] == name}) > 1
    ]
    figure = Figure(figsize=(9, 3.2 * len(students)), layout="constrained")
    for line, student in zip(figure.subplots(len(students), 2, squeeze=False), students, strict=True):
        for panel, axis in zip(line, AXES, strict=True):
            for kind in dict.fromkeys(row["kind"] for row in rows):
                curve = points([row for row in rows if (row["student"], row["kind"]) == (student, kind)])
                x, top1 = [getattr(point, axis) for point in curve], [point.top1 for point in curve]
                panel.errorbar(x, top1, [point.deviation for point in curve], marker="o", capsize=2, label=kind)
            panel.set(xlabel=AXES[axis], ylabel="top-1", title=f"student: {student}", xscale="log")
            if axis == "images":
                counts = sorted({int(row["images"]) for row in rows if row["student"] == student})
                panel.set_xticks(counts, counts, minor=False)
                panel.set_xticks([], minor=True)
    figure.axes[0].legend(fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
