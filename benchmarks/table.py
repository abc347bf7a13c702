"""The README's speed table, made from the CSV that ``benchmarks.engine`` writes.

python -m benchmarks.table --write
"""

import argparse
import csv
from pathlib import Path

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
RESULTS = ROOT / "benchmarks" / "results" / "engine-cpu-deit_tiny_patch16_224-b8.csv"
BEGIN, END = "<!-- speed table: python -m benchmarks.table --write -->\n", "<!-- end of speed table -->\n"
NAMES = {
    "published": "published loop",
    "tuned": "tuned eager",
    "eager": "ours, eager",
    "compiled": "**compiled**",
}


def markdown(path: Path = RESULTS) -> str:
    """The table with its caption; milliseconds are of one iteration on a batch."""
    with path.open() as file:
        rows = list(csv.DictReader(file))
    first = rows[0]
    lines = [
        f"{first['model']} geometry with random weights, batch {first['batch']}, {first['device_name']}, "
        f"torch {first['torch']}, commit {first['commit']}. Medians of {first['rounds']} rounds in which the systems "
        "took turns (20th to 80th percentile in brackets); the input gradients of all rows were compared first.",
        "",
        "| system | dtype | patches | ms an iteration | image-iterations/s | over published | peak memory |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        lines.append(
            f"| {NAMES[row['system']]} | {row['dtype']} | {row['patches']} | {row['ms_p50']} "
            f"({row['ms_p20']} to {row['ms_p80']}) | {row['image_iterations_per_s']} | "
            f"{row['speed_up_over_published_p50']}x | {row['peak_memory_mib']} MiB |"
        )
    return "\n".join(lines) + "\n"


def with_table(readme: str) -> str:
    """The README with the table between its two marks."""
    before, _, rest = readme.partition(BEGIN)
    _, _, after = rest.partition(END)
    return before + BEGIN + markdown() + END + after


def main() -> None:
    """Print the table, or write it into the README."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true")
    if parser.parse_args().write:
        README.write_text(with_table(README.read_text()))
    else:
        print(markdown(), end="")


if __name__ == "__main__":
    main()
