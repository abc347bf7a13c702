"""Our engine against the yard-stick: one iteration at all patches (dense) and at the last stage's (sparse).

    python -m benchmarks.engine --device cpu

Each system lives in a process of its own, so that its peak memory is its own. Before anything is timed, their input
gradients are compared (see `check_agreement`); then the systems take turns for a number of rounds, so that a change in
the machine's speed hits all of them. Writes one CSV row a system and prints the ratios round by round.
"""

import argparse
import multiprocessing as mp
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.baseline import PublishedLoop, TunedLoop
from benchmarks.common import (
    DTYPES,
    MEAN,
    RESULTS,
    STD,
    about,
    build_model,
    build_vit,
    device_argument,
    fixed_keep,
    grid_of,
    make_step,
    model_name,
    paper_kept,
    positive,
    quantile,
    state_at,
    synchronize,
    write_csv,
)
from smi_fast.config import InversionConfig
from smi_fast.kernels.patch_cells import put_patches_
from smi_fast.model.flops import iteration_flops
from smi_fast.model.from_timm import from_timm
from smi_fast.model.spec import ModelInfo
from smi_fast.storage.environment import peak_memory_bytes


@dataclass(frozen=True)
class System:
    """One row: what is timed, in which compute dtype."""

    name: str  # published, tuned, eager, compiled
    dtype: str

    def __str__(self) -> str:
        return f"{self.name} {self.dtype}"


@dataclass(frozen=True)
class Setting:
    """What all rows have in common."""

    model: str
    batch: int
    device: str
    threads: int


SYSTEMS = (
    System("published", "fp32"),
    System("tuned", "bf16"),
    System("eager", "fp32"),
    System("eager", "bf16"),
    System("compiled", "fp32"),
    System("compiled", "bf16"),
)


class Baseline:
    """A yard-stick loop at a fixed set of patches."""

    def __init__(self, system: System, setting: Setting, kept: int) -> None:
        vit, labels = build_vit(setting.model, setting.device), torch.arange(setting.batch)
        if system.name == "published":
            self.loop: PublishedLoop | TunedLoop = PublishedLoop(vit, labels, MEAN, STD, 0)
        else:
            self.loop = TunedLoop(vit, labels, MEAN, STD, 0, DTYPES[system.dtype])
        self.loop.set_keep(fixed_keep(setting.batch, self.loop.keep.shape[1], kept))
        self.shape = from_timm(vit, ModelInfo(setting.model, "", MEAN, STD)).shape

    def step(self) -> None:
        """One iteration."""
        self.loop.step()

    def gradient(self, canvas: Tensor) -> Tensor:
        """``[B, 3, H, W]``: of the reference loss (mean cross-entropy, batch total variation), image not moved."""
        with torch.no_grad():
            self.loop.canvas.copy_(canvas)
        self.loop.step(jitter=False)
        gradient = self.loop.canvas.grad
        assert gradient is not None
        return gradient.detach().clone()


class Ours:
    """The engine's step at a fixed set of patches, eager or compiled."""

    def __init__(self, system: System, setting: Setting, kept: int) -> None:
        self.model = build_model(setting.model, setting.device, DTYPES[system.dtype])
        self.shape = self.model.shape
        self.keep = fixed_keep(setting.batch, self.shape.grid.patches, kept).to(setting.device)
        self.state = state_at(self.model, InversionConfig(), self.keep)
        self.run = make_step(self.model, InversionConfig(), self.state, system.name)
        # the reference preset's gradient is what the yard-stick computes; jitter off
        self.reference = InversionConfig(preset="reference", jitter=0.0, flip=False)
        self.system = system

    @torch.no_grad()
    def step(self) -> None:
        """One iteration."""
        self.run(self.state)

    @torch.no_grad()
    def gradient(self, canvas: Tensor) -> Tensor:
        """``[B, 3, H, W]``, as `Baseline.gradient`; eager rows under ``reference``, compiled ones as they are timed."""
        config = InversionConfig() if self.system.name == "compiled" else self.reference
        state = state_at(self.model, config, self.keep)
        state.jitter.zero_()
        state.canvas.copy_(canvas)
        run = self.run if self.system.name == "compiled" else make_step(self.model, config, state, "eager")
        run(state)
        patches = state.first / (1 - config.betas[0])
        gradient = torch.zeros_like(canvas)
        put_patches_(gradient, state.updated, patches)
        return gradient


