"""Folders of image files: what is read, what is left out and what is refused."""

from __future__ import annotations

import shutil
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from fastalex.data import DataError, FolderImages, decode_size
from fastalex.data import folder as folder_module
from fastalex.data.datasets import open_datasets
from fastalex.data.decode import read_image
from tests._pictures import save, smooth


def dataset(root: Path, train: str = "ab", val: str = "ab", count: int = 2) -> Path:
    for part, names in (("train", train), ("val", val)):
        for name in names:
            for i in range(count):
                save(root / part / name / f"{i}.jpg", smooth(40 + i, 30))
    return root


# A folder


def test_classes_labels_names_and_order(tmp_path: Path) -> None:
    for name in ("zebra", "Ant", "bee"):
        for file in ("10.jpg", "2.JPEG", "a.png"):
            save(tmp_path / name / file, smooth(30, 30), format="PNG")
    (tmp_path / ".cache").mkdir()
    (tmp_path / "bee" / ".hidden.jpg").write_text("x")
    (tmp_path / "bee" / "notes.txt").write_text("x")
    (tmp_path / "bee" / "folder.jpg").mkdir()
    (tmp_path / "README.md").write_text("x")
    source = FolderImages(tmp_path)
    assert source.classes == ["Ant", "bee", "zebra"]
    assert source.labels.dtype == np.int64
    assert source.labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    files = ["10.jpg", "2.JPEG", "a.png"]
    expected = [str(tmp_path / name / file) for name in source.classes for file in files]
    assert [source.name(i) for i in range(len(source))] == expected
    assert source.unreadable == []


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds next to nothing."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 99)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def test_files_that_cannot_be_read_are_listed_with_the_reason(tmp_path: Path) -> None:
    folder = tmp_path / "a"
    for suffix in ("jpg", "png", "webp", "bmp"):
        whole = save(folder / f"cut.{suffix}", smooth(80, 80)).read_bytes()
        (folder / f"cut.{suffix}").write_bytes(whole[: len(whole) // 2])
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "text.jpg").write_text("this is no picture")
    (folder / "bomb.png").write_bytes(png_header(60_000, 60_000))
    (folder / "dangling.jpg").symlink_to(tmp_path / "nowhere.jpg")
    save(folder / "fine1.jpg", smooth(50, 50))
    save(folder / "fine2.png", smooth(20, 50))
    source = FolderImages(tmp_path, size=16)
    assert [Path(source.name(i)).name for i in range(len(source))] == ["fine1.jpg", "fine2.png"]
    reasons = {Path(path).name: reason for path, reason in source.unreadable}
    cut = {f"cut.{suffix}" for suffix in ("jpg", "png", "webp", "bmp")}
    assert set(reasons) == {"empty.jpg", "text.jpg", "bomb.png", "dangling.jpg"} | cut
    assert reasons["dangling.jpg"] == "no such file or directory"
    assert reasons["empty.jpg"] == "empty file"
    assert reasons["text.jpg"] == "not an image"
    assert reasons["bomb.png"] == "too many pixels to be safe"
    for reason in reasons.values():
        assert reason
        assert "\n" not in reason
    for index, name in enumerate(("fine1.jpg", "fine2.png")):
        np.testing.assert_array_equal(source.image(index, 16), read_image(folder / name, 16))


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The paths decoded from here on."""
    paths: list[Path] = []

    def counting(path: Path, size: int) -> npt.NDArray[np.uint8]:
        paths.append(path)
        return read_image(path, size)

    monkeypatch.setattr(folder_module, "read_image", counting)
    return paths


def test_each_file_is_decoded_once_when_the_size_is_known(
    tmp_path: Path, decoded: list[Path]
) -> None:
    train, val = open_datasets(dataset(tmp_path), 0, image_size=28, quiet=True)
    assert len(decoded) == 8
    for source in (train, val):
        for index in (0, 3, 0):
            image = source.image(index, decode_size(28))
            np.testing.assert_array_equal(image, read_image(Path(source.name(index)), 32))
    assert len(decoded) == 8


def test_images_kept_from_the_check_are_those_of_their_index(
    tmp_path: Path, decoded: list[Path]
) -> None:
    for file in ("0.png", "2.png"):
        (tmp_path / "a").mkdir(exist_ok=True)
        (tmp_path / "a" / file).write_text("broken")
    grey = {"1.png": 10, "3.png": 30, "4.png": 40, "5.png": 50}
    for file, level in grey.items():
        save(tmp_path / "a" / file, np.full((8, 8), level, np.uint8))
    source = FolderImages(tmp_path, size=8)
    del decoded[:]
    assert [int(source.image(i, 8)[0, 0, 0]) for i in range(4)] == list(grey.values())
    assert decoded == []


def test_an_unknown_class_is_refused_before_anything_is_decoded(
    tmp_path: Path, decoded: list[Path]
) -> None:
    unknown_class(dataset(tmp_path))
    with pytest.raises(DataError, match="newt"):
        open_datasets(tmp_path, 0, quiet=True)
    assert decoded == []


def test_images_beyond_the_limit_of_memory_are_decoded_each_time(
    tmp_path: Path, decoded: list[Path]
) -> None:
    dataset(tmp_path)
    source = FolderImages(tmp_path / "train", size=10, cache_bytes=3 * 10 * 10)
    del decoded[:]
    for index in (0, 1, 1):
        assert source.image(index, 10).shape == (10, 10, 3)
    assert decoded == [Path(source.name(1))] * 2


def test_another_process_takes_over_what_was_found_unreadable(
    tmp_path: Path, decoded: list[Path]
) -> None:
    dataset(tmp_path)
    for part in ("train", "val"):
        (tmp_path / part / "a" / "1.jpg").write_text("broken")
    first = open_datasets(tmp_path, 0, quiet=True)
    bad = [*first[0].unreadable, *first[1].unreadable]  # type: ignore[attr-defined]
    assert len(bad) == 2
    del decoded[:]
    again = open_datasets(tmp_path, 0, unreadable=bad, quiet=True)
    assert decoded == []
    for one, other in zip(first, again, strict=True):
        assert one.labels.tolist() == other.labels.tolist() == [0, 1, 1]
        assert [one.name(i) for i in range(3)] == [other.name(i) for i in range(3)]


def test_a_file_that_goes_away_is_named(tmp_path: Path) -> None:
    source = FolderImages(dataset(tmp_path) / "train")
    Path(source.name(2)).unlink()
    with pytest.raises(DataError) as error:
        source.image(2, 16)
    assert (
        str(error.value) == f"{source.name(2)}: can't be read any more: no such file or directory"
    )


# What is refused


def broken_class(root: Path) -> None:
    for path in (root / "train" / "b").iterdir():
        path.write_text("broken")


def unknown_class(root: Path) -> None:
    save(root / "val" / "newt" / "1.jpg", smooth(20, 20))


REFUSED: list[tuple[Callable[[Path], object], str]] = [
    (shutil.rmtree, "{root}: no such folder; images go in train/CLASS and val/CLASS of a folder"),
    (
        lambda root: (shutil.rmtree(root), root.write_text("x")),
        "{root}: not a folder; images go in train/CLASS and val/CLASS of a folder",
    ),
    (
        lambda root: shutil.rmtree(root / "train"),
        "{root}: no train folder in it; images go in train/CLASS and val/CLASS",
    ),
    (
        lambda root: shutil.rmtree(root / "val"),
        "{root}: no val folder in it; images go in train/CLASS and val/CLASS",
    ),
    (
        lambda root: [shutil.rmtree(root / "train" / name) for name in "ab"],
        "{root}/train: no class in it; put images in a sub-folder for each class",
    ),
    (
        lambda root: [shutil.rmtree(root / "val" / name) for name in "ab"],
        "{root}/val: no class in it; put images in a sub-folder for each class",
    ),
    (
        lambda root: [path.unlink() for path in (root / "train" / "a").iterdir()],
        "{root}/train/a: no image that can be read; put images there or remove the folder",
    ),
    (
        broken_class,
        "{root}/train/b: no image that can be read (2 can't be: not an image); "
        "put images there or remove the folder",
    ),
    (
        unknown_class,
        "{root}/val: class 'newt' is none of the classes trained on; "
        "add training images of it or remove it here",
    ),
]


@pytest.mark.parametrize(("change", "message"), REFUSED)
def test_a_folder_that_cannot_be_trained_on_is_refused_in_one_line(
    tmp_path: Path, change: Callable[[Path], object], message: str
) -> None:
    root = dataset(tmp_path / "data")
    change(root)
    with pytest.raises(DataError) as error:
        open_datasets(root, 0, quiet=True)
    assert str(error.value) == message.format(root=root)


# What is said


def test_a_good_folder_is_opened_in_silence(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    open_datasets(dataset(tmp_path), 0)
    assert capfd.readouterr() == ("", "")


def test_files_left_out_are_named_and_counted(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    dataset(tmp_path, count=3)
    (tmp_path / "train" / "b" / "1.jpg").write_text("broken")
    (tmp_path / "val" / "a" / "2.jpg").write_bytes(b"")
    open_datasets(tmp_path, 0)
    out, err = capfd.readouterr()
    assert out == ""
    assert err.splitlines() == [
        f"{tmp_path}/train/b/1.jpg: left out: not an image",
        f"{tmp_path}/val/a/2.jpg: left out: empty file",
        "2 of 12 images can't be read and are left out",
    ]


def test_of_many_files_left_out_ten_are_named(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    dataset(tmp_path)
    for i in range(13):
        (tmp_path / "train" / "a" / f"broken{i:02d}.jpg").write_text("x")
    open_datasets(tmp_path, 0)
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 11
    expected = "13 of 21 images can't be read and are left out, 3 more than named above"
    assert lines[-1] == expected


def test_a_class_without_validation_images_is_mentioned(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    train, val = open_datasets(dataset(tmp_path, train="abc", val="ac"), 0)
    assert train.classes == val.classes == ["a", "b", "c"]
    assert val.labels.tolist() == [0, 0, 2, 2]
    expected = "No validation images of b: 1 of 3 classes are trained but not validated\n"
    assert capfd.readouterr().err == expected
