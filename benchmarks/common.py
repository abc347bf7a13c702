"""What the benchmarks share: models and states to time, the device's ceilings, and how rows are written."""

import argparse
import csv
import json
import statistics
import subprocess
import time
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from smi_fast.config import PAPER_STOPS, InversionConfig
from smi_fast.engine.compiler import compile_step
from smi_fast.engine.state import State, new_state, stop_patches
from smi_fast.engine.step import build_step
from smi_fast.kernels.common.grid import Grid
from smi_fast.model.checkpoint import read_state_dict
from smi_fast.model.from_timm import from_timm
from smi_fast.model.sparse_vit import SparseViT
from smi_fast.model.spec import ModelInfo
from smi_fast.priors import priors_of
from smi_fast.schedule import plan_stages
from smi_fast.storage.environment import device_name, versions

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
RESULTS = Path(__file__).parent / "results"
Run = Callable[[State], None]


def build_vit(name: str, device: str, image: int | None = None) -> Any:
    """A timm model with the same random weights in every process; ``image``: its side, None for the model's own."""
    torch.manual_seed(0)
    options: dict[str, Any] = {} if image is None else {"img_size": image}
    return timm.create_model(name, **options).eval().to(device)


def demo_vit(device: str) -> tuple[VisionTransformer, list[float], list[float]]:
    """The bundled teacher as timm's own model, with the mean and deviation of its colours."""
    with resources.as_file(resources.files("smi_fast.model") / "assets") as assets:
        facts = json.loads((assets / "demo.json").read_text())
        weights = read_state_dict(assets / "demo.safetensors")
    vit = VisionTransformer(**facts["architecture"])
    vit.load_state_dict(weights)
    return vit.eval().to(device), facts["mean"], facts["std"]


def build_model(name: str, device: str, dtype: torch.dtype, image: int | None = None) -> SparseViT:
    """The `SparseViT` of `build_vit`."""
    return from_timm(build_vit(name, device, image), ModelInfo(name, "", MEAN, STD)).with_dtype(dtype)


def grid_of(name: str) -> Grid:
    """The patch grid of a timm model; its weights are not made."""
    with torch.device("meta"):
        embed: Any = timm.create_model(name).patch_embed
    height, width = embed.img_size
    return Grid(height, width, embed.patch_size[0])


def paper_kept(patches: int) -> list[int]:
    """Kept patches of the paper's stages, all of them first."""
    return [stage.kept for stage in plan_stages(patches, PAPER_STOPS, 4000)]


def fixed_keep(batch: int, patches: int, kept: int) -> Tensor:
    """``[B, kept]`` ascending ids, the same in every process."""
    generator = torch.Generator().manual_seed(kept)
    rows = [torch.randperm(patches, generator=generator)[:kept].sort().values for _ in range(batch)]
    return torch.stack(rows)


def state_at(model: SparseViT, config: InversionConfig, keep: Tensor) -> State:
    """A fresh state as a stop leaves it that keeps ``keep [B, K]``; image ``b`` has label ``b`` (mod the classes)."""
    keep = keep.to(model.device)
    images = range(len(keep))
    state = new_state(model, config, [b % model.shape.num_classes for b in images], images, len(priors_of(config)))
    if keep.shape[1] < model.grid.patches:
        state.scores.scatter_(1, keep, 1.0)
        state = stop_patches(state, keep.shape[1], config.rules.stop_updates)
    return state


def make_step(model: SparseViT, config: InversionConfig, state: State, impl: str) -> Run:
    """The step of a configuration, for the shapes of ``state`` where ``impl`` is "compiled"."""
    step = build_step(model, config, priors_of(config))
    return compile_step(step, state) if impl == "compiled" else step


@torch.no_grad()
def check_step(model: SparseViT, config: InversionConfig, state: State, run: Run) -> None:
    """Hold the losses of one step on a copy of ``state`` against the eager step's.

    Raises:
        AssertionError: a loss is not finite, or the two differ.
    """
    ours, eager = state.clone(), state.clone()
    run(ours)
    build_step(model, config, priors_of(config))(eager)
    assert bool(ours.losses.isfinite().all()), f"losses are not finite: {ours.losses.tolist()}"
    error = float((ours.losses - eager.losses).norm() / eager.losses.norm())
    limit = 3e-2 if model.dtype == torch.bfloat16 else 1e-4
    assert error < limit, f"losses differ from the eager step's by a share of {error:.2g}, limit {limit}"


def synchronize(device: str) -> None:
    """Wait for a GPU; nothing on a CPU."""
    if device != "cpu":
        torch.cuda.synchronize(device)


def timed(call: Callable[[], Any], device: str) -> float:
    """Seconds of one call."""
    if device == "cpu":
        begin = time.perf_counter()
        call()
        return time.perf_counter() - begin
    with torch.cuda.device(device):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def copy_bandwidth(device: str) -> float:
    """Bytes a second of a large copy on the device, read and written, median of 20."""
    size = 2**30 if device != "cpu" else 2**27
    source = torch.randint(0, 255, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    target.copy_(source)
    return 2 * size / statistics.median(timed(lambda: target.copy_(source), device) for _ in range(20))


def matmul_rate(device: str, dtype: torch.dtype) -> float:
    """FLOP/s of a large square matrix product on the device, the best of 10 after a warm-up."""
    side = 8192 if device != "cpu" else 1536
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    out = a @ b
    best = min(timed(lambda: torch.mm(a, b, out=out), device) for _ in range(10))
    return 2 * side**3 / best


def quantile(values: list[float], share: float) -> float:
    """By linear interpolation."""
    return float(torch.tensor(values, dtype=torch.float64).quantile(share))


def commit() -> str:
    """Of the checkout, with a mark where it has uncommitted changes."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=10"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or "unknown"


def about(device: str) -> dict[str, str]:
    """The columns that say where and with what a row was measured."""
    return {"device_name": device_name(torch.device(device)), "torch": versions()["torch"], "commit": commit()}


def write_csv(rows: list[dict[str, Any]], path: Path) -> None:
    """One line a row, with the columns of the first; says where."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    print(f"written to {path}")


def positive(text: str) -> int:
    """An argument that counts something; argparse names it where it is wrong."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: must be an integer of at least 1")
    return int(text)


def model_name(text: str) -> str:
    """An argument that names a model which timm can build."""
    if not timm.is_model(text.partition(".")[0]):
        raise argparse.ArgumentTypeError(f"{text!r}: timm knows no such model")
    return text


def device_argument(text: str) -> str:
    """An argument that names a device which is there."""
    kind, _, index = text.partition(":")
    if kind not in ("cpu", "cuda") or (index and (kind == "cpu" or not index.isdecimal())):
        raise argparse.ArgumentTypeError(f"{text!r}: must be cpu, cuda or cuda:N")
    if kind == "cuda" and int(index or 0) >= torch.cuda.device_count():
        raise argparse.ArgumentTypeError(f"{text!r}: no such CUDA device here")
    return text
