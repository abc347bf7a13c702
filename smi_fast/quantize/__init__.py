"""Post-training quantization that is calibrated on synthetic images, as in section 5.1 of the paper."""

from smi_fast.quantize.calibration import Calibration
from smi_fast.quantize.files import load_quantized, save_quantized
from smi_fast.quantize.layers import LayerRow, layer_report
from smi_fast.quantize.quantized import QuantizedViT, quantize
from smi_fast.quantize.scheme import QuantConfig

__all__ = [
    "Calibration",
    "LayerRow",
    "QuantConfig",
    "QuantizedViT",
    "layer_report",
    "load_quantized",
    "quantize",
    "save_quantized",
]