def serve(system: System, setting: Setting, kept: int, pipe: Any) -> None:
    """A process of its own: set up, then answer ``("gradient", canvas)`` and ``("time", steps)`` until ``None``."""
    torch.set_num_threads(setting.threads)
    begin = time.perf_counter()
    kind = Baseline if system.name in ("published", "tuned") else Ours
    runner = kind(system, setting, kept)
    runner.step()
    pipe.send((time.perf_counter() - begin, iteration_flops(runner.shape, kept)))
    for order in iter(pipe.recv, None):
        if order[0] == "gradient":
            pipe.send(runner.gradient(torch.from_numpy(order[1]).to(setting.device)).cpu().numpy())
            continue
        begin = time.perf_counter()
        for _ in range(order[1]):
            runner.step()
        synchronize(setting.device)
        seconds = (time.perf_counter() - begin) / order[1]
        pipe.send((seconds, peak_memory_bytes(torch.device(setting.device))))


class Remote:
    """A system in its process."""

    def __init__(self, system: System, setting: Setting, kept: int) -> None:
        context = mp.get_context("spawn")
        self.system, self.kept = system, kept
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(system, setting, kept, theirs), daemon=True)
        self.process.start()
        theirs.close()
        self.seconds_setup, self.flops = self.pipe.recv()
        self.seconds: list[float] = []
        self.memory = 0

    def gradient(self, canvas: Tensor) -> Tensor:
        """Of that canvas."""
        self.pipe.send(("gradient", canvas.numpy()))
        return torch.from_numpy(self.pipe.recv())

    def time(self, steps: int, count: bool = True) -> None:
        """One round."""
        self.pipe.send(("time", steps))
        seconds, self.memory = self.pipe.recv()
        if count:
            self.seconds.append(seconds)

    def close(self) -> None:
        """End the process."""
        self.pipe.send(None)
        self.process.join()


def relative_error(ours: Tensor, truth: Tensor) -> float:
    """``||ours - truth|| / ||truth||``."""
    return float((ours - truth).norm() / truth.norm())


def check_agreement(remotes: list[Remote], setting: Setting) -> None:
    """Input gradients on one canvas and one set of patches, before anything is timed.

    The eager rows (under ``reference``) must equal the published loop's; the compiled rows, which are compiled for the
    preset that is timed, must equal the eager step of that preset, run here in float32.

    Raises:
        AssertionError: a system that does not compute what the others do.
    """
    kept = remotes[0].kept
    eager = Ours(System("eager", "fp32"), setting, kept)
    canvas = torch.randn(eager.state.canvas.shape, generator=torch.Generator().manual_seed(7))
    by_name = {str(remote.system): remote.gradient(canvas) for remote in remotes}
    eager.system = System("compiled", "fp32")  # the timed preset's own step, not compiled
    paper = eager.gradient(canvas.to(setting.device)).cpu()
    for name, gradient in by_name.items():
        truth = paper if name.startswith("compiled") else by_name[str(SYSTEMS[0])]
        error, limit = relative_error(gradient, truth), 1e-3 if name.endswith("fp32") else 0.1
        print(f"  {name:15s} gradient within {error:.1e} of {'eager fp32' if truth is paper else 'the published loop'}")
        assert error < limit, f"{name} at {kept} patches: relative error {error:.3g} of the gradient, limit {limit}"


