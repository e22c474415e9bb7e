"""A packed set as a source of images: the same training as from the folder, and damage found."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastalex.data import (
    Batches,
    DataError,
    Normalization,
    PackedImages,
    decode_size,
    open_sources,
)
from fastalex.data.__main__ import main
from fastalex.data.decode import read_whole
from fastalex.data.pack import pack
from fastalex.data.pixels import load_pixels
from tests._packing import oracle, picture
from tests._pictures import save, smooth

IMAGE_SIZE = 28
SIZE = decode_size(IMAGE_SIZE)


def write(root: Path, val: str = "ab") -> Path:
    random = np.random.default_rng(3)
    for part, names, count in (("train", "ab", 18), ("val", val, 3)):
        for name in names:
            for i in range(count):
                save(root / part / name / f"{i:02d}.jpg", picture(random, 40 + i, 50))
    (root / "train" / "a" / "05.jpg").write_text("broken")
    return root


@pytest.fixture(autouse=True)
def several_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small sets in more than one file, as large ones are."""
    monkeypatch.setattr("fastalex.data.pack._LEAST_SHARD_IMAGES", 32)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    pack(write(tmp_path / "source"), tmp_path / "set", SIZE, 2, quiet=True)
    return tmp_path / "set"


def test_training_from_a_set_sees_what_training_from_the_folder_sees(
    root: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from_set = open_sources(root, 0, IMAGE_SIZE)
    assert capfd.readouterr() == ("", "")
    from_folder = open_sources(tmp_path / "source", 0, IMAGE_SIZE, quiet=True)
    for ours, theirs, count in zip(from_set, from_folder, (35, 6), strict=True):
        assert len(ours) == count
        assert ours.classes == theirs.classes
        assert ours.labels.tolist() == theirs.labels.tolist()
        assert [ours.name(i) for i in range(count)] == [theirs.name(i) for i in range(count)]
    norms = [Normalization.measure(train, SIZE) for train, _ in (from_set, from_folder)]
    assert norms[0] == norms[1]
    one, other = (
        [
            Batches(train, 8, IMAGE_SIZE, norms[0], 1, True, workers=w),
            Batches(val, 4, IMAGE_SIZE, norms[0], 1, False),
        ]
        for (train, val), w in ((from_set, 3), (from_folder, 0))
    )
    for ours, theirs in zip(one, other, strict=True):
        for a, b in zip(ours.epoch(2), theirs.epoch(2), strict=True):
            for name, value in vars(a).items():
                assert (value is None) == (getattr(b, name) is None)
                assert value is None or torch.equal(value, getattr(b, name)), name


def test_images_are_mapped_and_not_copied(root: Path) -> None:
    images = PackedImages(root, "train")
    first, again = images.image(34, SIZE), images.image(34, SIZE)
    assert np.shares_memory(first, again)
    assert not first.flags.writeable
    assert first.shape == (SIZE, SIZE, 3)


@pytest.mark.parametrize("index", [-1, 35])
def test_an_index_outside_the_set_is_refused(root: Path, index: int) -> None:
    with pytest.raises(IndexError, match="expected 0 to 34"):
        PackedImages(root, "train").image(index, SIZE)


def test_another_size_is_resized_and_said_so(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for part in ("train", "val"):
        save(tmp_path / "source" / part / "a" / "1.png", smooth(80, 64))
    pack(tmp_path / "source", tmp_path / "set", 64, 1, quiet=True)
    train, _ = open_sources(tmp_path / "set", 0, 28)
    expected = "Images packed at 64 pixels are resized to 32 as they are read\n"
    assert capfd.readouterr().err == expected
    direct = oracle(tmp_path / "source" / "train" / "a" / "1.png", 32).astype(int)
    # A smooth picture: resized twice it is as resized once, but for rounding and its edges.
    np.testing.assert_allclose(
        train.image(0, 32).astype(int)[2:-2, 2:-2], direct[2:-2, 2:-2], atol=2
    )
    assert train.image(0, 32).shape == (32, 32, 3)


def test_a_class_without_validation_images_is_mentioned(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    pack(write(tmp_path / "source", val="a"), tmp_path / "set", 8, 1, quiet=True)
    open_sources(tmp_path / "set", 0)
    assert "No validation images of b: 1 of 2 classes" in capfd.readouterr().err


def test_a_large_jpeg_is_packed_from_all_its_pixels(tmp_path: Path) -> None:
    """The decoder's own halving would change fine texture by several levels."""
    noise = np.random.default_rng(0).integers(0, 256, (300, 400, 3), np.uint8)
    path = save(tmp_path / "large.jpg", noise, quality=90)
    found, remark = read_whole(path, 64)
    np.testing.assert_array_equal(found, oracle(path, 64))
    assert remark is None
    halved = Image.open(path)
    halved.draft(None, (64, 64))
    assert halved.size == (100, 75)  # what must not be used


@pytest.mark.parametrize("gpu", [False, True])
def test_a_batch_of_bytes_is_page_locked_where_there_is_a_gpu(
    root: Path, monkeypatch: pytest.MonkeyPatch, gpu: bool
) -> None:
    asked = []
    empty = torch.empty

    def recording(*arguments: object, pin_memory: bool, **options: object) -> torch.Tensor:
        asked.append(pin_memory)
        return empty(*arguments, **options)  # type: ignore[call-overload, no-any-return]

    monkeypatch.setattr(torch, "empty", recording)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    images = PackedImages(root, "train")
    batch = load_pixels(images.image, np.array([30, 2, 2]), SIZE)
    assert asked == [gpu]
    assert batch.dtype == torch.uint8
    for found, index in zip(batch, (30, 2, 2), strict=True):
        np.testing.assert_array_equal(found.numpy(), images.image(index, SIZE))


# Damage


def flip(root: Path) -> str:
    """One bit of one pixel."""
    path = root / "train" / "00001.npy"
    data = bytearray(path.read_bytes())
    data[128 + SIZE * SIZE * 3 + 7] ^= 1
    path.write_bytes(data)
    name = PackedImages(root, "train").name(32 - 1 + 1)  # 36 files, one of 32 left out
    return f"{path}: image 1, {Path(name).relative_to(root.parent / 'source')}, does not match"


def cut(root: Path) -> str:
    path = root / "val" / "00000.npy"
    path.write_bytes(path.read_bytes()[:-1])
    return f"{path}: 18,559 bytes long instead of 18,560"


def remove(root: Path) -> str:
    (root / "train" / "00000.npy").unlink()
    return f"{root}/train/00000.npy: missing"


def relabel(root: Path) -> str:
    path = root / "train" / "labels.npy"
    np.save(path, np.load(path)[::-1])
    return f"{path}: damaged, it does not match its checksum"


def edit(root: Path) -> str:
    path = root / "packed.json"
    path.write_text(path.read_text().replace('"a"', '"z"'))
    return f"{path}: damaged, it does not match its checksum"


def empty(root: Path) -> str:
    (root / "packed.json").write_text("")
    return f"{root}/packed.json: damaged, or not a packed set's"


def newer(root: Path) -> str:
    path = root / "packed.json"
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps({**manifest, "format": "fastalex-packed-9"}))
    return f"{path}: expected format 'fastalex-packed-1', got 'fastalex-packed-9'"


def unfinished(root: Path) -> str:
    (root / "packed.json").unlink()
    (root / "packing").mkdir()
    return f"{root}: packing is not finished; run the same pack command again"


def no_set(root: Path) -> str:
    (root / "packed.json").unlink()
    return f"{root}: not a packed set, it has no packed.json"


def test_a_good_set_is_verified(root: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(root)]) == 0
    assert capfd.readouterr() == (f"{root}: all 41 images match their checksums\n", "")


@pytest.mark.parametrize("damage", [flip, cut, remove])
def test_damaged_images_are_named(
    root: Path, capfd: pytest.CaptureFixture[str], damage: Callable[[Path], str]
) -> None:
    expected = damage(root)
    assert main(["verify", str(root)]) == 1
    out, err = capfd.readouterr()
    assert err.startswith(expected)
    assert err.count("\n") == 1
    assert "pack the set again" in out


@pytest.mark.parametrize("damage", [relabel, edit, empty, newer, unfinished, no_set])
def test_a_set_that_cannot_be_verified_is_refused(
    root: Path, capfd: pytest.CaptureFixture[str], damage: Callable[[Path], str]
) -> None:
    expected = damage(root)
    assert main(["verify", str(root)]) == 2
    error = capfd.readouterr().err
    assert error.startswith(f"data: error: {expected}")
    assert error.count("\n") == 1


@pytest.mark.parametrize("damage", [cut, remove, relabel, edit, empty, newer, unfinished])
def test_a_damaged_set_is_not_trained_on(root: Path, damage: Callable[[Path], str]) -> None:
    expected = damage(root)
    with pytest.raises(DataError) as error:
        open_sources(root, 0)
    assert str(error.value).startswith(expected)
