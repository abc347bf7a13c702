"""Real low-bit execution beside float32: one forward of a batch, eager and compiled, and what it costs in accuracy.

    python -m benchmarks run int8
    python -m benchmarks run int8 --device cuda

All systems live in one process and take turns for a number of rounds. Before anything is timed, the logits of each are
held against the eager float32 model's. Dynamic and static int8 and, on devices that have it, fp8 run through torchao;
nothing here is simulated.
"""

import argparse
import copy
import time
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.experiment import Row, experiment, table
from benchmarks.harness.arguments import Parser, model_name
from benchmarks.harness.models import build_model
from benchmarks.harness.results import RESULTS, Results
from benchmarks.harness.tables import markdown, measured_on
from benchmarks.harness.timing import median_ratio, seconds_each, spread, take_turns
from smi_fast.model import load_model
from smi_fast.model.sparse_vit import SparseViT
from smi_fast.quantize.execute import MODES, LowBitViT, float32_bytes, low_bit_bytes, to_low_bit, why_not_real
from smi_fast.quantize.forward import forward_sites
from smi_fast.quantize.measure import Forward, compiled, signal_to_noise
from smi_fast.storage.environment import versions

MODELS = ("demo", "deit_tiny_patch16_224")
WAYS = ("eager", "compiled")
# of logits, in decibels: an error of a tenth; 8 bits on images like the calibration's leave less
LEAST_SQNR = 20.0


def load(name: str, device: str) -> SparseViT:
    """The bundled teacher, or a model of timm's geometry with random weights."""
    if name == "demo":
        return load_model(name, device=device)
    return build_model(name, device, torch.float32)


def plain(model: SparseViT) -> Forward:
    """The forward of a model that is not quantized."""
    return lambda pixels, keep: forward_sites(model, pixels, keep)


def systems_of(model: SparseViT, pixels: Tensor) -> dict[str, Forward]:
    """By name: the eager systems, with float32 first."""
    found: dict[str, Forward] = {"fp32": plain(model), "bf16": plain(copy.deepcopy(model).with_dtype(torch.bfloat16))}
    for mode in MODES:
        if reason := why_not_real(mode, model.device):
            print(f"{mode}: not measured, {reason}")
            continue
        found[mode] = to_low_bit(model, mode, [(pixels, None)])
    return found


def compile_all(eager: dict[str, Forward], pixels: Tensor) -> tuple[dict[str, Forward], dict[str, float]]:
    """The systems compiled, those that cannot be left out, and the seconds of each compilation."""
    found, seconds = {}, {}
    for name, forward in eager.items():
        torch._dynamo.reset()
        begin = time.perf_counter()
        run = compiled(forward, pixels.device)
        try:
            run(pixels, None)
        except Exception as error:  # a compiler that cannot is a result, whatever it raises
            print(f"{name} compiled: not measured, {type(error).__name__}: {str(error).strip().splitlines()[0]}")
            continue
        found[name], seconds[name] = run, time.perf_counter() - begin
        print(f"{name}: compiled in {seconds[name]:.0f} s", flush=True)
    return found, seconds


def bytes_of(name: str, forward: Forward, model: SparseViT) -> int:
    """Of the file that holds a system's weights."""
    if isinstance(forward, LowBitViT):
        return len(low_bit_bytes(forward))
    return len(float32_bytes(model)) // (2 if name == "bf16" else 1)


