"""What GPUs reach, for an estimate: from a measurement where there is one, else a share of the data sheet's peak."""

from dataclasses import dataclass

import torch

FLOAT32_SHARE = 0.8  # of the peak without tensor cores; the head alone needs it in a bf16 step


@dataclass(frozen=True)
class Device:
    """A GPU, as far as the speed model knows it."""

    name: str  # part of what PyTorch calls it
    sms: int  # streaming multiprocessors, between which the tiles of a product are shared out
    bf16: float  # FLOP/s that a large product reaches
    fp32: float
    copy: float  # bytes per second of a large copy, read and written
    source: str  # of these figures, in words

    def flops_per_s(self, dtype: torch.dtype) -> float:
        """Of a large product that fills whole waves."""
        return self.bf16 if dtype == torch.bfloat16 else self.fp32


DEVICES = {
    "h100": Device(
        "H100",
        132,
        790e12,
        FLOAT32_SHARE * 67e12,
        3.0e12,
        "790 TFLOP/s of large bf16 products and copies of 3.0 TB/s, both measured on such a device elsewhere",
    ),
    "h200": Device(
        "H200",
        132,
        790e12,
        FLOAT32_SHARE * 67e12,
        4.0e12,
        "bf16 products at the H100's measured 790 TFLOP/s; copies of 4.0 TB/s, of a peak of 4.8",
    ),
    "a100": Device(
        "A100",
        108,
        0.8 * 312e12,
        FLOAT32_SHARE * 19.5e12,
        0.85 * 1.55e12,
        "80% of the 312 TFLOP/s and 85% of the 1.55 TB/s of the data sheet",
    ),
    "4090": Device(
        "4090",
        128,
        0.9 * 165e12,
        FLOAT32_SHARE * 82.6e12,
        0.9 * 1.0e12,
        "90% of the 165 TFLOP/s (dense, float32 sums) and of the 1.0 TB/s of the data sheet",
    ),
}
