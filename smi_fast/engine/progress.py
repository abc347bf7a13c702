"""What the engine tells about its work while it works."""

from smi_fast.schedule import Stage


class Progress:
    """Receives the engine's events; every method does nothing here. Called from the engine's own thread."""

    def batch_started(self, index: int, images: int) -> None:
        """Batch ``index`` (from 0) begins, with that many images."""

    def compiling(self, bucket: int, buckets: int, kept: int) -> None:
        """Bucket ``bucket`` of ``buckets`` (from 1), of ``kept`` patches, is being compiled."""

    def compiled(self, seconds: float) -> None:
        """That compilation is done."""

    def stage_started(self, index: int, stage: Stage) -> None:
        """Stage ``index`` (from 0) of the batch begins."""

    def stepped(self, iteration: int, loss: float | None) -> None:
        """``iteration`` steps are done; ``loss`` is a recent mean over the batch, where one was read."""

    def image_failed(self, image_id: int, iteration: int) -> None:
        """A step of the image was not finite at ``iteration`` (from 0); the image was stopped there."""

    def batch_finished(self, index: int, images: int) -> None:
        """Batch ``index`` is done."""
