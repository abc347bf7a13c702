"""What people see of the images: PNG files, previews, the course of an inversion."""

import itertools
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from smi_fast.images import SparseImages, render
from smi_fast.kernels.common.grid import Grid
from smi_fast.kernels.patch_mask import patch_mask
from tests.fakes import NAMES, make_images, make_process


def read_png(path: Path) -> Tensor:
    return torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1)


def test_pngs_show_the_images(tmp_path: Path) -> None:
    images = make_images()
    colours, mask = images.to_uint8(), patch_mask(images.keep, images.grid)
    paths = {dropped: images.save_pngs(tmp_path / dropped, dropped) for dropped in ("black", "alpha", "keep")}
    assert [path.name for path in paths["black"][:3]] == [
        "000010_ant.png",
        "000011_bee_wasp_hornet.png",
        "000012_cat.png",
    ]
    for i in range(len(images)):
        assert torch.equal(read_png(paths["keep"][i]), colours[i])
        assert torch.equal(read_png(paths["black"][i]), colours[i] * mask[i])
        alpha = read_png(paths["alpha"][i])
        assert torch.equal(alpha[:3], colours[i])
        assert torch.equal(alpha[3], mask[i].to(torch.uint8) * 255)
    assert images.save_pngs(tmp_path / "default")[0].read_bytes() == paths["black"][0].read_bytes()


@pytest.mark.parametrize(
    ("name", "stem"),
    [("../../etc", "etc"), ("a\nb\x00c", "a_b_c"), ("x" * 300, "x" * 40), ("//", "0"), ("naïve", "naïve")],
)
def test_class_names_become_safe_file_names(tmp_path: Path, name: str, stem: str) -> None:
    images = make_images(1, names=(name,))
    assert images.save_pngs(tmp_path / "p") == [tmp_path / "p" / f"000010_{stem}.png"]


