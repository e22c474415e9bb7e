"""A packed set as a source of images: the same training as from the folder, and damage found."""

from __future__ import annotations

import errno
import json
import os
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fastalex.data import DataError, Normalization, PackedImages, decode_size, packed
from fastalex.data.__main__ import main
from fastalex.data.batches import Batches, Transform
from fastalex.data.datasets import open_datasets
from fastalex.data.decode import read_whole
from fastalex.data.fingerprint import digest
from fastalex.data.pack import pack
from tests._packing import oracle, picture
from tests._pictures import save, smooth
from tests._types import Capture, Patch

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
def several_shards(monkeypatch: Patch) -> None:
    """Small sets in more than one file, as large ones are."""
    monkeypatch.setattr("fastalex.data.pack._LEAST_SHARD_IMAGES", 32)


@pytest.fixture(scope="module")
def once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of images and a set of them."""
    folder = tmp_path_factory.mktemp("once")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("fastalex.data.pack._LEAST_SHARD_IMAGES", 32)
        pack(write(folder / "source"), folder / "set", SIZE, 2)
    return folder


@pytest.fixture
def root(once: Path, tmp_path: Path) -> Path:
    """A set of one's own to damage, of the images of ``tmp_path / "source"``."""
    shutil.copytree(once, tmp_path, dirs_exist_ok=True)
    rewrite(tmp_path / "set", lambda manifest: manifest.update(source=str(tmp_path / "source")))
    return tmp_path / "set"


def test_training_from_a_set_sees_what_training_from_the_folder_sees(
    root: Path, tmp_path: Path, capfd: Capture
) -> None:
    from_set = open_datasets(root, 0, IMAGE_SIZE)
    assert capfd.readouterr() == ("", "")
    from_folder = open_datasets(tmp_path / "source", 0, IMAGE_SIZE, quiet=True)
    for ours, theirs, count in zip(from_set, from_folder, (35, 6), strict=True):
        assert len(ours) == count
        assert ours.classes == theirs.classes
        assert ours.labels.tolist() == theirs.labels.tolist()
        assert [ours.name(i) for i in range(count)] == [theirs.name(i) for i in range(count)]
    norms = [Normalization.measure(train, SIZE) for train, _ in (from_set, from_folder)]
    assert norms[0] == norms[1]
    one, other = (
        [
            Batches(train, 8, Transform(IMAGE_SIZE, norms[0]), 1, True, workers=w),
            Batches(val, 4, Transform(IMAGE_SIZE, norms[0]), 1, False),
        ]
        for (train, val), w in ((from_set, 3), (from_folder, 0))
    )
    for ours, theirs in zip(one, other, strict=True):
        for a, b in zip(ours.epoch(2), theirs.epoch(2), strict=True):
            for name, value in vars(a).items():
                other = getattr(b, name)
                same = torch.equal(value, other) if torch.is_tensor(value) else value == other
                assert same, name


def test_images_are_those_of_the_shards_in_order(root: Path) -> None:
    images = PackedImages(root, "train")
    shards = [np.load(root / "train" / f"{number:05d}.npy") for number in range(2)]
    expected = np.concatenate(shards)
    assert len(expected) == len(images) == 35
    for index in (34, 0, 31, 30):
        np.testing.assert_array_equal(images.image(index, SIZE), expected[index])
    for outside in (-1, 35):
        with pytest.raises(IndexError, match="expected 0 to 34"):
            images.image(outside, SIZE)


def test_another_size_is_resized_and_said_so(tmp_path: Path, capfd: Capture) -> None:
    for part in ("train", "val"):
        save(tmp_path / "source" / part / "a" / "1.png", smooth(80, 64))
    pack(tmp_path / "source", tmp_path / "set", 64, 1)
    train, _ = open_datasets(tmp_path / "set", 0, 28)
    expected = "Images packed at 64 pixels are resized to 32 as they are read\n"
    assert capfd.readouterr().err == expected
    direct = oracle(tmp_path / "source" / "train" / "a" / "1.png", 32).astype(int)
    # A smooth picture: resized twice it is as resized once, but for rounding and its edges.
    np.testing.assert_allclose(
        train.image(0, 32).astype(int)[2:-2, 2:-2], direct[2:-2, 2:-2], atol=2
    )
    assert train.image(0, 32).shape == (32, 32, 3)


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
def test_a_batch_is_page_locked_where_there_is_a_gpu(
    root: Path, monkeypatch: Patch, gpu: bool
) -> None:
    asked = []
    empty = torch.empty

    def recording(*arguments: object, pin_memory: bool, **options: object) -> torch.Tensor:
        asked.append(pin_memory)
        return empty(*arguments, **options)  # type: ignore[call-overload, no-any-return]

    images = PackedImages(root, "train")
    unit = Normalization((0.0,) * 3, (1.0,) * 3)
    batches = Batches(images, 5, Transform(IMAGE_SIZE, unit, "full"), 0, True)
    monkeypatch.setattr(torch, "empty", recording)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    batch = next(batches.epoch(0))
    assert asked == [gpu] * len((*batch.inputs, batch.labels))
    for found, label, index in zip(batch.images, batch.labels, batch.indices, strict=True):
        np.testing.assert_array_equal(found.numpy(), images.image(int(index), SIZE))
        assert label == images.labels[index]


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


