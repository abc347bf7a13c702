"""smi_fast: synthesise images that a frozen Vision Transformer recognises, by Sparse Model Inversion."""

__version__ = "0.1.0"