def test_a_folder_that_holds_something_is_refused(tmp_path: Path) -> None:
    images = make_images()
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="not empty"):
        images.save_pngs(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
    for _ in range(2):
        images.save_pngs(tmp_path, overwrite=True)
    assert len(list(tmp_path.iterdir())) == 6


def test_pngs_that_break_a_rule(tmp_path: Path) -> None:
    images: Any = make_images()
    with pytest.raises(ValueError, match=r"dropped='grey'.*alpha"):
        images.save_pngs(tmp_path / "a", "grey")
    with pytest.raises(ValueError, match="image_ids: must differ"):
        images[torch.tensor([0, 0])].save_pngs(tmp_path / "a")
    assert not (tmp_path / "a").exists()


@st.composite
def grids_and_counts(draw: st.DrawFn) -> tuple[Grid, int]:
    patch, rows, columns = draw(st.integers(1, 5)), draw(st.integers(1, 6)), draw(st.integers(1, 6))
    return Grid(rows * patch, columns * patch, patch), draw(
        st.sampled_from([1, rows * columns, (rows * columns + 1) // 2])
    )


@settings(max_examples=25, deadline=None, derandomize=True)
@given(grids_and_counts())
def test_keep_and_mask_tell_the_same(case: tuple[Grid, int]) -> None:
    grid, kept = case
    images = make_images(3, grid, kept)
    with tempfile.TemporaryDirectory() as folder:
        images.save(Path(folder) / "a")
        loaded = SparseImages.load(Path(folder) / "a")
        paths = loaded.save_pngs(Path(folder) / "png", "alpha")
        alphas = torch.stack([read_png(path)[3] for path in paths]) > 0
    assert torch.equal(loaded.keep, images.keep)
    for keep, alpha in zip(images.keep, alphas, strict=True):
        cells = alpha.reshape(grid.rows, grid.patch, grid.columns, grid.patch)
        assert torch.equal(cells.all(3).all(1), cells.any(3).any(1))  # whole patches
        assert torch.equal(cells[:, 0, :, 0].flatten().nonzero().flatten(), keep)


def as_tensor(picture: Image.Image) -> Tensor:
    assert picture.mode == "RGB"
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


def cells(picture: Image.Image, rows: int, columns: int, size: tuple[int, int], start: tuple[int, int] = (0, 0)) -> Any:
    """The ``[3, h, w]`` cells of a sheet, row-major; ``start`` is the room for row labels and a header."""
    height, width = size
    pixels = as_tensor(picture)
    assert picture.width == start[0] + render.GUTTER + columns * (width + render.GUTTER)
    below, rest = divmod(picture.height - start[1] - render.GUTTER, rows)
    assert rest == 0
    for row, column in itertools.product(range(rows), range(columns)):
        y, x = start[1] + render.GUTTER + row * below, start[0] + render.GUTTER + column * (width + render.GUTTER)
        yield pixels[:, y : y + height, x : x + width]


def enlarged(pixels: Tensor, scale: int) -> Tensor:
    return pixels.repeat_interleave(scale, -2).repeat_interleave(scale, -1)


@pytest.mark.parametrize(("columns", "scale", "rows"), [(None, None, 2), (5, 1, 1), (1, 3, 5), (9, 4, 1), (2, 7, 3)])
def test_a_preview_shows_kept_pixels_and_black(columns: int | None, scale: int | None, rows: int) -> None:
    images = make_images()
    picture = render.preview_grid(images, columns, scale=scale)
    factor = scale or 4  # 24 pixels to 96
    expected = enlarged(images.to_uint8() * patch_mask(images.keep, images.grid)[:, None], factor)
    across = min(columns or 3, 5)
    shown = list(cells(picture, rows, across, (16 * factor, 24 * factor)))
    for want, got in zip(expected, shown[:5], strict=True):
        assert torch.equal(got, want)
    for unused in shown[5:]:
        assert (unused == 255).all()


def test_a_preview_is_limited() -> None:
    images = make_images(9)
    assert render.preview_grid(images, limit=4).tobytes() == render.preview_grid(images[:4]).tobytes()


def test_captions_stay_in_their_cells() -> None:
    images = make_images(4, Grid(32, 32, 4), names=("great white shark, man-eater " * 5, "x\ny", "日本"))
    pixels = as_tensor(render.preview_grid(images, columns=2))
    assert (pixels[:, :, 103:107] == 255).all()  # the gutter between the columns, but for a letter's faint edge
    row = pixels.shape[1] // 2 - 3
    assert (pixels[:, -render.GUTTER :] == 255).all()
    caption = pixels[:, 6 + 96 : row + 6, 6:102]
    assert (caption.amin(0) < 128).any()  # there is one
    assert (pixels[:, row : row + render.GUTTER] == 255).all()


def test_a_caption_warns_of_other_classes_and_failures() -> None:
    red = {i for i in range(5) if render._note(make_images(), i)[1] == render.WARNING}
    assert red == {1, 2, 3, 4}  # 1 has failed, the others are predicted as another class
    assert render._note(make_images(), 1)[0] == "failed"
    assert render._note(make_images(), 0)[0] == f"{make_images().confidence[0]:.2f}"


@pytest.mark.parametrize(("name", "shown"), [("São  Tomé\n", "Sao Tome"), ("日本", "0"), ("ox", "ox")])
def test_names_are_drawn_in_what_the_font_has(name: str, shown: str) -> None:
    assert render._class_name(0, [name]) == shown
    assert render._class_name(1, [name]) == render._class_name(1, None) == "1"


def test_long_names_end_in_an_ellipsis() -> None:
    font, _ = render._font(96)
    short = render._fit("great white shark, man-eater", font, 60)
    assert short.startswith("great")
    assert short.endswith("…")
    assert 40 < font.getlength(short) <= 60
    assert render._fit("ox", font, 60) == "ox"
    assert render._fit("ox", font, 1) == ""


@pytest.mark.parametrize("kind", ["colour", "one", "each"])
def test_a_composite_shows_the_background_where_patches_were_dropped(kind: str) -> None:
    images = make_images()
    pictures = torch.randint(0, 256, (5, 3, 16, 24), generator=torch.Generator().manual_seed(5), dtype=torch.uint8)
    backgrounds = {
        "colour": torch.tensor([9, 99, 199], dtype=torch.uint8)[:, None, None],
        "one": pictures[0],
        "each": pictures,
    }
    picture = render.composite_grid(images, backgrounds[kind], columns=2, limit=4, scale=2)
    mask = patch_mask(images.keep, images.grid)[:, None]
    expected = enlarged(torch.where(mask, images.to_uint8(), backgrounds[kind]), 2)
    for want, got in zip(expected[:4], cells(picture, 2, 2, (32, 48)), strict=True):
        assert torch.equal(got, want)


def test_a_process_strip_shows_rows_of_images_and_columns_of_iterations() -> None:
    process = make_process(make_images(4), (0, 50, 100, 4000))
    picture = render.process_strip(process, NAMES, rows=3)
    left, top = picture.width - 4 * 102 - 6, picture.height - 3 * 70 - 6  # cells are 96 x 64
    assert left > 0
    assert top > 0
    pixels = as_tensor(picture)
    assert (pixels[:, :top].amin(0) < 128).any()  # a header
    assert (pixels[:, :, :left].amin(0) < 128).any()  # row labels
    grid = process.grid
    shown = cells(picture, 3, 4, (64, 96), (left, top))
    for (row, column), got in zip(itertools.product(range(3), range(4)), shown, strict=True):
        keep = process.kept[column, row].nonzero().T
        want = process.pixels[column, row] * patch_mask(keep, grid)
        assert torch.equal(got, enlarged(want, 4))


def test_pictures_that_break_a_rule() -> None:
    images = make_images()
    for wrong, message in (({"columns": 0}, "columns=0"), ({"limit": 0}, "limit=0"), ({"scale": -1}, "scale=-1")):
        with pytest.raises(ValueError, match=message):
            render.preview_grid(images, **wrong)
    with pytest.raises(ValueError, match="images=0"):
        render.preview_grid(images[:0])
    with pytest.raises(ValueError, match="rows=0"):
        render.process_strip(make_process(images), rows=0)
    with pytest.raises(ValueError, match=r"backgrounds is \[4, 3, 16, 24\]"):
        render.composite_grid(images, torch.zeros(4, 3, 16, 24, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"backgrounds is torch\.float32"):
        render.composite_grid(images, torch.zeros(3, 1, 1))
