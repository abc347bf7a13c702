"""Knowledge transfer: a student learns from what a teacher says of inverted images, on their kept patches alone."""

from smi_fast.distill.config import DistillConfig
from smi_fast.distill.curves import CurveRow
from smi_fast.distill.folder import RunFolder
from smi_fast.distill.loss import distillation_loss
from smi_fast.distill.pair import Pair
from smi_fast.distill.pool import ImageSet
from smi_fast.distill.progress import Progress
from smi_fast.distill.resize import for_student
from smi_fast.distill.rounds import Alternating
from smi_fast.distill.student import Student, StudentWeights, build_student, probe_features
from smi_fast.distill.trainer import DistillResult, Trainer

__all__ = [
    "Alternating",
    "CurveRow",
    "DistillConfig",
    "DistillResult",
    "ImageSet",
    "Pair",
    "Progress",
    "RunFolder",
    "Student",
    "StudentWeights",
    "Trainer",
    "build_student",
    "distillation_loss",
    "for_student",
    "probe_features",
]
