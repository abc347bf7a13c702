"""What the result files say of a device: speed of whole steps, of products by their shape, and of copies.

The speed model takes these before any figure of its own, and shows a measured step beside its estimate.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.experiment import Row
from benchmarks.harness.models import DTYPES
from benchmarks.harness.results import ESTIMATE, read
from benchmarks.harness.timing import MATMUL_SIDE
from benchmarks.speed.parts import Bucket, Part, Product, linear_products

LINEAR = (Part.QKV, Part.PROJ, Part.FC1, Part.FC2)  # parts that are products alone
# experiments that time our step in one bucket: their columns of kept patches and milliseconds
STEPS = {"engine": ("patches", "ms_p50"), "scaling": ("kept", "ms_p50"), "profile": ("kept", "ms_alone")}
OUR_ROW = "+ CUDA graphs"  # of the waterfall: what the inverter runs by default


@dataclass(frozen=True)
class Rate:
    """A product's measured speed."""

    product: Product
    flops_per_s: float


@dataclass(frozen=True)
class StepTime:
    """A measured step of a bucket."""

    ms: float
    source: str  # experiment and row


class Measured:
    """The rows of a folder that were measured on one device.

    Args:
        folder: of the CSVs.
        device: part of the device's name, such as ``"H100"``.
    """

    def __init__(self, folder: Path, device: str) -> None:
        rows = [row for path in sorted(folder.glob("*.csv")) for row in read(path)]
        self.rows = [row for row in rows if device in row["device_name"] and row["device_name"] != ESTIMATE]

    def step(self, model: str, bucket: Bucket) -> StepTime | None:
        """The fastest time of our compiled step in this bucket, None where it was not measured."""
        found = [time for row in self.rows if row.get("model") == model for time in _steps(row, bucket)]
        return min(found, key=lambda time: time.ms, default=None)

    def copy(self) -> float | None:
        """Bytes per second of a large copy, the best there is."""
        return max((1e9 * float(row["copy_gb_per_s"]) for row in self.rows if row.get("copy_gb_per_s")), default=None)

    def rates(self, model: str, bucket: Bucket) -> list[Rate]:
        """Of products in the bucket's dtype: those of this model's profiles, and large square ones."""
        found = []
        for row in self.rows:
            if DTYPES["bf16"] == bucket.dtype and row.get("matmul_tflop_per_s"):
                found.append(Rate((MATMUL_SIDE,) * 3, 1e12 * float(row["matmul_tflop_per_s"])))
            if row["experiment"] == "profile" and row["model"] == model and _dtype_is(row, bucket):
                found += _profiled(row, bucket)
        return found


def _dtype_is(row: Row, bucket: Bucket) -> bool:
    return DTYPES.get(row.get("dtype", "")) == bucket.dtype


def _profiled(row: Row, bucket: Bucket) -> Iterator[Rate]:
    """The products of a line of a profile, which shares one rate between them."""
    if row["part"] not in LINEAR or not float(row["ms"]):
        return
    seen = replace(bucket, batch=int(row["batch"]), kept=int(row["kept"]))
    for product in {sizes for part, sizes in linear_products(seen) if part == row["part"]}:
        yield Rate(product, 1e9 * float(row["gflop_per_s"]))


def _steps(row: Row, bucket: Bucket) -> Iterator[StepTime]:
    """The step times of a row that are of this bucket."""
    source = f"{row['experiment']}, commit {row['commit']}"
    if not _dtype_is(row, bucket):
        return
    if row["experiment"] == "waterfall" and row["row"] == OUR_ROW:
        for index, batch in enumerate(row["batches"].split()):
            same = (int(batch), row[f"patches_{index}"]) == (bucket.batch, str(bucket.kept))
            if same and row[f"ms_{index}_p50"]:
                yield StepTime(float(row[f"ms_{index}_p50"]), source)
    elif row["experiment"] in STEPS:
        kept, ms = STEPS[row["experiment"]]
        side = str(bucket.shape.grid.height)
        compiled = "compiled" in (row.get("system"), row.get("impl"))
        if compiled and (row["batch"], row[kept], row.get("image", side)) == (
            str(bucket.batch),
            str(bucket.kept),
            side,
        ):
            yield StepTime(float(row[ms]), source)
