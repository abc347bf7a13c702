"""The engine: one step as one static-shape graph, stages, batches, and what it tells on the way."""

from smi_fast.engine.buckets import Bucket
from smi_fast.engine.inverter import Inverter, Stats
from smi_fast.engine.progress import Progress
from smi_fast.engine.snapshots import Snapshots

__all__ = ["Bucket", "Inverter", "Progress", "Snapshots", "Stats"]
