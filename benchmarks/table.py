"""The tables of measured figures in the README and in ``benchmarks/README.md``, made from the CSVs in ``results/``.

python -m benchmarks.table --write
"""

import argparse
from collections.abc import Callable
from pathlib import Path

from benchmarks.markdown import NOT_MEASURED, markdown, rows_of
from benchmarks.quality_tables import quantize_table, reach_table, transfer_table
from benchmarks.scaling import exponents
from benchmarks.techniques import WATERFALL

ROOT = Path(__file__).parent.parent
END = "<!-- end of table -->\n"
NAMES = {
    "published": "published loop",
    "tuned": "tuned eager",
    "eager": "ours, eager",
    "compiled": "**compiled**",
}
WAYS = ("eager", "compiled")


def engine_table() -> str:
    """One iteration of the engine beside the yard-stick; milliseconds are of one iteration on a batch."""
    rows = rows_of("engine-cpu-deit_tiny_patch16_224-b8.csv")
    first = rows[0]
    about = (
        f"{first['model']} geometry with random weights, batch {first['batch']}, {first['device_name']}, "
        f"torch {first['torch']}, commit {first['commit']}. Medians of {first['rounds']} rounds in which the systems "
        "took turns (20th to 80th percentile in brackets); the input gradients of all rows were compared first."
    )
    columns = ["system", "dtype", "patches", "ms an iteration", "image-iterations/s", "over published", "peak memory"]
    cells = []
    for row in rows:
        milliseconds = f"{row['ms_p50']} ({row['ms_p20']} to {row['ms_p80']})"
        rates = [row["image_iterations_per_s"], f"{row['speed_up_over_published_p50']}x"]
        what = [NAMES[row["system"]], row["dtype"], row["patches"]]
        cells.append([*what, milliseconds, *rates, f"{row['peak_memory_mib']} MiB"])
    return markdown(about, columns, cells)


def kernel_table(device: str) -> str:
    """Every op at the last stage and dense; microseconds are medians of one call."""
    rows = rows_of(f"kernels-{device}.csv")
    if not rows:
        return NOT_MEASURED
    first = rows[0]
    kept = {image: [int(row["kept"]) for row in rows if row["image"] == image] for image in {r["image"] for r in rows}}
    rows = [row for row in rows if int(row["kept"]) in (min(kept[row["image"]]), max(kept[row["image"]]))]
    rows = [row for row in rows if row["batch"] == first["batch"]]
    timed = any(row["triton_us_p50"] for row in rows)
    columns = ["op", "image/patch", "B", "K", "dtype", "least MB", "eager us", "compiled us"]
    columns += ["Triton us", "share of copy"] if timed else []
    about = (
        f"{first['device_name']}, torch {first['torch']}, triton {first['triton']}, commit {first['commit']}; a large "
        f"copy moves {first['copy_gb_per_s']} GB/s. Medians of {first['rounds']} rounds in which the systems took "
        "turns; results were compared first."
    )
    table = []
    for row in rows:
        cells = [row["op"], f"{row['image']}/{row['patch']}", row["batch"], row["kept"], row["dtype"]]
        cells += [f"{int(row['least_bytes']) / 1e6:.2f}", row["eager_us_p50"], row["compiled_us_p50"]]
        if timed:
            spread = f"{row['triton_us_p50']} ({row['triton_us_p20']} to {row['triton_us_p80']})"
            cells += [spread if row["triton_us_p50"] else "", row["share_of_copy"]]
        table.append([cell or "not measured" for cell in cells])
    return markdown(about, columns, table)


UNITS = {
    "sparsity": "kept patches",
    "batch": "images",
    "model": "million weights",
    "resolution": "pixels a side",
}


def scaling_table(device: str) -> str:
    """By axis: the exponent of the measured cost beside that of the FLOP count, and the rates at both ends."""
    rows = rows_of(f"scaling-{device}.csv")
    if not rows:
        return NOT_MEASURED
    first = rows[0]
    about = (
        f"{first['device_name']}, torch {first['torch']}, commit {first['commit']}; {first['impl']}, {first['dtype']}. "
        f"Medians of at least {min(int(row['rounds']) for row in rows)} rounds in which the points of an axis took "
        "turns; losses were checked first."
    )
    columns = ["axis", "from", "to", "points", "ms an iteration", "GFLOP/s", "measured exponent", "predicted"]
    table = []
    for axis, (measured, predicted) in exponents(rows).items():
        some = [row for row in rows if row["axis"] == axis]
        low, high = some[0], some[-1]
        ends = [f"{low[name]} to {high[name]}" for name in ("ms_p50", "true_gflop_per_s")]
        what = [axis, f"{low['value']} {UNITS[axis]}", high["value"], str(len(some))]
        table.append([*what, *ends, f"{measured:.2f}", f"{predicted:.2f}"])
    return markdown(about, columns, table)