def empty(root: Path, text: str = "") -> str:
    (root / "packed.json").write_text(text)
    return f"{root}/packed.json: damaged, or not a packed set's"


def no_object(root: Path) -> str:
    return empty(root, "[]")


def deep(root: Path) -> str:
    return empty(root, "[" * 100_000)


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


def test_a_good_set_is_verified(root: Path, capfd: Capture) -> None:
    assert main(["verify", str(root)]) == 0
    assert capfd.readouterr() == (f"{root}: all 41 images match their checksums\n", "")


@pytest.mark.parametrize("damage", [flip, cut, remove])
def test_damaged_images_are_named(
    root: Path, capfd: Capture, damage: Callable[[Path], str]
) -> None:
    expected = damage(root)
    assert main(["verify", str(root)]) == 1
    out, err = capfd.readouterr()
    assert err.startswith(expected)
    assert err.count("\n") == 1
    assert "pack the set again" in out


@pytest.mark.parametrize(
    "damage", [cut, remove, relabel, edit, empty, no_object, deep, newer, unfinished, no_set]
)
def test_a_damaged_set_is_neither_trained_on_nor_verified(
    root: Path, capfd: Capture, damage: Callable[[Path], str]
) -> None:
    expected = damage(root)
    if damage is not no_set:  # it may be a folder of images
        with pytest.raises(DataError) as error:
            open_datasets(root, 0)
        assert str(error.value).startswith(expected)
    if damage not in (cut, remove):
        assert main(["verify", str(root)]) == 2
        said = capfd.readouterr().err
        assert said.startswith(f"data: error: {expected}")
        assert said.count("\n") == 1


@pytest.mark.parametrize("bit", [1, 128])
def test_a_damaged_header_is_noticed_wherever_it_is(root: Path, capfd: Capture, bit: int) -> None:
    path = root / "train" / "00001.npy"
    whole = path.read_bytes()
    for at in range(128):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ bit]) + whole[at + 1 :])
        with pytest.raises(DataError, match=r"00001.npy: its header is damaged"):
            PackedImages(root, "train")
    assert main(["verify", str(root)]) == 1
    err = capfd.readouterr().err
    assert err == f"{path}: its header is damaged; copy the set or pack it again\n"


def test_a_changed_pixel_is_noticed_when_it_is_trained_on(root: Path) -> None:
    images = PackedImages(root, "train")
    expected = flip(root)
    for index in (31, 33):
        images.image(index, SIZE)
    for read in (images.image, images.whole):
        with pytest.raises(DataError) as error:
            read(32, SIZE)
        assert str(error.value).startswith(expected)
        assert str(error.value).endswith("copy the set or pack it again")


def test_a_shard_cut_short_while_it_is_trained_on_is_named(root: Path) -> None:
    """A process that had it mapped would be ended by the system, without a word."""
    images = PackedImages(root, "train")
    images.image(34, SIZE)
    os.truncate(root / "train" / "00001.npy", 128 + SIZE * SIZE * 3 + 100)
    images.image(31, SIZE)
    for index in (32, 34):
        with pytest.raises(DataError, match=r"00001.npy: cut short; copy the set or pack it again"):
            images.image(index, SIZE)
    (root / "train" / "00001.npy").unlink()
    with pytest.raises(DataError, match=r"00001.npy: can't be read: no such file or directory"):
        images.image(34, SIZE)


