"""`Objective`: the loss as a sum of terms, and the term that the pixel update takes over."""

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from smi_fast.config import InversionConfig
from smi_fast.kernels.adam_update import TVTerm
from smi_fast.kernels.step_record import Column
from smi_fast.method.view import View
from smi_fast.model.spec import Needs
from smi_fast.plugins import Prior


class Value(NamedTuple):
    """The loss of one step."""

    total: Tensor  # [], to be differentiated; without the term of the update
    columns: Tensor  # [B, 1 + priors]: cross-entropy and each weighted prior; 0 for the term of the update


@dataclass(frozen=True)
class Objective:
    """Cross-entropy and the priors of a recipe.

    Total variation reads and writes the same pixels as the optimiser, so the update can compute it on the way. A prior
    that allows this says so with a method ``update_term() -> TVTerm``. The update takes one such prior; where there are
    several, none. A subclass with a ``__call__`` of its own needs an ``update_term`` of its own too.
    """

    mean: bool  # cross-entropy as a mean over the batch, else as a sum
    priors: tuple[tuple[int, Prior], ...]  # those that are computed here, with their columns
    columns: int  # 1 + all priors
    needs: Needs  # of all priors
    term: TVTerm | None = None  # what the update computes
    term_column: int = -1

    @classmethod
    def of(cls, config: InversionConfig, depth: int) -> "Objective":
        """The objective of a recipe for a model of ``depth`` blocks.

        Raises:
            ValueError: a prior needs a block that the model does not have.
        """
        columns = tuple(enumerate(config.priors, start=1))
        needs = [getattr(prior, "needs", Needs()) for prior in config.priors]
        plain = cls(config.loss == "mean", columns, 1 + len(columns), Needs.union(needs, depth))
        willing = [column for column, prior in columns if _in_update(prior)]
        if len(willing) != 1:
            return plain
        term = config.priors[willing[0] - 1].update_term()  # type: ignore[attr-defined]  # optional, see above
        others = tuple(pair for pair in columns if pair[0] != willing[0])
        return replace(plain, priors=others, term=term, term_column=willing[0])

    def __call__(self, view: View) -> Value:
        """The loss on a view of the current step; call it with gradients enabled."""
        cross_entropy = F.cross_entropy(view.output.logits, view.labels, reduction="none")
        total = cross_entropy.mean() if self.mean else cross_entropy.sum()
        columns = [cross_entropy, *(torch.zeros_like(cross_entropy) for _ in range(self.columns - 1))]
        for column, prior in self.priors:
            columns[column] = prior.weight * prior(view)
            total = total + columns[column].sum()
        return Value(total, torch.stack(columns, 1).detach())

    def late(self, value: Tensor | None) -> Column | None:
        """The column of the term that the update computed, from its value ``[B]``, not yet weighted."""
        if self.term is None or value is None:
            return None
        return Column(self.term_column, value, self.term.weight)


def _in_update(prior: Prior) -> bool:
    """Does the class whose ``__call__`` runs also say what the update may compute in its place?"""
    owner = next(cls for cls in type(prior).__mro__ if "__call__" in vars(cls))
    return "update_term" in vars(owner)
