"""What a training tells on the way."""

from smi_fast.distill.curves import CurveRow


class Progress:
    """Told of the work as it goes on; every method may be overridden, none does anything here."""

    def inverting(self, number: int, images: int) -> None:
        """Round ``number`` (from 0) is being inverted."""

    def preparing(self, images: int) -> None:
        """Teacher's logits (and features) of new images are being worked out."""

    def stepped(self, step: int, loss: float | None) -> None:
        """``step`` steps are done; the loss is given now and then."""

    def evaluating(self, step: int) -> None:
        """The student is being evaluated."""

    def evaluated(self, row: CurveRow) -> None:
        """There is a new row of the curve."""
