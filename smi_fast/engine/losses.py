"""Read the loss without making the device wait."""

import torch
from torch import Tensor

from smi_fast.engine.state import State


class LossReader:
    """The mean loss over a batch, as of some recent step.

    On CUDA each reading is copied to pinned memory behind the steps already queued, and handed out once it has
    arrived; no step waits for it. On a CPU it is there at once.
    """

    def __init__(self, state: State) -> None:
        self.losses = state.losses
        self.pinned: Tensor | None = None
        self.arrived: torch.cuda.Event | None = None
        if self.losses.is_cuda:
            self.pinned = torch.empty((), dtype=self.losses.dtype, pin_memory=True)

    def poll(self) -> float | None:
        """The loss of the last reading that has arrived, or None."""
        if self.pinned is None:
            return float(self._mean())
        value = None
        if self.arrived is not None:
            if not self.arrived.query():
                return None
            value = float(self.pinned)
        self.pinned.copy_(self._mean(), non_blocking=True)
        self.arrived = torch.cuda.Event()
        self.arrived.record()
        return value

    def _mean(self) -> Tensor:
        """Images whose step was not finite do not count."""
        return self.losses.sum(1).nanmean()