@torch.no_grad()
def measure(name: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows of one model.

    Raises:
        AssertionError: a system's logits are too far from float32.
    """
    model = load(name, args.device)
    draw = torch.Generator().manual_seed(0)
    pixels = torch.randn(args.batch, 3, model.grid.height, model.grid.width, generator=draw).to(args.device)
    eager = systems_of(model, pixels)
    fast, seconds_compile = compile_all(eager, pixels)
    systems = {(n, "eager"): f for n, f in eager.items()} | {(n, "compiled"): f for n, f in fast.items()}
    truth = forward_sites(model, pixels)
    sqnr = {key: signal_to_noise(forward(pixels, None), truth) for key, forward in systems.items()}
    for (system, way), value in sqnr.items():
        assert value > LEAST_SQNR, f"{system} {way}: logits of {name} have {value:.1f} dB, at least {LEAST_SQNR}"
    clocks = {
        key: lambda forward=forward: seconds_each(lambda: forward(pixels, None), 1, args.device)
        for key, forward in systems.items()
    }
    seconds = take_turns(clocks, args.rounds)
    rows = []
    for (system, way), value in sqnr.items():
        figures = {
            "model": name,
            "tokens": model.grid.patches + model.shape.prefix,
            "batch": args.batch,
            "system": system,
            "way": way,
            **speed_of((system, way), seconds),
            "sqnr_db": round(value, 1) if value < float("inf") else "",
            "file_bytes": bytes_of(system, eager[system], model),
            "seconds_compile": round(seconds_compile[system], 1) if way == "compiled" else "",
            "rounds": args.rounds,
        }
        rows.append(figures | {"torchao": versions().get("torchao", "")})
        print(*figures.values(), flush=True)
    return rows


def speed_of(system: tuple[str, str], seconds: dict[tuple[str, str], list[float]]) -> dict[str, Any]:
    """Milliseconds of a forward, and the median of its ratios to float32, round by round."""
    found: dict[str, Any] = dict(spread(seconds[system], 1e3, 1))
    for way in WAYS:
        base = seconds.get(("fp32", way))
        found[f"over_fp32_{way}_p50"] = round(median_ratio(base, seconds[system]), 2) if base else ""
    return found


@experiment("int8", "real 8-bit execution beside float32 and bfloat16: one forward, and what it costs in accuracy")
def main(arguments: Sequence[str]) -> None:
    """Parse, measure, write."""
    parser = Parser("int8", __doc__)
    parser.share("device")
    parser.add_argument("--models", type=lambda text: text if text == "demo" else model_name(text), nargs="+")
    parser.share("batch", default=64)
    parser.share("rounds", default=7)
    parser.share("out")
    args = parser.parse(arguments)
    # torchao's tensors do not say how they are hashed: a graph is then not kept on disk
    warnings.filterwarnings("ignore", message=".*_stable_hash_for_caching")
    results = Results(args.out or RESULTS / f"int8-{args.device.partition(':')[0]}.csv", "int8", args.device)
    for name in args.models or MODELS:
        for row in measure(name, args):
            results.append(row)


@table("int8 on a GPU", "int8-cuda.csv")
@table("int8 on a CPU", "int8-cpu.csv")
def int8_table(rows: list[Row]) -> str:
    """Real low-bit execution beside float32 and bfloat16; milliseconds are of one forward of the batch."""
    first = rows[0]
    about = (
        f"Batch {first['batch']}, {measured_on(first, 'torchao')}. "
        f"Medians of {' and '.join(sorted({row['rounds'] for row in rows}))} rounds in which the "
        "rows of a model took turns (20th to 80th percentile in brackets); SQNR is that of the logits against float32."
    )
    columns = [
        "model",
        "tokens",
        "row",
        "ms per forward",
        "over fp32 eager",
        "over fp32 compiled",
        "SQNR dB",
        "file MB",
    ]
    lines = []
    for row in rows:
        ratios = [f"{row[f'over_fp32_{way}_p50']}x" if row[f"over_fp32_{way}_p50"] else "" for way in WAYS]
        cells = [row["model"], row["tokens"], f"{row['system']}, {row['way']}"]
        cells += [f"{row['ms_p50']} ({row['ms_p20']} to {row['ms_p80']})", *ratios, row["sqnr_db"]]
        lines.append([*cells, f"{int(row['file_bytes']) / 1e6:.2f}"])
    return markdown(about, columns, lines)
