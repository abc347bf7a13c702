"""smi_fast: synthesise images that a frozen Vision Transformer recognises, by Sparse Model Inversion."""

from smi_fast.config import InversionConfig
from smi_fast.engine import Inverter
from smi_fast.images import SparseImages
from smi_fast.model import load_model
from smi_fast.storage.environment import __version__

__all__ = ["InversionConfig", "Inverter", "SparseImages", "__version__", "load_model"]
