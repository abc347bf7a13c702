"""The tables of `benchmarks.quality`, made from its CSVs."""

import statistics

from benchmarks.markdown import Row, markdown, rows_of
from benchmarks.quality_plot import points

NOT_MEASURED = "Not measured yet.\n"
CALIBRATIONS = ("gaussian", "dense", "sparse", "real")


def spread(values: list[float]) -> str:
    """Mean and standard deviation in percent, and of how many."""
    if not values:
        return ""
    mean = f"{statistics.mean(values) * 100:.2f}"
    return f"{mean} +- {statistics.stdev(values) * 100:.2f} ({len(values)})" if len(values) > 1 else f"{mean} (1)"


def about(row: Row, images: str) -> str:
    """Where and with what a table was measured."""
    return (
        f"Teacher {row['teacher']}, top-1 in percent on {images} test images of {row['data']}; mean, deviation "
        f"and, in brackets, number of replicates. Inversions of {row['iterations']} iterations. {row['device_name']}, "
        f"torch {row['torch']}, commit {row['commit']}."
    )


def quantize_table() -> str:
    """Top-1 by scheme and bits, a column a calibration set."""
    rows = rows_of("quality-quantize-demo.csv")
    if not rows:
        return NOT_MEASURED
    full = [float(row["top1"]) for row in rows if row["scheme"] == "fp32"]
    table = []
    settings = dict.fromkeys((row["scheme"], row["weights"]) for row in rows if row["scheme"] != "fp32")
    for scheme, bits in settings:
        mine = [row for row in rows if (row["scheme"], row["weights"]) == (scheme, bits)]
        cells = [spread([float(row["top1"]) for row in mine if row["calibration"] == kind]) for kind in CALIBRATIONS]
        table.append([scheme, f"W{bits}/A8", *cells])
    heading = f"{about(rows[0], rows[0]['images'])} In float32: {spread(full)}."
    return markdown(heading, ["scheme", "bits", *CALIBRATIONS], table)


def transfer_table() -> str:
    """Top-1 of students by what they learned from, a column a number of images."""
    rows = rows_of("quality-transfer-demo.csv")
    if not rows:
        return NOT_MEASURED
    sizes = sorted({int(row["images"]) for row in rows})
    columns = ["student", "images", *(f"{size} images" for size in sizes), "same kind", "s an image to invert"]
    table = []
    for student, kind in groups(rows):
        mine = [row for row in rows if (row["student"], row["kind"]) == (student, kind)]
        cells = [spread([float(row["top1"]) for row in mine if int(row["images"]) == size]) for size in sizes]
        agreed = [float(row["same_kind"]) for row in mine if int(row["images"]) == sizes[-1] and row["same_kind"]]
        each = statistics.median(float(row["inversion_s"]) / int(row["images"]) for row in mine)
        agreed_cell = f"{statistics.mean(agreed) * 100:.0f}" if agreed else ""
        table.append([student, kind, *cells, agreed_cell, f"{each:.2f}" if each else ""])
    return markdown(about(rows[0], rows[0]["test_images"]), columns, table)


def groups(rows: list[Row]) -> list[tuple[str, str]]:
    """Students and kinds of images, in the order they were measured."""
    return [*dict.fromkeys((row["student"], row["kind"]) for row in rows)]


def reach_table() -> str:
    """As Table 5 of the paper: what each kind of images takes to be as good as the most dense ones."""
    rows = rows_of("quality-transfer-demo.csv")
    if not rows:
        return NOT_MEASURED
    table = []
    for student, kind in groups(rows):
        curves = {
            name: points([row for row in rows if (row["student"], row["kind"]) == (student, name)])
            for name in ("dense", kind)
        }
        if len(curves[kind]) < 2:
            continue
        aim = curves["dense"][-1].top1 - curves["dense"][-1].deviation
        there = next((point for point in curves[kind] if point.top1 >= aim), None)
        iterations = "" if kind not in ("dense", "sparse") else rows[0]["iterations"]
        cells = [str(there.images), iterations, f"{there.seconds:.0f}"] if there else ["not reached", "", ""]
        table.append([student, f"{aim * 100:.2f}", kind, *cells])
    heading = (
        "The fewest images of each kind that reach, replicates averaged, the top-1 of the most dense images less one "
        "standard deviation."
    )
    columns = ["student", "top-1 to reach", "kind", "images", "iterations each", "seconds to invert and train"]
    return markdown(heading, columns, table)
