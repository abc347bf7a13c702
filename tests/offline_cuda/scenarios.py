"""Models, states and whole inversions for the stand-in, where kernels do nothing: all values are zeros."""

import contextlib
import dataclasses
import gc
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import smi_fast.images.sparse_images as sparse_images
from smi_fast import InversionConfig, Inverter, load_model
from smi_fast.engine.runner import Runners, Source
from smi_fast.engine.state import State
from smi_fast.model.from_timm import from_timm
from smi_fast.model.sparse_vit import SparseViT
from smi_fast.model.spec import ModelInfo
from tests.conftest import NAMES, build_vit
from tests.offline_cuda.recorder import Memory, Recorder, Row
from tests.states import fresh

# two stops; a stage of 14 and one of 19 iterations leave a rest beside captures of ten
CONFIG = InversionConfig(iterations=57, stops=((14, 0.3), (33, 0.4)), jitter=0.3)
DEVICE = "cuda:0"


def tiny_model(device: str = DEVICE, dtype: torch.dtype = torch.float32) -> SparseViT:
    """`build_vit` on a device."""
    info = ModelInfo("tiny", "0" * 64, (0.5, 0.4, 0.3), (0.25, 0.2, 0.3), NAMES)
    return from_timm(build_vit(), info).with_dtype(dtype).to(device)


def demo_model(device: str = DEVICE, dtype: torch.dtype = torch.bfloat16) -> SparseViT:
    """The bundled teacher on a device, in the dtype that a GPU would be given."""
    return load_model("demo", dtype=dtype, device=device)


def weights_of(model: SparseViT) -> list[torch.Tensor]:
    """All tensors of a model."""
    return [*model.parameters(), *model.buffers()]


@torch.no_grad()
def state_of(model: SparseViT, config: InversionConfig, batch: int, kept: int) -> State:
    """A state of some stage. The ids in it mean nothing."""
    labels = [index % model.shape.num_classes for index in range(batch)]
    state = fresh(model, config, labels, list(range(batch)))
    return state if kept == model.grid.patches else state.stopped(config.strategy, kept, 0)


@dataclasses.dataclass(frozen=True)
class Ran:
    """A whole run, as it was recorded."""

    rows: list[Row]
    inverter: Inverter
    shape: tuple[int, ...]  # of the pixels
    messages: list[str]  # warnings, in their order


def invert(recorder: Recorder, model: SparseViT, batch: int, config: InversionConfig = CONFIG, **options: Any) -> Ran:
    """A whole run of ``batch`` images, from the inverter's making to the images on the host."""
    with any_values(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        recorder.reset()
        inverter = Inverter(model, config, batch_size=batch, **options)
        images = inverter([index % model.shape.num_classes for index in range(batch)])
        torch.cuda.synchronize(model.device)
        return Ran(recorder.rows(), inverter, tuple(images.pixels.shape), [str(each.message) for each in caught])


@dataclasses.dataclass(frozen=True)
class Bucket:
    """One bucket, built and captured as in a run, and then one single step of it."""

    step: list[Row]
    memory: Memory


@torch.no_grad()
def measure_bucket(
    recorder: Recorder, model: SparseViT, config: InversionConfig, state: State, compiled: bool
) -> Bucket:
    """Build the runner of a state's shapes, and run its step by itself, outside of a capture."""
    collect()
    recorder.reset()
    before = torch.cuda.memory_allocated(model.device)
    runner = Runners(Source(model, config, compiled)).of(state, 0, len(state.canvas))
    pool = sum(row.bytes for row in recorder.rows() if row.kind == "MALLOC" and row.capture)
    torch._C._cuda_clearCublasWorkspaces()
    held = torch.cuda.memory_allocated(model.device) - before
    for _ in range(2):
        runner._step(runner.state)
    torch.cuda.synchronize(model.device)
    recorder.reset()
    runner._step(runner.state)
    tensors = [*runner.state.tensors(), runner.state.spare]
    buffers = sum(tensor.nbytes for tensor in tensors if tensor is not None)
    return Bucket(recorder.rows(), Memory(held, buffers, pool))


def collect() -> None:
    """Let go of whatever nobody holds any more, graphs and memory of devices included.

    cuBLAS keeps 32 MiB for each stream that it has met: they would count for whoever meets a stream first.
    """
    gc.collect()
    torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.empty_cache()


@contextlib.contextmanager
def any_values() -> Iterator[None]:
    """Take images whose patch ids mean nothing, since no kernel has chosen any: they become the first ones."""

    def take(keep: torch.Tensor, patches: int) -> None:
        keep.copy_(torch.arange(keep.shape[1]).expand_as(keep))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sparse_images, "_check_keep", take)
        yield
