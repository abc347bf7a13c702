"""The engine: one step as one static-shape graph, stages, batches, and what it tells on the way."""

from smi_fast.engine.inverter import Inverter, Stats
from smi_fast.engine.observe import Progress, Snapshots
from smi_fast.engine.runner import Bucket

__all__ = ["Bucket", "Inverter", "Progress", "Snapshots", "Stats"]
