"""`Pair`: a frozen teacher and a student, and what each of them is shown of an image."""

from dataclasses import dataclass

import torch
from torch import Tensor

from smi_fast.distill.pool import ImageSet, Known, mirror
from smi_fast.distill.resize import check_grids, for_student
from smi_fast.distill.student import Student
from smi_fast.images import SparseImages
from smi_fast.kernels.common.check import check_ids
from smi_fast.model.sparse_vit import SparseViT

FORWARD_BATCH = 128  # images; fixed, so that what is known of an image is the same bits after a resume


@dataclass(frozen=True, eq=False)
class Pair:
    """Teacher and student.

    Raises:
        ValueError: other numbers of classes, other numbers of patch rows or columns, or not on one device.
    """

    teacher: SparseViT
    student: Student

    def __post_init__(self) -> None:
        teacher, student = self.teacher, self.student
        classes = teacher.shape.num_classes
        if student.vit.num_classes != classes:
            raise ValueError(
                f"student={student.info.name!r} has {student.vit.num_classes} classes, teacher="
                f"{teacher.info.name!r} {classes}: must be the same; build the student with num_classes={classes}"
            )
        check_grids(teacher.grid, student.grid)
        if teacher.device != student.device:
            raise ValueError(f"student is on {student.device}, teacher on {teacher.device}: must be on one device")

    def usable(self, images: SparseImages) -> ImageSet:
        """The images that did not fail, after a check that the teacher can judge them.

        Raises:
            ValueError: another patch grid or colour space than the teacher's, labels outside its classes, no images, or
                none that did not fail.
        """
        info, classes, n = self.teacher.info, self.teacher.shape.num_classes, len(images)
        if images.grid != self.teacher.grid:
            raise ValueError(f"images are made for {images.grid}, teacher={info.name!r} takes {self.teacher.grid}")
        made = images.provenance
        if (made.mean, made.std) != (info.mean, info.std):
            raise ValueError(
                f"images have mean={made.mean}, std={made.std}: must be those of teacher={info.name!r}, {info.mean}, "
                f"{info.std}"
            )
        outside = images.labels[(images.labels < 0) | (images.labels >= classes)]
        if len(outside):
            raise ValueError(f"images have the label {int(outside[0])}: teacher={info.name!r} has 0..{classes - 1}")
        if not n:
            raise ValueError("images is empty: the pool must have at least one image")
        good = images.failed_at < 0
        if not good.any():
            raise ValueError(f"images: all {n} failed in their inversion; none is left to train on")
        return ImageSet(images.pixels[good], images.keep[good])

    def check(self, images: ImageSet) -> None:
        """Raises ``ValueError`` where pixels or kept patches do not fit the teacher's grid."""
        grid, size = self.teacher.grid, tuple(images.pixels.shape[2:])
        if size != (grid.height, grid.width):
            raise ValueError(f"images are {size} pixels: teacher={self.teacher.info.name!r} takes {grid}")
        if images.keep is not None:
            check_ids("keep", images.keep, grid.patches)

    @torch.no_grad()
    def teacher_logits(self, images: ImageSet) -> Tensor:
        """``[n, C]`` float32 from the kept patches."""
        return self.teacher(images.pixels, images.keep)[0]

    def shown(self, images: ImageSet) -> Tensor:
        """``[n, 3, H', W']``, the images as the student takes them."""
        return for_student(images.pixels, images.keep, self.teacher, self.student)

    def student_logits(self, images: ImageSet) -> Tensor:
        """``[n, C]`` from the kept patches."""
        return self.student.logits(self.shown(images), images.keep)

    @torch.no_grad()
    def known(self, images: ImageSet, views: int, with_features: bool) -> Known:
        """What the frozen models say of each image, as it is and (``views`` 2) mirrored."""
        logits, features = [], []
        for start in range(0, len(images), FORWARD_BATCH):
            chunk = images.rows(slice(start, start + FORWARD_BATCH))
            seen = [self.to_device(chunk)]
            if views == 2:
                everyone = torch.ones(len(chunk), dtype=torch.bool)
                seen.append(self.to_device(mirror(chunk, everyone, self.teacher.grid)))
            logits.append(torch.stack([self.teacher_logits(view) for view in seen], 1))
            if with_features:
                read = [self.student.features(self.shown(view), view.keep) for view in seen]
                features.append(torch.stack(read, 1))
        return Known(torch.cat(logits), torch.cat(features) if features else None)

    def to_device(self, images: ImageSet) -> ImageSet:
        """The images on the device of the models."""
        device = self.student.device
        return ImageSet(images.pixels.to(device), None if images.keep is None else images.keep.to(device))
