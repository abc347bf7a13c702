"""The frozen Vision Transformer: loading, adapting, and the forward on kept patches."""

from smi_fast.model.load import load_model
from smi_fast.model.sparse_vit import SparseViT
from smi_fast.model.spec import ModelInfo, ViTShape

__all__ = ["ModelInfo", "SparseViT", "ViTShape", "load_model"]
