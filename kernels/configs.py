"""Pinned launch configurations, by op and shape class.

None of them was timed on a GPU yet: they come from registers and load widths of the compiled code (see
``tests/kernels/test_ahead_of_time.py``). To measure, run ``SMI_FAST_AUTOTUNE=1 python -m benchmarks.kernels`` on the
device; it prints this table anew. Triton's own autotuner is not used: it needs a driver even to import a kernel, and
what it picks differs from run to run.
"""

from smi_fast.kernels.launch import Config

# the shape class of a patch op is the patch side; of cls_attention the number of tokens, rounded up to a power of two
PINNED: dict[str, dict[int, Config]] = {
    "patch_gather": {4: Config(1024, 4), 8: Config(1024, 4), 14: Config(1024, 4), 16: Config(1024, 4)},
    "patch_ungather": {4: Config(512, 4), 8: Config(512, 4), 14: Config(512, 4), 16: Config(512, 4)},
    "total_variation": {8: Config(256, 2), 16: Config(256, 2), 32: Config(512, 4)},
    "adam_update": {8: Config(256, 2), 16: Config(256, 2), 32: Config(512, 4)},
}
DEFAULT: dict[str, Config] = {
    "patch_gather": Config(1024, 4),
    "patch_ungather": Config(512, 4),
    "total_variation": Config(128, 4),
    "adam_update": Config(128, 4),
}


def pinned(op: str, shape_class: int) -> Config:
    """The configuration of an op for a shape class; classes that were not measured share a default."""
    return PINNED[op].get(shape_class, DEFAULT[op])