def row(remote: Remote, setting: Setting, baseline: Remote) -> dict[str, Any]:
    """One line of the CSV."""
    p20, p50, p80 = (quantile(remote.seconds, share) for share in (0.2, 0.5, 0.8))
    ratios = [theirs / ours for ours, theirs in zip(remote.seconds, baseline.seconds, strict=True)]
    return {
        "system": remote.system.name,
        "dtype": remote.system.dtype,
        **asdict(setting),
        "patches": remote.kept,
        "ms_p20": round(p20 * 1e3, 2),
        "ms_p50": round(p50 * 1e3, 2),
        "ms_p80": round(p80 * 1e3, 2),
        "ms_min": round(min(remote.seconds) * 1e3, 2),
        "rounds": len(remote.seconds),
        "image_iterations_per_s": round(setting.batch / p50, 1),
        "true_gflop_per_s": round(setting.batch * remote.flops / p50 / 1e9, 1),
        "speed_up_over_published_p50": round(statistics.median(ratios), 2),
        "peak_memory_mib": round(remote.memory / 2**20),
        "seconds_setup": round(remote.seconds_setup, 1),
        **about(setting.device),
    }


def measure(
    setting: Setting, kept: int, rounds: int, steps: int, systems: tuple[System, ...] = SYSTEMS
) -> list[Remote]:
    """The systems at one number of patches, taking turns."""
    remotes = []
    for system in systems:
        print(f"{kept} patches: setting up {system}", flush=True)
        remotes.append(Remote(system, setting, kept))
    check_agreement(remotes, setting)
    for index in range(rounds + 1):
        for remote in remotes:
            remote.time(steps, count=index > 0)  # the first round warms up
        print(f"{kept} patches: round {index} of {rounds}", flush=True)
    for remote in remotes:
        remote.close()
    return remotes


def report(rows: list[dict[str, Any]], blocks: dict[str, list[Remote]]) -> None:
    """The table, and our best sparse row against the published loop of each block, round by round."""
    for line in rows:
        print(
            f"{line['system']:10s} {line['dtype']:5s} {line['patches']:4d} patches  {line['ms_p50']:8.1f} ms "
            f"({line['ms_p20']:.1f}..{line['ms_p80']:.1f})  {line['image_iterations_per_s']:8.1f} image-it/s  "
            f"{line['speed_up_over_published_p50']:5.2f}x published  {line['peak_memory_mib']} MiB"
        )
    compiled = [remote for remote in blocks["sparse"] if remote.system.name == "compiled"]
    ours = min(compiled, key=lambda remote: statistics.median(remote.seconds))
    for name, remotes in blocks.items():
        ratios = [theirs / mine for mine, theirs in zip(ours.seconds, remotes[0].seconds, strict=True)]
        spread = f"{quantile(ratios, 0.2):.2f}..{quantile(ratios, 0.8):.2f}"
        print(f"{ours.system} sparse is {statistics.median(ratios):.2f}x the published loop {name} (p20..p80 {spread})")


def main() -> None:
    """Parse, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", type=device_argument, default="cpu")
    parser.add_argument("--model", type=model_name, default="deit_tiny_patch16_224")
    parser.add_argument("--batch", type=positive, default=8)
    parser.add_argument("--rounds", type=positive, default=15)
    parser.add_argument("--steps", type=positive, default=2, help="iterations a system runs in a round")
    parser.add_argument("--threads", type=positive, default=torch.get_num_threads())
    parser.add_argument("--stages", nargs="+", choices=("sparse", "dense"), default=["sparse", "dense"])
    parser.add_argument("--quick", action="store_true", help="published, tuned and the bf16 compiled system alone")
    parser.add_argument("--out", type=Path, default=None)
    args = parser.parse_args()
    if "sparse" not in args.stages:
        parser.error("--stages: sparse must be among them, since speed-ups are told for it")
    setting = Setting(args.model, args.batch, args.device, args.threads)
    patches = grid_of(args.model).patches
    systems = tuple(SYSTEMS[i] for i in (0, 1, 5)) if args.quick else SYSTEMS
    kept = {"sparse": paper_kept(patches)[-1], "dense": patches}
    blocks = {name: measure(setting, kept[name], args.rounds, args.steps, systems) for name in args.stages}
    rows = [row(remote, setting, group[0]) for group in blocks.values() for remote in group]
    report(rows, blocks)
    write_csv(rows, args.out or RESULTS / f"engine-{args.device}-{args.model}-b{args.batch}.csv")


if __name__ == "__main__":
    main()
