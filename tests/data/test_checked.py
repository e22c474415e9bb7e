"""What was found of a folder's files is kept: a later start decodes what is new or changed."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from fastalex.data import DataError, FolderImages
from fastalex.data import decode as decode_module
from fastalex.data import folder as folder_module
from fastalex.data.decode import read_image
from fastalex.data.fingerprint import contents
from fastalex.data.folder import CHECKED
from tests._pictures import save, smooth
from tests._types import Patch


@pytest.fixture
def decoded(monkeypatch: Patch) -> list[str]:
    """The names of the files decoded from here on."""
    names: list[str] = []

    def counting(path: Path, size: int) -> npt.NDArray[np.uint8]:
        names.append(path.name)
        return read_image(path, size)

    monkeypatch.setattr(folder_module, "read_image", counting)
    return names


def folder(root: Path, count: int = 4) -> Path:
    for name in "ab":
        for i in range(count):
            save(root / name / f"{name}{i}.png", smooth(30 + i, 30))
    (root / "b" / "broken.png").write_text("broken")
    return root


def names(source: FolderImages) -> list[str]:
    return [Path(source.name(i)).name for i in range(len(source))]


@pytest.mark.parametrize("size", [None, 16])
def test_a_second_start_decodes_nothing(
    tmp_path: Path, decoded: list[str], size: int | None
) -> None:
    first = FolderImages(folder(tmp_path), size=size)
    assert len(decoded) == 9
    del decoded[:]
    again = FolderImages(tmp_path, size=size)
    assert decoded == []
    assert again.unreadable == first.unreadable
    assert [path for path, _ in again.unreadable] == [str(tmp_path / "b" / "broken.png")]
    assert names(again) == names(first)
    assert contents(again) == contents(first)
    for index in range(len(again)):
        np.testing.assert_array_equal(again.image(index, 16), first.image(index, 16))


def test_files_that_are_new_or_changed_are_decoded_and_no_others(
    tmp_path: Path, decoded: list[str]
) -> None:
    FolderImages(folder(tmp_path))
    (tmp_path / "a" / "a1.png").write_text("broken now")
    save(tmp_path / "b" / "broken.png", smooth(30, 30))
    save(tmp_path / "b" / "new.png", smooth(30, 30))
    (tmp_path / "a" / "a0.png").unlink()
    os.utime(tmp_path / "b" / "b0.png", ns=(1, 1))
    del decoded[:]
    source = FolderImages(tmp_path, size=16)
    assert sorted(decoded) == ["a1.png", "b0.png", "broken.png", "new.png"]
    expected = ["a2.png", "a3.png", "b0.png", "b1.png", "b2.png", "b3.png", "broken.png", "new.png"]
    assert names(source) == expected
    assert [Path(path).name for path, _ in source.unreadable] == ["a1.png"]
    for index in range(len(source)):  # those decoded now are kept at their own index
        expected_image = read_image(Path(source.name(index)), 16)
        np.testing.assert_array_equal(source.image(index, 16), expected_image)
    del decoded[:]
    FolderImages(tmp_path)
    assert decoded == []


def test_a_folder_that_takes_no_file_is_kept_in_the_cache_directory(
    tmp_path: Path, decoded: list[str], monkeypatch: Patch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    root = folder(tmp_path / "data")
    (root / CHECKED).mkdir()  # even the superuser can't write a file there
    FolderImages(root)
    assert len(list((tmp_path / "cache" / "fastalex").iterdir())) == 1
    del decoded[:]
    FolderImages(root)
    assert decoded == []
    # Another folder of the same names is another one.
    other = folder(tmp_path / "other")
    (other / CHECKED).mkdir()
    FolderImages(other)
    assert len(decoded) == 9


def test_without_any_place_it_is_checked_each_time(
    tmp_path: Path, decoded: list[str], monkeypatch: Patch
) -> None:
    (tmp_path / "cache").write_text("no folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    root = folder(tmp_path / "data")
    (root / CHECKED).mkdir()
    assert names(FolderImages(root)) == names(FolderImages(root))
    assert len(decoded) == 18


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 1}', "\xff", '"good"', "null"])
def test_a_damaged_file_costs_a_check_and_no_more(
    tmp_path: Path, decoded: list[str], text: str
) -> None:
    FolderImages(folder(tmp_path))
    whole = (tmp_path / CHECKED).read_text()
    for damaged in (text, whole[: len(whole) // 2], whole.replace('"files": {', '"files": [{')):
        (tmp_path / CHECKED).write_text(damaged)
        del decoded[:]
        source = FolderImages(tmp_path)
        assert len(source) == 8
        assert decoded != []
    del decoded[:]
    FolderImages(tmp_path)
    assert decoded == []


def test_what_may_pass_is_not_kept(tmp_path: Path, decoded: list[str], monkeypatch: Patch) -> None:
    root = folder(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(folder_module, "try_read", lambda *_, **__: "input/output error")
        with pytest.raises(DataError, match="input/output error"):
            FolderImages(root)
    source = FolderImages(root)
    assert len(source) == 8
    assert len(decoded) == 9


def test_ctrl_c_keeps_what_was_done(tmp_path: Path, decoded: list[str], monkeypatch: Patch) -> None:
    root = folder(tmp_path)
    monkeypatch.setattr(folder_module.os, "cpu_count", lambda: 1)

    def interrupted(path: Path, size: int) -> npt.NDArray[np.uint8]:
        if path.name == "b2.png":
            raise KeyboardInterrupt
        return read_image(path, size)

    with monkeypatch.context() as patched:
        patched.setattr(folder_module, "read_image", interrupted)
        with pytest.raises(KeyboardInterrupt):
            FolderImages(root)
    FolderImages(root)
    assert decoded == ["b2.png", "b3.png", "broken.png"]


def test_a_copied_folder_need_not_be_decoded_again(tmp_path: Path, decoded: list[str]) -> None:
    FolderImages(folder(tmp_path / "a"))
    shutil.copytree(tmp_path / "a", tmp_path / "b")  # keeps the times
    del decoded[:]
    FolderImages(tmp_path / "b")
    assert decoded == []


def test_a_read_that_fails_for_a_moment_is_tried_again(tmp_path: Path, monkeypatch: Patch) -> None:
    source = FolderImages(folder(tmp_path))
    pauses: list[float] = []
    monkeypatch.setattr("time.sleep", pauses.append)
    failures = [OSError(5, "Input/output error"), OSError(116, "Stale file handle")]
    plain = Image.open

    def failing(*arguments: object, **more: object) -> object:
        if failures:
            raise failures.pop()
        return plain(*arguments, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(decode_module.Image, "open", failing)
    expected = smooth(30, 30)
    np.testing.assert_array_equal(source.image(0, 30), expected)
    assert len(pauses) == 2
    assert source.whole(0, 30).size == (30, 30)
    failures += [OSError(5, "Input/output error")] * 9
    with pytest.raises(DataError, match=r"a1.png: can't be read any more: input/output error"):
        source.image(1, 30)
    assert len(failures) == 9 - 4
