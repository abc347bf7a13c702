"""Where the time of one bucket's step goes: a table by part of the Vision Transformer, and one by kernel.

    python -m benchmarks run profile --device cpu --model deit_tiny_patch16_224 --batch 8 --kept 46 --impl compiled

Losses are checked before anything is timed: finite, and those of the eager step. Then torch's profiler looks at some
steps after a warm-up; on a GPU a kernel's time there counts, on a CPU an operation's own time. How an operation is
given to a part, and what counts as a part's work, is said in ``benchmarks/speed/parts.py``; the sum of the parts is
all that was measured. *Floor* is the longer of a part's FLOPs at the rate of a large matrix product and its least bytes
at the bandwidth of a large copy, both measured at the start of the same run; *gap* is what a part takes above it. It
may be negative on a CPU, where small tensors come out of the caches.

On CUDA the profiler looks at kernels that are launched one by one: within a captured graph it could not tell which
operation launched a kernel, and the parts are told by that. Only the kernels' own time counts there, not the host's.
The time of a step *without* the profiler, above the table, is of captured graphs, as the inverter runs them.
"""

import argparse
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch._inductor import config as inductor_config

from benchmarks.experiment import experiment
from benchmarks.harness.arguments import Parser, positive
from benchmarks.harness.engine import FixedStep
from benchmarks.harness.models import DTYPES, build_model, fixed_keep, grid_of, paper_kept
from benchmarks.harness.results import Results, provenance
from benchmarks.harness.tables import measured_on
from benchmarks.harness.timing import copy_bandwidth, matmul_rate
from benchmarks.speed.calls import Call, record
from benchmarks.speed.parts import Attribution, Bucket, Part, Work, work_of_parts
from smi_fast.config import InversionConfig
from smi_fast.model.sparse_vit import SparseViT


@dataclass(frozen=True)
class Ceilings:
    """What the device reached at the start of the run."""

    flops_per_s: float  # of a large product in the compute dtype
    exact_flops_per_s: float  # and in float32, which the head computes in
    bytes_per_s: float  # of a large copy, read and written

    def floor(self, part: Part, work: Work) -> tuple[float, str]:
        """Milliseconds a part must take, and what binds it."""
        rate = self.exact_flops_per_s if part is Part.HEAD else self.flops_per_s
        compute, memory = work.flops / rate * 1e3, work.bytes / self.bytes_per_s * 1e3
        return (compute, "FLOPs") if compute > memory else (memory, "bytes")


@dataclass(frozen=True)
class Line:
    """One part's row of the table; times in milliseconds per step."""

    part: Part
    calls: float
    ms: float
    share: float
    work: Work
    floor_ms: float
    bound: str  # "FLOPs" or "bytes"

    @property
    def gap_ms(self) -> float:
        """Above the floor."""
        return self.ms - self.floor_ms

    def row(self) -> dict[str, Any]:
        """Of the CSV."""
        seconds = max(self.ms, 1e-9) / 1e3
        return {
            "part": str(self.part),
            "calls": round(self.calls, 1),
            "ms": round(self.ms, 4),
            "share": round(self.share, 4),
            "gflop": round(self.work.flops / 1e9, 4),
            "mb": round(self.work.bytes / 1e6, 3),
            "gflop_per_s": round(self.work.flops / seconds / 1e9, 1),
            "gb_per_s": round(self.work.bytes / seconds / 1e9, 1),
            "floor_ms": round(self.floor_ms, 4),
            "gap_ms": round(self.gap_ms, 4),
            "bound": self.bound,
        }


def measure_ceilings(device: str, dtype: torch.dtype) -> Ceilings:
    """Takes a few seconds at most."""
    exact = matmul_rate(device, torch.float32)
    rate = exact if dtype == torch.float32 else matmul_rate(device, dtype)
    return Ceilings(rate, exact, copy_bandwidth(device))


def prepare(model: SparseViT, batch: int, kept: int, impl: str) -> FixedStep:
    """A checked step; compiled CPU kernels are made to tell the profiler their names."""
    keep = fixed_keep(batch, model.grid.patches, kept)
    with inductor_config.patch({"cpp.enable_kernel_profile": True}):
        step = FixedStep(model, InversionConfig(), keep, impl)
    return step.check()


def table_of(calls: list[Call], attribution: Attribution, steps: int, ceilings: Ceilings) -> list[Line]:
    """One line a part; their times add up to that of all calls."""
    part_of = {call: attribution.part_of(call) for call in calls}
    on_gpu = any(call.kernel for call in calls)
    us: dict[Part, float] = defaultdict(float)
    count = Counter[Part]()
    for call, part in part_of.items():
        us[part] += call.us
        # on a CPU, an operation inside another of its part is no call of its own
        outermost = call.parent is None or part_of[call.parent] is not part
        count[part] += call.kernel if on_gpu else outermost
    total, work, lines = sum(us.values()), work_of_parts(attribution.bucket), []
    for part in Part:
        floor, bound = ceilings.floor(part, work[part])
        ms = us[part] / steps / 1e3
        lines.append(Line(part, count[part] / steps, ms, us[part] / total, work[part], floor, bound))
    return lines


