"""Pictures of inverted images for people: a preview, the course of an inversion, composites. Pillow only."""

import math
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from smi_fast.images.process import Process
from smi_fast.images.sparse_images import SparseImages
from smi_fast.kernels.patch_mask import composite

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

GUTTER = 6  # pixels between cells and around the sheet
SMALLEST_CELL = 96  # pixels; narrower images are scaled up by a whole factor
LABEL_ROOM = 120  # most pixels the row labels of a process strip take

# white, so that dropped patches, which are black, stand out from the sheet
PAPER, INK, WARNING = (255, 255, 255), (38, 42, 48), (196, 30, 30)


@dataclass(frozen=True)
class _Sheet:
    """Cells of ``width`` x ``height`` pixels with room for a caption under each, a header and row labels."""

    columns: int
    rows: int
    width: int
    height: int
    caption: int = 0
    header: int = 0
    left: int = 0

    def blank(self) -> Image.Image:
        across = self.left + GUTTER + self.columns * (self.width + GUTTER)
        down = self.header + GUTTER + self.rows * (self.height + self.caption + GUTTER)
        return Image.new("RGB", (across, down), PAPER)

    def origin(self, row: int, column: int) -> tuple[int, int]:
        x = self.left + GUTTER + column * (self.width + GUTTER)
        return x, self.header + GUTTER + row * (self.height + self.caption + GUTTER)


def preview_grid(
    images: SparseImages, columns: int | None = None, limit: int = 100, scale: int | None = None
) -> Image.Image:
    """The first images in a grid, dropped patches black, under each its class and the teacher's confidence.

    The confidence is red where the teacher's class is another one; an image that a NaN stopped says "failed".

    Args:
        images: at least one.
        columns: cells in a row; None: as square a grid as possible.
        limit: most images to show.
        scale: whole factor of enlargement, nearest neighbour; None: the least that makes a cell 96 pixels wide.

    Returns:
        An RGB image.

    Raises:
        ValueError: no images, or ``columns``, ``limit`` or ``scale`` below 1.
    """
    return composite_grid(images, torch.zeros(3, 1, 1, dtype=torch.uint8), columns, limit, scale)


def composite_grid(
    images: SparseImages,
    backgrounds: Tensor,
    columns: int | None = None,
    limit: int = 100,
    scale: int | None = None,
) -> Image.Image:
    """`preview_grid` with the kept patches of each image over a background in place of black.

    Args:
        images: at least one.
        backgrounds: uint8, ``[3, 1, 1]`` for a colour, ``[3, H, W]`` for one picture, ``[n, 3, H, W]`` for one each.
        columns: as in `preview_grid`.
        limit: as in `preview_grid`.
        scale: as in `preview_grid`.

    Returns:
        An RGB image.

    Raises:
        ValueError: as `preview_grid`, or backgrounds of another shape or dtype.
    """
    _check_at_least_one(images=len(images), columns=columns, limit=limit, scale=scale)
    n, _, height, width = images.pixels.shape
    if tuple(backgrounds.shape) not in {(3, 1, 1), (3, height, width), (n, 3, height, width)}:
        shapes = f"[3, 1, 1], [3, {height}, {width}] or [{n}, 3, {height}, {width}]"
        raise ValueError(f"backgrounds is {list(backgrounds.shape)}: must be {shapes}")
    if backgrounds.dtype != torch.uint8:
        raise ValueError(f"backgrounds is {backgrounds.dtype}: must be torch.uint8, 0..255")
    shown = images[:limit]
    fill = (backgrounds[:limit] if backgrounds.ndim == 4 else backgrounds).to(shown.pixels.device)
    pixels = composite(shown.to_uint8(), shown.keep, shown.grid, fill)
    return _captioned_grid(shown, pixels, columns or math.ceil(math.sqrt(len(shown))), scale or _default_scale(width))


