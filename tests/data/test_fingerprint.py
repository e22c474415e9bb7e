"""Fingerprints: equal where every index names the same image, and a description of what changed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from fastalex.data import FolderImages, PackedImages, SyntheticImages
from fastalex.data.fingerprint import describe_changes
from fastalex.data.pack import pack
from tests._pictures import save, smooth


def folder(root: Path, images: dict[str, int]) -> Path:
    for name, count in images.items():
        for i in range(count):
            save(root / name / f"{name}{i}.png", smooth(30 + i, 30))
    return root


def test_a_folder_is_told_by_names_and_sizes_alone(tmp_path: Path) -> None:
    root = folder(tmp_path / "first", {"a": 3, "b": 2})
    before = FolderImages(root)
    shutil.copytree(root, tmp_path / "second")
    copy = FolderImages(tmp_path / "second")
    assert copy.fingerprint() == before.fingerprint()
    assert copy.contents() == before.contents()
    assert {name: count for name, (count, _) in before.contents().items()} == {"a": 3, "b": 2}
    assert describe_changes(json.loads(json.dumps(before.contents())), copy.contents()) == ""


def test_an_image_moved_to_another_class_is_described(tmp_path: Path) -> None:
    root = folder(tmp_path, {"a": 3, "b": 2})
    source = FolderImages(root)
    count, fingerprint, before = len(source), source.fingerprint(), source.contents()
    (root / "a" / "a0.png").rename(root / "b" / "a0.png")
    now = FolderImages(root)
    assert len(now) == count
    assert now.fingerprint() != fingerprint
    said = describe_changes(before, now.contents())
    assert said == "a: 3 images before, 2 now; b: 2 images before, 3 now"


def rename(root: Path) -> None:
    (root / "a" / "a0.png").rename(root / "a" / "z.png")


def resize(root: Path) -> None:
    save(root / "a" / "a0.png", smooth(99, 98))


def add_class(root: Path) -> None:
    save(root / "c" / "c0.png", smooth(30, 30))


def remove_class(root: Path) -> None:
    shutil.rmtree(root / "a")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (rename, "a: other names or sizes of files"),
        (resize, "a: other names or sizes of files"),
        (add_class, "class 'c' is new"),
        (remove_class, "class 'a' is gone"),
    ],
)
def test_every_change_of_a_folder_is_described(
    tmp_path: Path, change: Callable[[Path], None], said: str
) -> None:
    root = folder(tmp_path, {"a": 3, "b": 2})
    source = FolderImages(root)
    fingerprint, before = source.fingerprint(), source.contents()
    change(root)
    now = FolderImages(root)
    assert now.fingerprint() != fingerprint
    assert describe_changes(before, now.contents()) == said


def test_of_many_changes_a_few_are_named(tmp_path: Path) -> None:
    before = FolderImages(folder(tmp_path / "a", dict.fromkeys("abcdefgh", 1)))
    now = FolderImages(folder(tmp_path / "b", dict.fromkeys("abcdefgh", 2)))
    said = describe_changes(before.contents(), now.contents())
    assert said.startswith("a: 1 images before, 2 now; ")
    assert said.endswith("; and 5 more classes")


def test_a_packed_set_is_told_by_names_and_pixels(tmp_path: Path) -> None:
    source = folder(tmp_path / "source", {"a": 12, "b": 11})
    pack(source, tmp_path / "first", 32, 1, quiet=True)
    shutil.copytree(tmp_path / "first", tmp_path / "copy")
    save(source / "b" / "b0.png", smooth(30, 31))
    pack(source, tmp_path / "other", 32, 1, quiet=True)
    first, copy, other = (
        PackedImages(tmp_path / name, "train") for name in ("first", "copy", "other")
    )
    assert first.fingerprint() == copy.fingerprint() != other.fingerprint()
    assert describe_changes(first.contents(), other.contents()).startswith("b: other names")
    assert PackedImages(tmp_path / "first", "val").fingerprint() != first.fingerprint()


def test_the_built_in_set_is_told_by_seed_part_and_count() -> None:
    sets = [
        SyntheticImages("train", 20),
        SyntheticImages("val", 20),
        SyntheticImages("train", 21),
        SyntheticImages("train", 20, seed=1),
    ]
    assert len({source.fingerprint() for source in sets}) == len(sets)
    assert SyntheticImages("train", 20).fingerprint() == sets[0].fingerprint()
    assert [count for count, _ in sets[2].contents().values()] == [3] + 9 * [2]
