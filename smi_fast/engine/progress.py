"""What the engine tells about its work while it works."""

import warnings

from smi_fast.schedule import Stage


class Progress:
    """Receives the engine's events; but for a warning, methods do nothing here. Called from the engine's own thread."""

    def group_started(self, index: int, images: int) -> None:
        """Group ``index`` (from 0) begins, with that many images."""

    def compiling(self, bucket: int, buckets: int, kept: int) -> None:
        """Bucket ``bucket`` of ``buckets`` (from 1), of ``kept`` patches, is being compiled."""

    def compiled(self, seconds: float) -> None:
        """That compilation is done."""

    def stage_started(self, index: int, stage: Stage, first: int, images: int) -> None:
        """Stage ``index`` (from 0) begins for ``images`` images of the group, from its image ``first`` on."""

    def stepped(self, iteration: int, loss: float | None) -> None:
        """These images have come to ``iteration``; ``loss`` is a recent mean over them, where one was read."""

    def image_failed(self, image_id: int, iteration: int) -> None:
        """A step of the image was not finite at ``iteration`` (from 0); the image was stopped there."""

    def out_of_memory(self, index: int, batch: int, smaller: int) -> None:
        """A batch of stage ``index`` (from 0) did not fit; the stage goes on with ``smaller`` images at a time."""
        warnings.warn(
            f"stage {index + 1}: out of device memory at a batch of {batch}, going on with {smaller}", stacklevel=2
        )

    def group_finished(self, index: int, images: int) -> None:
        """Group ``index`` is done."""