def waterfall_table(name: str) -> str:
    """A row a technique; milliseconds are of one iteration of the stage on its batch."""
    rows = rows_of(f"waterfall-{name}.csv")
    if not rows:
        return NOT_MEASURED
    first = rows[0]
    count = sum(key.startswith("patches_") for key in first)
    stages = [f"ms at {first[f'patches_{index}']}" for index in range(count)]
    columns = ["row", "image-it/s", "over published", *stages, "share of matmul", "MiB", "compile s", "loss", "top-1"]
    about = (
        f"{first['model']}, {first['device_name']}, torch {first['torch']}, commit {first['commit']}; bf16 matrix "
        f"products reach {first['matmul_tflop_per_s']} TFLOP/s, a large copy {first['copy_gb_per_s']} GB/s. Batch "
        f"{first['batches'].split()[0]} a stage, in the row of batches {rows[-1]['batches']}. Medians of "
        f"{first['rounds']} rounds in which the rows took turns (20th to 80th percentile for the last stage); "
        "gradients were checked first. Loss and top-1: of a short inversion of the bundled teacher by the same means."
    )
    table = []
    for row in rows:
        times = [row[f"ms_{index}_p50"] for index in range(count)]
        times[-1] += f" ({row[f'ms_{count - 1}_p20']} to {row[f'ms_{count - 1}_p80']})"
        cells = [row["row"], row["image_iterations_per_s"], f"{row['over_published']}x", *times]
        cells += [f"{float(row['share_of_matmul']):.0%}", row["peak_memory_mib"], row["seconds_compile"]]
        table.append([*cells, row["final_loss"], row["teacher_top1"]])
    measured = {row["row"] for row in rows}
    missing = [technique.name for technique in WATERFALL if technique.name not in measured]
    note = f"\nNot measured here: {', '.join(missing)}.\n" if missing else ""
    return markdown(about, columns, table) + note


def quality_table(device: str) -> str:
    """Whether a fast path moves an image further than another seed does."""
    rows = rows_of(f"equal-quality-{device}.csv")
    if not rows:
        return NOT_MEASURED
    first = rows[0]
    about = (
        f"{first['images']} images of the bundled teacher, {first['iterations']} iterations, {first['device_name']}, "
        f"torch {first['torch']}, commit {first['commit']}."
    )
    table = []
    for row in rows:
        within = "yes" if row["within_seeds"] == "True" else "no"
        table.append([row["row"], row["top1"], row["loss"], row["overlap"], within])
    columns = ["path", "top-1", "loss", "overlap with the first row", "within what a seed changes"]
    return markdown(about, columns, table)


def int8_table(device: str) -> str:
    """Real low-bit execution beside float32 and bfloat16; milliseconds are of one forward of the batch."""
    rows = rows_of(f"int8-{device}.csv")
    if not rows:
        return NOT_MEASURED
    first = rows[0]
    about = (
        f"Batch {first['batch']}, {first['device_name']}, torch {first['torch']}, torchao {first['torchao']}, commit "
        f"{first['commit']}. Medians of {' and '.join(sorted({row['rounds'] for row in rows}))} rounds in which the "
        "rows of a model took turns (20th to 80th percentile in brackets); SQNR is that of the logits against float32."
    )
    columns = ["model", "tokens", "row", "ms a forward", "over fp32 eager", "over fp32 compiled", "SQNR dB", "file MB"]
    table = []
    for row in rows:
        ratios = [f"{row[f'over_fp32_{way}_p50']}x" if row[f"over_fp32_{way}_p50"] else "" for way in WAYS]
        cells = [row["model"], row["tokens"], f"{row['system']}, {row['way']}"]
        cells += [f"{row['ms_p50']} ({row['ms_p20']} to {row['ms_p80']})", *ratios, row["sqnr_db"]]
        table.append([*cells, f"{int(row['file_bytes']) / 1e6:.2f}"])
    return markdown(about, columns, table)


# by file: mark that a table stands behind, and what makes it
TABLES: dict[Path, dict[str, Callable[[], str]]] = {
    ROOT / "README.md": {"engine": engine_table},
    ROOT / "benchmarks" / "README.md": {
        "kernels on a GPU": lambda: kernel_table("cuda"),
        "references on a CPU": lambda: kernel_table("cpu"),
        "waterfall on a GPU": lambda: waterfall_table("cuda-deit_base_patch16_224-b64"),
        "waterfall on a CPU": lambda: waterfall_table("cpu-deit_tiny_patch16_224-b8"),
        "quality on a GPU": lambda: quality_table("cuda"),
        "quality on a CPU": lambda: quality_table("cpu"),
        "int8 on a GPU": lambda: int8_table("cuda"),
        "int8 on a CPU": lambda: int8_table("cpu"),
        "quantized models": quantize_table,
        "students": transfer_table,
        "images to match dense ones": reach_table,
        "scaling on a GPU": lambda: scaling_table("cuda"),
        "scaling on a CPU": lambda: scaling_table("cpu"),
    },
}


def with_tables(path: Path) -> str:
    """The text of a file, its tables made anew."""
    text = path.read_text()
    for name, make in TABLES[path].items():
        begin = f"<!-- table of {name}: python -m benchmarks.table --write -->\n"
        before, mark, rest = text.partition(begin)
        _, end, after = rest.partition(END)
        if not mark or not end:
            raise ValueError(f"{path}: the marks of the table of {name} are missing")
        text = before + begin + make() + END + after
    return text


def main() -> None:
    """Print the tables, or write them into their files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true")
    write = parser.parse_args().write
    for path, tables in TABLES.items():
        if write:
            path.write_text(with_tables(path))
        else:
            print(*(make() for make in tables.values()), sep="\n")


if __name__ == "__main__":
    main()
