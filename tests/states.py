"""States of the engine, for tests."""

from collections.abc import Sequence

from smi_fast.config import InversionConfig
from smi_fast.engine.randomness import draw
from smi_fast.engine.state import State, new_state
from smi_fast.model.sparse_vit import SparseViT


def fresh(model: SparseViT, config: InversionConfig, labels: Sequence[int], image_ids: Sequence[int]) -> State:
    """The state before the first step."""
    return new_state(model, config, labels, draw(config, image_ids, model.grid))
