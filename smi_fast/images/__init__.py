"""Inverted images: in memory, on disk and as pictures."""

from smi_fast.images.process import Process
from smi_fast.images.sparse_images import Provenance, SparseImages

__all__ = ["Process", "Provenance", "SparseImages"]
