"""Knowledge transfer: a student learns from what a teacher says of inverted images, on their kept patches alone."""

from smi_fast.distill.config import DistillConfig
from smi_fast.distill.loss import distillation_loss
from smi_fast.distill.pool import ImageSet, Pool
from smi_fast.distill.resize import for_student
from smi_fast.distill.student import Student, build_student, probe_features

__all__ = [
    "DistillConfig",
    "ImageSet",
    "Pool",
    "Student",
    "build_student",
    "distillation_loss",
    "for_student",
    "probe_features",
]