def process_strip(process: Process, class_names: Sequence[str] | None = None, rows: int = 8) -> Image.Image:
    """The course of an inversion: a row an image, a column an iteration, patches that have stopped black.

    Args:
        process: the snapshots.
        class_names: by label; a label that has none is shown as its number.
        rows: most images to show.

    Returns:
        An RGB image.

    Raises:
        ValueError: ``rows`` below 1.
    """
    _check_at_least_one(rows=rows)
    shown = min(rows, len(process))
    scale = _default_scale(process.grid.width)
    width, height = process.grid.width * scale, process.grid.height * scale
    font, line = _font(width)
    names = [_class_name(label, class_names) for label in process.labels[:shown].tolist()]
    names = [_fit(name, font, LABEL_ROOM) for name in names]
    left = GUTTER + math.ceil(max(font.getlength(name) for name in names))
    sheet = _Sheet(len(process.iterations), shown, width, height, header=line, left=left)
    picture = sheet.blank()
    draw = ImageDraw.Draw(picture)
    for column, iteration in enumerate(process.iterations):
        x, y = sheet.origin(0, column)
        title = f"iteration {iteration}"
        title = title if font.getlength(title) <= width else str(iteration)
        draw.text((x + width / 2, y - 2), title, INK, font, anchor="md")
    pixels = process.black_out()
    for row, name in enumerate(names):
        draw.text((left, sheet.origin(row, 0)[1] + height / 2), name, INK, font, anchor="rm")
        for column in range(sheet.columns):
            picture.paste(_enlarged(pixels[column, row], scale), sheet.origin(row, column))
    return picture


def _captioned_grid(images: SparseImages, pixels: Tensor, columns: int, scale: int) -> Image.Image:
    columns = min(columns, len(images))
    width, height = pixels.shape[3] * scale, pixels.shape[2] * scale
    font, line = _font(width)
    sheet = _Sheet(columns, math.ceil(len(images) / columns), width, height, caption=line)
    picture = sheet.blank()
    draw = ImageDraw.Draw(picture)
    for i in range(len(images)):
        x, y = sheet.origin(*divmod(i, columns))
        picture.paste(_enlarged(pixels[i], scale), (x, y))
        middle = y + height + line / 2
        note, colour = _note(images, i)
        room = width - font.getlength(note) - GUTTER
        name = _class_name(int(images.labels[i]), images.provenance.class_names)
        draw.text((x, middle), _fit(name, font, room), INK, font, "lm")
        draw.text((x + width, middle), note, colour, font, "rm")
    return picture


def _note(images: SparseImages, i: int) -> tuple[str, tuple[int, int, int]]:
    if images.failed_at[i] >= 0:
        return "failed", WARNING
    return f"{images.confidence[i].item():.2f}", INK if images.predicted[i] == images.labels[i] else WARNING


def _class_name(label: int, class_names: Sequence[str] | None) -> str:
    if class_names is None or not 0 <= label < len(class_names):
        return str(label)
    # Pillow's own font draws a box for what is not ASCII: take accents off, and show the number if nothing is left
    ascii_only = unicodedata.normalize("NFKD", class_names[label]).encode("ascii", "ignore").decode()
    return " ".join(ascii_only.split()) or str(label)


def _default_scale(width: int) -> int:
    return math.ceil(SMALLEST_CELL / width)


def _font(cell: int) -> tuple[Font, int]:
    """A font that suits cells this many pixels wide, and the height of its lines in pixels."""
    size = min(max(cell // 8, 11), 15)
    return ImageFont.load_default(size), size + 7


def _fit(text: str, font: Font, room: float) -> str:
    """As much of the text as fits in ``room`` pixels, with an ellipsis where some is left out."""
    if font.getlength(text) <= room:
        return text
    for length in range(len(text) - 1, 0, -1):
        short = text[:length].rstrip(" ,") + "…"
        if font.getlength(short) <= room:
            return short
    return ""


def _enlarged(pixels: Tensor, scale: int) -> Image.Image:
    height, width = pixels.shape[1:]
    image = Image.fromarray(pixels.permute(1, 2, 0).contiguous().cpu().numpy())
    return image.resize((width * scale, height * scale), Image.Resampling.NEAREST)


def _check_at_least_one(**counts: int | None) -> None:
    for name, count in counts.items():
        if count is not None and count < 1:
            raise ValueError(f"{name}={count}: must be at least 1")
