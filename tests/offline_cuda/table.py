"""One step as a table: how often which kernel, with what registers and bytes; waits, allocations and memory.

Numbers that inductor appends to the names of its kernels are left out, and rows are sorted, so that the same code gives
the same table.
"""

import re
import subprocess
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import mean

import torch
import triton

from tests.offline_cuda.checks import ALLOCATIONS
from tests.offline_cuda.inductor import Watched, Work
from tests.offline_cuda.recorder import UNKNOWN, Memory, Row

MB, MIB = 1e6, 2**20
LONGEST_NAME = 100
POINTWISE = re.compile("norm_|hidden_|triton_")
# what the demangled name of a kernel has and a reader does not need
NOISE = r"\(anonymous namespace\)::|at::native::|pytorch_flash::|cutlass::|std::|\bvoid "


@dataclass(frozen=True)
class Kernel:
    """A row of the table; kernels that differ in nothing of this are one."""

    name: str
    registers: int
    spilled: int
    bytes: int  # moved by a launch, ours a mean over the step; `UNKNOWN` for kernels of libraries


@dataclass(frozen=True, order=True)
class Product:
    """A row of the table of products."""

    name: str
    m: int
    n: int
    k: int
    batch: int

    @property
    def flops(self) -> int:
        """Of one call."""
        return 2 * self.m * self.n * self.k * self.batch


def table_of(title: str, rows: Sequence[Row], watched: Watched, memory: Memory) -> str:
    """A page of Markdown.

    Args:
        title: what was run.
        rows: of one step.
        watched: what inductor wrote for it.
        memory: of the bucket.
    """
    kernels, products = kernels_of(rows, watched), products_of(rows)
    own = [work for works in own_work(rows, watched).values() for work in works if work.flops]
    versions = f"torch {torch.__version__.partition('+')[0]}, Triton {triton.__version__}, sm_90"
    parts = [f"# {title}", versions + ".", _summary(rows, kernels, memory, own), _kernels(kernels), _products(products)]
    return "\n\n".join(parts) + "\n"


def kernels_of(rows: Iterable[Row], watched: Watched) -> Counter[Kernel]:
    """The kernels of some rows, with the number of their launches."""
    launched = [row for row in rows if row.kind == "KERNEL"]
    moved = watched.bytes | {
        name: round(mean(each.bytes for each in works)) for name, works in own_work(rows, watched).items()
    }
    short = short_names({row.name for row in launched} - set(watched.bytes))
    return Counter(
        Kernel(
            short.get(row.name) or re.sub(r"_\d+$", "", row.name),
            row.registers,
            row.spilled,
            moved.get(row.name, UNKNOWN),
        )
        for row in launched
    )


def own_work(rows: Iterable[Row], watched: Watched) -> dict[str, list[Work]]:
    """What the launches of our own kernels in a step do, by name; every step launches the same."""
    times = Counter(row.name for row in rows if row.kind == "KERNEL")
    return {name: works[-times[name] :] for name, works in watched.launched.items() if times[name]}


def products_of(rows: Iterable[Row]) -> Counter[Product]:
    """The matrix products."""
    return Counter(Product(row.name, row.m, row.n, row.k, row.batch) for row in rows if row.kind == "PRODUCT")


def short_names(names: Iterable[str]) -> dict[str, str]:
    """Readable names of kernels that libraries bring."""
    ordered = sorted(names)
    plain = subprocess.run(["c++filt"], input="\n".join(ordered), capture_output=True, text=True, check=True).stdout
    return {
        name: re.sub(NOISE, "", text)[:LONGEST_NAME] for name, text in zip(ordered, plain.splitlines(), strict=True)
    }


def _summary(rows: Sequence[Row], kernels: Counter[Kernel], memory: Memory, own: Sequence[Work]) -> str:
    """The first table, by which a step is judged; ``own``: our kernels that are products."""
    work = Counter(row.kind for row in rows if row.is_work)
    flops = sum(times * product.flops for product, times in products_of(rows).items()) + sum(one.flops for one in own)
    known = {kernel: times * kernel.bytes for kernel, times in kernels.items() if kernel.bytes != UNKNOWN}
    pointwise = sum(moved for kernel, moved in known.items() if POINTWISE.match(kernel.name))
    numbers = {
        "launches": work.total(),
        "launches of kernels": work["KERNEL"],
        "distinct kernels": len(kernels),
        "products": work["PRODUCT"] + len(own),
        "products in kernels of ours": len(own),
        "copies and fills": work["COPY"] + work["FILL"],
        "TFLOP in products": f"{flops / 1e12:.3f}",
        "MB moved, operands of products left out": f"{sum(known.values()) / MB:.0f}",
        "MB of it by norms, residuals, GELU and inductor": f"{pointwise / MB:.0f}",
        "largest number of registers": max(kernel.registers for kernel in kernels),
        "bytes spilled": sum(max(kernel.spilled, 0) for kernel in kernels),
        "waits": sum(row.kind == "WAIT" for row in rows),
        "allocations": sum(row.kind in ALLOCATIONS for row in rows),
        "MiB that the bucket holds": f"{memory.allocated / MIB:.0f}",
        "MiB of it in the buffers of its state": f"{memory.buffers / MIB:.0f}",
        "MiB that its capture takes": f"{memory.pool / MIB:.0f}",
    }
    return "\n".join(
        ["| of a step | |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in numbers.items())]
    )


def _kernels(kernels: Counter[Kernel]) -> str:
    lines = ["| kernel | times | registers | spilled | MB each | MB |", "| --- | --- | --- | --- | --- | --- |"]
    for kernel, times in sorted(kernels.items(), key=lambda item: (-item[1] * item[0].bytes, item[0].name, item[1])):
        known = [str(value) if value != UNKNOWN else "" for value in (kernel.registers, kernel.spilled)]
        each = "" if kernel.bytes == UNKNOWN else f"{kernel.bytes / MB:.2f}"
        whole = "" if kernel.bytes == UNKNOWN else f"{kernel.bytes * times / MB:.1f}"
        lines.append(f"| {' | '.join([f'`{kernel.name}`', str(times), *known, each, whole])} |")
    return "\n".join(lines)


def _products(products: Counter[Product]) -> str:
    lines = ["| product | m | n | k | batch | times | GFLOP |", "| --- | --- | --- | --- | --- | --- | --- |"]
    for product, times in sorted(products.items(), key=lambda item: (-item[1] * item[0].flops, item[0])):
        shape = f"{product.m} | {product.n} | {product.k} | {product.batch}"
        lines.append(f"| {product.name} | {shape} | {times} | {times * product.flops / 1e9:.1f} |")
    return "\n".join(lines)
