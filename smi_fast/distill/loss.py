"""The loss of knowledge transfer, Eq. 6 of the paper.

    loss = mean over images of KL(softmax(teacher / T) || softmax(student / T))  [* T^2]

The published code multiplies by ``T^2``, so that gradients do not shrink with the temperature (Hinton et al., 2015);
the paper's equation does not have the factor. Here it is applied by default, `DistillConfig.scale_by_t2`.
"""

import torch.nn.functional as F
from torch import Tensor


def distillation_loss(teacher: Tensor, student: Tensor, temperature: float, scale_by_t2: bool = True) -> Tensor:
    """See the top of the file.

    Args:
        teacher, student: logits ``[B, C]`` of one floating dtype.
        temperature: ``T``, positive.
        scale_by_t2: multiply by ``T^2``.

    Returns:
        A scalar.
    """
    goal = F.log_softmax(teacher / temperature, 1)
    loss = F.kl_div(F.log_softmax(student / temperature, 1), goal, reduction="batchmean", log_target=True)
    return loss * temperature**2 if scale_by_t2 else loss