def show(lines: list[Line]) -> None:
    """The table of the parts, and its sum."""
    rows = [line.row() for line in lines]
    names = [name for name in rows[0] if name != "bound"]
    total = {name: sum(row[name] for row in rows) for name in ("calls", "ms", "share", "gflop", "mb")}
    print(f"{'part':24s}" + "".join(f"{name:>12s}" for name in names[1:]))
    for row in rows:
        print(f"{row['part']:24s}" + "".join(f"{row[name]:12,.3f}" for name in names[1:]))
    print(f"{'sum':24s}" + "".join(f"{value:12,.3f}" for value in total.values()), end="\n\n")


def largest_gaps(lines: Iterable[Line]) -> list[str]:
    """The three parts furthest above their floors, in words."""
    found = []
    for line in sorted(lines, key=lambda line: -line.gap_ms)[:3]:
        floor = f"above its floor of {line.floor_ms:.3f} ms, which its {line.bound} set"
        where = f"{line.gap_ms:.3f} ms {floor}" if line.floor_ms else "which has no floor"
        found.append(f"{line.part}: {line.ms:.3f} ms per step ({line.share:.0%}), {where}")
    return found


def kernel_table(calls: list[Call], attribution: Attribution, steps: int, top: int = 25) -> str:
    """The kernels or operations of the longest own time, with the parts they were given to."""
    us: dict[str, float] = defaultdict(float)
    count, parts = Counter[str](), defaultdict(set)
    for call in calls:
        if call.us:
            us[call.name] += call.us
            count[call.name] += 1
            parts[call.name].add(str(attribution.part_of(call)))
    total = sum(us.values())
    lines = [f"{'ms per step':>10} {'share':>6} {'calls':>7}  kernel [parts]"]
    for name in sorted(us, key=lambda name: -us[name])[:top]:
        ms, calls_a_step = us[name] / steps / 1e3, count[name] / steps
        where = "; ".join(sorted(parts[name]))
        lines.append(f"{ms:10.3f} {us[name] / total:6.1%} {calls_a_step:7.1f}  {name[:120]} [{where}]")
    return "\n".join(lines)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = Parser("profile", __doc__)
    for name in ("device", "model", "batch"):
        parser.share(name)
    parser.add_argument(
        "--kept", type=positive, default=None, help="patches per image; the paper's last stage if unset"
    )
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="bf16")
    parser.add_argument("--impl", choices=("eager", "compiled"), default="compiled")
    parser.share("steps", default=10, help="that are looked at")
    parser.share("threads")
    parser.share("out", help="a CSV with a row for each part")
    args = parser.parse(arguments)
    patches = grid_of(args.model).patches
    args.kept = args.kept or paper_kept(patches)[-1]
    if args.kept > patches:
        parser.error(f"argument --kept: {args.kept}: {args.model} has {patches} patches")
    return args


@experiment("profile", "where the time of one bucket's step goes, by part of the ViT and by kernel, beside floors")
def main(arguments: Sequence[str]) -> None:
    """Check, measure, print, write."""
    args = parse(arguments)
    dtype = DTYPES[args.dtype]
    ceilings = measure_ceilings(args.device, dtype)
    model = build_model(args.model, args.device, dtype)
    fixed = prepare(model, args.batch, args.kept, args.impl)
    print(
        f"{args.model}, batch {args.batch}, {args.kept} patches, {args.dtype}, {args.impl}; "
        f"{measured_on(provenance(args.device))}\n"
        f"ceilings: {ceilings.flops_per_s / 1e9:,.0f} GFLOP/s ({args.dtype}), "
        f"{ceilings.exact_flops_per_s / 1e9:,.0f} (fp32), {ceilings.bytes_per_s / 1e9:,.1f} GB/s copied"
    )
    calls = record(fixed.step, args.device, args.steps)
    fixed.seconds(1)  # on CUDA the first one captures
    alone = 1e3 * statistics.median(fixed.seconds(1) for _ in range(args.steps))
    attribution = Attribution(Bucket(model.shape, args.batch, args.kept, dtype), calls, args.steps)
    lines = table_of(calls, attribution, args.steps, ceilings)
    total = sum(line.ms for line in lines)
    if args.out:
        setting = {name: getattr(args, name) for name in ("model", "batch", "kept", "dtype", "impl", "steps")}
        results = Results(args.out, "profile", args.device)
        for line in lines:
            results.append(line.row() | {"ms_alone": round(alone, 3)} | setting, fixed.config)
    print(f"a step takes {alone:.3f} ms, and {total:.3f} ms of {args.device} time under the profiler\n")
    show(lines)
    print("largest gaps:", *largest_gaps(lines), sep="\n  ", end="\n\n")
    print(kernel_table(calls, attribution, args.steps))
