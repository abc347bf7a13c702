"""Strategies: which patches go on, and when. One file each; importing this registers all of them."""

from smi_fast.method.strategies.stops import Stops

__all__ = ["Stops"]