def test_a_disk_that_fails_is_tried_again_and_then_named(root: Path, monkeypatch: Patch) -> None:
    images = PackedImages(root, "train")
    expected = images.image(3, SIZE)
    pauses: list[float] = []
    monkeypatch.setattr("time.sleep", pauses.append)
    failures = [OSError(errno.EIO, "Input/output error")]

    def failing(*arguments: object) -> object:
        if failures:
            raise failures.pop()
        return preadv(*arguments)  # type: ignore[arg-type]

    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", failing)
    np.testing.assert_array_equal(images.image(3, SIZE), expected)
    assert len(pauses) == 1
    failures += [OSError(errno.EIO, "Input/output error")] * 9
    with pytest.raises(DataError, match=r"00000.npy: can't be read: input/output error"):
        images.image(3, SIZE)
    assert 1 < len(pauses) < 9


def rewrite(root: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a set as its author could: with checksums that are right."""
    path = root / "packed.json"
    manifest = json.loads(path.read_text())
    del manifest["sha256"]
    change(manifest)
    for name in manifest["files"] or ():
        manifest["files"][name] = packed.file_digest(root / name)
    path.write_text(json.dumps({**manifest, "sha256": digest(manifest)}))


def save_labels(root: Path, *labels: int, kind: type[np.generic] = np.int64) -> None:
    path = root / "train" / "labels.npy"
    new = np.load(path)
    new[: len(labels)] = labels
    np.save(path, new.astype(kind))


HARMFUL: list[tuple[Callable[[Path], object], str]] = [
    (lambda root: save_labels(root, 0, 2), "expected labels from 0 to 1, got 0 to 2"),
    (lambda root: save_labels(root, -1), "expected labels from 0 to 1, got -1 to 1"),
    (lambda root: save_labels(root, kind=np.float64), "of another type or shape"),
    (
        lambda root: np.save(root / "train" / "labels.npy", np.zeros((35, 1), np.int64)),
        "of another type or shape",
    ),
    (
        lambda root: np.save(root / "train" / "labels.npy", np.zeros(34, np.int64)),
        "of another type or shape",
    ),
    (lambda root: np.save(root / "train" / "labels.npy", np.array([{}] * 35)), "not an array"),
    (
        lambda root: (root / "train" / "labels.npy").write_bytes(b"\x93NUMPY\x01\0\x05\0((((("),
        "not",
    ),
    (lambda root: (root / "train" / "labels.npy").write_bytes(b""), "not an array"),
    (lambda root: np.save(root / "train" / "checksums.npy", np.zeros(35)), "of another type"),
]


@pytest.mark.parametrize(("change", "message"), HARMFUL)
def test_arrays_of_other_kinds_are_refused_though_their_checksums_are_right(
    root: Path, change: Callable[[Path], object], message: str
) -> None:
    change(root)
    rewrite(root, lambda _: None)
    with pytest.raises(DataError, match=message) as error:
        open_datasets(root, 0)
    assert str(error.value).startswith(str(root))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.update(size=10**9),
        lambda m: m.update(size="32"),
        lambda m: m.update(size=None),
        lambda m: m.update(classes=None),
        lambda m: m.update(classes=["a", 1]),
        lambda m: m.update(classes=["a", "a"]),
        lambda m: m.update(classes=[]),
        lambda m: m.update(parts=None),
        lambda m: m["parts"].update({"../x": m["parts"]["train"]}),
        lambda m: m["parts"]["train"].update(shards=[10**30]),
        lambda m: m["parts"]["train"].update(shards=[-1, 36]),
        lambda m: m.update(covariance=[[float("nan")] * 3] * 3),
        lambda m: m.update(files=None),
        lambda m: m.pop("source"),
    ],
)
def test_manifests_of_no_set_are_refused_though_their_checksum_is_right(
    root: Path, change: Callable[[dict[str, Any]], object]
) -> None:
    rewrite(root, change)
    with pytest.raises(DataError) as error:
        open_datasets(root, 0)
    assert str(error.value).startswith(f"{root}/packed.json: sizes, counts or classes")


def test_names_that_were_changed_are_refused(root: Path) -> None:
    (root / "train" / "names.json").write_text('["a"]')
    images = PackedImages(root, "train")
    with pytest.raises(DataError, match=r"names.json: damaged, it does not match its checksum"):
        images.name(0)


def test_the_checksums_are_zlibs(root: Path) -> None:
    """Whichever library calculates them: sets are read on other machines."""
    pixels = np.load(root / "train" / "00000.npy")
    found = np.load(root / "train" / "checksums.npy")[: len(pixels)]
    assert found.tolist() == [zlib.crc32(image) for image in pixels]
