"""Post-training quantization that is calibrated on synthetic images, as in section 5.1 of the paper."""
