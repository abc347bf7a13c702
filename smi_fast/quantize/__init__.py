"""Post-training quantization that is calibrated on synthetic images, as in section 5.1 of the paper."""

from smi_fast.quantize.calibration import Calibration
from smi_fast.quantize.quantized import QuantizedViT, quantize
from smi_fast.quantize.scheme import QuantConfig

__all__ = ["Calibration", "QuantConfig", "QuantizedViT", "quantize"]
