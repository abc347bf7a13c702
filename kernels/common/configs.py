"""Launch configurations, by op and shape class: pinned, or measured where an environment variable asks for it.

None of the pinned ones was timed on a GPU yet: they come from registers and load widths of the compiled code (see
``tests/kernels/test_ahead_of_time.py``). With ``SMI_FAST_AUTOTUNE=1`` the first launch of an op on a shape class times
all candidates on copies of its arguments; ``tuned_table`` prints what was found as a new ``PINNED``
(``SMI_FAST_AUTOTUNE=1 python -m benchmarks run kernels`` does so for the ops it times). Triton's own autotuner is not
used: it needs a driver even to import a kernel, and what it picks differs from run to run.
"""

import os
from collections.abc import Callable
from dataclasses import astuple, replace

import torch
from torch import Tensor

from smi_fast.kernels.common.dispatch import triton
from smi_fast.kernels.common.launch import Config, Launch, ProductConfig

AUTOTUNE_VARIABLE = "SMI_FAST_AUTOTUNE"

# the shape class of a patch op is the patch side; of the attention and of select_patches the number of tokens or
# patches, rounded up to a power of two; of remap the length of a row; of add_layer_norm that too, and of mlp the number
# of rows, rounded up likewise. Classes that are not listed use the entry 0
PINNED: dict[str, dict[int, Config]] = {
    "patch_gather": {0: Config(1024, 4)},
    "patch_ungather": {0: Config(512, 4)},
    "patch_scatter": {0: Config(512, 4)},
    "total_variation": {0: Config(128, 4), 16: Config(256, 2), 32: Config(256, 2)},
    "adam_update": {0: Config(128, 4), 16: Config(256, 2), 32: Config(128, 1)},
    "patch_mask": {0: Config(1024, 4)},
    "composite": {0: Config(1024, 4)},
    "kept_statistics": {0: Config(1024, 4)},
    "select_patches": {0: Config(4096, 8), 64: Config(64, 1), 128: Config(128, 1), 256: Config(256, 1)},
    "remap": {0: Config(1024, 4)},
    "first_failure": {0: Config(4096, 8)},
    "record_step": {0: Config(256, 1)},
    "cls_attention": {0: Config(256, 8), 64: Config(64, 4), 128: Config(128, 4)},
    "cls_attention_backward": {0: Config(128, 8), 64: Config(64, 4), 256: Config(256, 16)},
    # blocks of 64 queries run on Hopper's own matrix instructions, but spill on sm_80 at 256 tokens
    "tile_attention": {0: Config(64, 4), 256: Config(32, 8)},
    "tile_attention_float32": {0: Config(16, 8)},
    # at 128 tokens 128 queries compile for sm_90 without spills (203 registers), and spill 208 bytes on sm_80
    "tile_attention_backward": {0: Config(64, 4), 128: Config(32, 8), 256: Config(32, 8)},
    "tile_attention_backward_float32": {0: Config(64, 16), 128: Config(32, 16), 256: Config(32, 16)},
    # rows of up to 1024 fit into the registers of one warp
    "add_layer_norm": {0: Config(1, 8), 256: Config(1, 1), 512: Config(1, 1), 1024: Config(1, 1)},
    "add_layer_norm_backward": {0: Config(1, 8), 256: Config(1, 1), 512: Config(1, 1), 1024: Config(1, 1)},
    # two programs a multiprocessor, so that one multiplies while the other is in its epilogue
    "mlp": {0: ProductConfig(128, 8, 128, 64, 3)},
    "mlp_backward": {0: ProductConfig(128, 8, 128, 64, 3)},
}
CANDIDATES = tuple(Config(block, warps) for block in (128, 256, 512, 1024) for warps in (1, 2, 4, 8))
OWN_CANDIDATES: dict[str, tuple[Config, ...]] = {  # by the beginning of an op's name
    "tile_attention": tuple(Config(queries, warps) for queries in (16, 32, 64, 128) for warps in (2, 4, 8, 16)),
    "add_layer_norm": tuple(Config(rows, warps) for rows in (1, 2, 4) for warps in (1, 2, 4, 8)),
    "mlp": tuple(
        ProductConfig(rows, warps, columns, depth, stages)
        for rows, columns, warps in ((64, 128, 4), (128, 128, 4), (128, 128, 8), (128, 256, 8), (256, 128, 8))
        for depth, stages in ((32, 4), (64, 3), (64, 4))
    ),
}
_tuned: dict[tuple[str, int], Config] = {}


def pinned(op: str, shape_class: int) -> Config:
    """The configuration in the table."""
    return PINNED[op].get(shape_class, PINNED[op][0])


def best(op: str, shape_class: int, build: Callable[[Config], Launch]) -> Config:
    """The pinned configuration, or under ``SMI_FAST_AUTOTUNE=1`` on a GPU the fastest candidate.

    Args:
        op: name of the op in ``PINNED``.
        shape_class: see ``PINNED``.
        build: the launch in a configuration.
    """
    if os.environ.get(AUTOTUNE_VARIABLE, "0") in ("", "0"):
        return pinned(op, shape_class)
    key = (op, shape_class)
    if key not in _tuned:
        launch = build(pinned(op, shape_class))
        if launch.device.type != "cuda":
            return pinned(op, shape_class)
        _tuned[key] = fastest(build, _milliseconds, candidates_of(op))
    return _tuned[key]


def candidates_of(op: str) -> tuple[Config, ...]:
    """What is timed for an op."""
    return next((own for name, own in OWN_CANDIDATES.items() if op.startswith(name)), CANDIDATES)


def fastest(
    build: Callable[[Config], Launch],
    milliseconds: Callable[[Launch], float],
    candidates: tuple[Config, ...] = CANDIDATES,
) -> Config:
    """The candidate of the shortest time; one that does not launch (too many resources) is left out."""
    times = {}
    for config in candidates:
        try:
            times[config] = milliseconds(_on_copies(build(config)))
        except triton.runtime.errors.OutOfResources:
            continue
    return min(times, key=lambda config: times[config])


def tuned_table() -> str:
    """What was measured in this process, as lines of ``PINNED``."""
    lines = []
    for op in sorted({op for op, _ in _tuned}):
        found = {shape_class: config for (name, shape_class), config in _tuned.items() if name == op}
        entries = {0: PINNED[op][0]} | {k: found[k] for k in sorted(found)}
        text = ", ".join(f"{k}: {type(c).__name__}({', '.join(map(str, astuple(c)))})" for k, c in entries.items())
        lines.append(f'    "{op}": {{{text}}},')
    return "\n".join(lines)


def _on_copies(launch: Launch) -> Launch:
    """The same launch on copies of its tensors, so that timing it changes nothing."""
    copies = {name: _twin(v) if isinstance(v, Tensor) else v for name, v in launch.arguments.items()}
    return replace(launch, arguments=copies)


def _twin(tensor: Tensor) -> Tensor:
    """A copy with the same strides, which the launch carries as numbers."""
    storage = tensor.untyped_storage().clone()
    twin = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    return twin.set_(storage, tensor.storage_offset(), tensor.size(), tensor.stride())


def _milliseconds(launch: Launch) -> float:
    launch.run()
    torch.cuda.synchronize(launch.device)
    return float(triton.testing.do_bench(launch.run, warmup=10, rep=40, return_mode="median"))
