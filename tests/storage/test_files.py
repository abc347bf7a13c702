"""`SparseImages` and `Process` as files: lossless, whole or not at all."""

import errno
import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file as save_foreign

from smi_fast.config import InversionConfig
from smi_fast.images import Process, SparseImages, process
from smi_fast.storage import files
from tests.fakes import assert_same_bits, assert_same_images, make_images, make_process


def test_a_writer_that_fails_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def full_disk(temporary: Path) -> None:
        temporary.write_bytes(b"ne")
        raise OSError(errno.ENOSPC, "no space left on device")

    with pytest.raises(OSError, match="no space"):
        files.write_atomically(path, full_disk, overwrite=True)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {"file": b"old"}


def test_the_content_is_synced_before_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    sync, rename = os.fsync, os.replace

    def fsync(descriptor: int) -> None:
        calls.append("sync")
        sync(descriptor)

    def renamed(source: Path, target: Path) -> None:
        assert source.read_bytes() == b"new"
        calls.append("rename")
        rename(source, target)

    monkeypatch.setattr(files.os, "fsync", fsync)
    monkeypatch.setattr(files.os, "replace", renamed)
    files.write_atomically(tmp_path / "file", b"new")
    assert calls == ["sync", "rename", "sync"]  # the file, its name, the folder


def test_a_save_that_crashes_leaves_the_old_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, images = tmp_path / "images.safetensors", make_images()
    images.save(path)

    def crash(arrays: dict[str, np.ndarray], temporary: Path, metadata: dict[str, str]) -> None:
        Path(temporary).write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(files, "save_file", crash)
    with pytest.raises(KeyboardInterrupt):
        images[:2].save(path, overwrite=True)
    assert_same_images(SparseImages.load(path), images)
    assert list(tmp_path.iterdir()) == [path]


def test_an_existing_file_is_replaced_only_if_asked(tmp_path: Path) -> None:
    path = tmp_path / "new folder" / "file"
    files.write_atomically(path, b"1")
    with pytest.raises(FileExistsError, match="overwrite is False"):
        files.write_atomically(path, b"2")
    assert path.read_bytes() == b"1"
    files.write_atomically(path, b"2", overwrite=True)
    assert path.read_bytes() == b"2"


def test_files_get_the_mode_of_the_umask(tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    make_images().save(tmp_path / "images")
    assert (tmp_path / "images").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_json_is_plain_and_complete(tmp_path: Path) -> None:
    value = {"a": [1, None, "é"]}
    files.write_json(tmp_path / "a.json", value)
    text = (tmp_path / "a.json").read_text(encoding="utf-8")
    assert json.loads(text) == value
    assert "é" in text
    assert text.endswith("}\n")
    with pytest.raises(ValueError, match="JSON"):
        files.write_json(tmp_path / "b.json", {"loss": float("nan")})
    assert not (tmp_path / "b.json").exists()


@pytest.mark.parametrize("n", [0, 1, 5])
def test_images_come_back_bit_for_bit(tmp_path: Path, n: int) -> None:
    images = make_images(max(n, 1))[:n]
    if n:
        odd = torch.tensor([float("nan"), float("inf"), -0.0, 1e-42])
        images.pixels[0, 0, 0, :4] = odd
        images.pixels.view(torch.int32)[0, 0, 1, 0] = 0x7FC12345  # a NaN with a payload
    images.save(tmp_path / "a")
    assert_same_images(SparseImages.load(tmp_path / "a"), images)


def test_views_that_share_memory_can_be_saved(tmp_path: Path) -> None:
    images = make_images()[::2]
    images = replace(images, predicted=images.labels)
    images.save(tmp_path / "a")
    assert_same_images(SparseImages.load(tmp_path / "a"), images)


def test_the_same_images_give_the_same_bytes(tmp_path: Path) -> None:
    images = make_images()
    for i in range(8):
        images.save(tmp_path / str(i))
    assert len({path.read_bytes() for path in tmp_path.iterdir()}) == 1


def test_the_configuration_survives(tmp_path: Path) -> None:
    make_images().save(tmp_path / "a")
    assert InversionConfig.from_dict(SparseImages.load(tmp_path / "a").provenance.config) == InversionConfig()


def test_a_process_comes_back_bit_for_bit(tmp_path: Path) -> None:
    before = make_process(make_images())
    before.save(tmp_path / "a")
    after = Process.load(tmp_path / "a")
    assert (after.iterations, after.patch) == (before.iterations, before.patch)
    assert_same_bits(after, before, process.TENSORS)
    with pytest.raises(FileExistsError):
        before.save(tmp_path / "a")


@pytest.mark.parametrize("kind", [SparseImages, Process])
def test_files_that_cannot_be_loaded(tmp_path: Path, kind: type[SparseImages] | type[Process]) -> None:
    for missing in (tmp_path / "none", tmp_path):
        with pytest.raises(FileNotFoundError, match="no such file"):
            kind.load(missing)
    images, path = make_images(), tmp_path / "file"
    own: SparseImages | Process = images if kind is SparseImages else make_process(images)
    other: SparseImages | Process = make_process(images) if kind is SparseImages else images
    own.save(path)
    whole = path.read_bytes()
    for broken in (b"", b"\x89PNG", whole[:50], whole[: len(whole) // 2], whole[:-1]):
        path.write_bytes(broken)
        with pytest.raises(ValueError, match=r"path=.*file.*not a whole"):
            kind.load(path)
    path.write_bytes(whole.replace(b"/1", b"/2"))
    with pytest.raises(ValueError, match=r"path=.*/2"):
        kind.load(path)
    other.save(path, overwrite=True)
    with pytest.raises(ValueError, match=r"path=.*its format is"):
        kind.load(path)
    foreign = {"no smi_fast metadata": (None, {"format": "pt"}), "not a whole": ({"smi_fast": "{"}, {"smi_fast": "{}"})}
    for message, metadata in ((message, one) for message, several in foreign.items() for one in several):
        save_foreign({"weight": torch.zeros(2)}, path, metadata)
        with pytest.raises(ValueError, match=rf"path=.*{message}"):
            kind.load(path)


def test_a_file_without_one_of_its_tensors_is_refused(tmp_path: Path) -> None:
    metadata = {"iterations": [0], "patch": 4}
    files.save_tensors(tmp_path / "a", process.FORMAT, {"labels": torch.zeros(1)}, metadata, overwrite=False)
    with pytest.raises(ValueError, match=r"path=.*pixels"):
        Process.load(tmp_path / "a")
