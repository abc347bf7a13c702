"""`RunFolder`: the files of a training."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from smi_fast.distill.checkpoint import Marks, load_checkpoint, save_checkpoint, saving
from smi_fast.distill.curves import CurveRow, has_tensorboard, open_tensorboard, read_curve, write_curve, write_scalars
from smi_fast.distill.student import Student
from smi_fast.storage.files import save_tensors

CHECKPOINT, CURVE, LAST, BEST = (
    "checkpoint.safetensors",
    "curve.csv",
    "student-last.safetensors",
    "student-best.safetensors",
)
ROUNDS, TENSORBOARD = "rounds", "tensorboard"
STUDENT_FORMAT = "smi_fast.student/1"


class RunFolder:
    """Where a training leaves its files.

    Args:
        out: the folder; made if need be.
        resume: go on from the checkpoint in it.
        overwrite: start anew in a folder that holds something; the files of an earlier training go.
        tensorboard: write event files too.

    Raises:
        ValueError: ``resume`` without a checkpoint or together with ``overwrite``, or TensorBoard is not installed.
        FileExistsError: the folder holds something, and neither is given.
    """

    def __init__(
        self, out: str | Path, *, resume: bool = False, overwrite: bool = False, tensorboard: bool = False
    ) -> None:
        self.out, self.resume, self.tensorboard = Path(out), resume, tensorboard
        if resume and overwrite:
            raise ValueError("resume=True and overwrite=True exclude each other")
        if tensorboard and not has_tensorboard():
            raise ValueError("tensorboard=True: the package is not installed; pip install 'smi-fast[tensorboard]'")
        if resume and not (self.out / CHECKPOINT).is_file():
            raise ValueError(f"resume=True: there is no checkpoint in out={str(out)!r}; start without resume")
        if self.out.exists() and not self.out.is_dir():
            raise NotADirectoryError(f"out={str(out)!r}: is a file, not a folder")
        if self.out.is_dir() and any(self.out.iterdir()) and not (resume or overwrite):
            raise FileExistsError(f"out={str(out)!r}: is not empty; name another folder, or resume or overwrite")
        self.curve: list[CurveRow] = []
        self.writer: Any = None

    @property
    def rounds(self) -> Path:
        """The folder of the rounds' images."""
        return self.out / ROUNDS

    def begin(self, fingerprint: Mapping[str, Any]) -> tuple[dict[str, Tensor], Marks] | None:
        """Clear away what is left of another run, and give what there is to go on from.

        Raises:
            ValueError: the checkpoint is damaged, or of a training that differs.
        """
        found = load_checkpoint(self.out / CHECKPOINT, fingerprint) if self.resume else None
        if found is None:
            for name in (CHECKPOINT, CURVE, LAST, BEST):  # the checkpoint first: without it nothing else counts
                (self.out / name).unlink(missing_ok=True)
            for name in (ROUNDS, TENSORBOARD):
                shutil.rmtree(self.out / name, ignore_errors=True)
        for left in self.out.rglob(".*.tmp"):
            left.unlink()
        marks = Marks() if found is None else found[1]
        if found is not None:
            self.curve = read_curve(self.out / CURVE, marks.rows)
            write_curve(self.out / CURVE, self.curve)
        if self.tensorboard:
            self.writer = open_tensorboard(self.out / TENSORBOARD, marks.step)
        return found

    def add_row(self, row: CurveRow) -> None:
        """Append to the curve."""
        self.curve.append(row)
        write_curve(self.out / CURVE, self.curve)
        if self.writer is not None:
            write_scalars(self.writer, row)

    def save_student(self, name: str, student: Student, marks: Marks) -> None:
        """Write a student for ``timm.create_model(..., checkpoint_path=...)``."""
        facts = {"name": student.info.name, "step": marks.step, "best": marks.best}
        with saving(self.out / name):
            save_tensors(self.out / name, STUDENT_FORMAT, student.vit.state_dict(), facts, overwrite=True)

    def save(self, student: Student, optimizer: Optimizer, marks: Marks, fingerprint: Mapping[str, Any]) -> None:
        """Write the last student and the checkpoint."""
        self.save_student(LAST, student, marks)
        save_checkpoint(self.out / CHECKPOINT, student.vit, optimizer, marks, fingerprint)

    def close(self) -> None:
        """Finish the event files."""
        if self.writer is not None:
            self.writer.close()
