"""Contents of a set: equal where every index names the same image; what changed is described."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from fastalex.data import FolderImages, PackedImages, SyntheticImages
from fastalex.data.fingerprint import contents, describe_changes
from fastalex.data.pack import pack
from tests._pictures import save, smooth


def folder(root: Path, images: dict[str, int]) -> Path:
    for name, count in images.items():
        for i in range(count):
            save(root / name / f"{name}{i}.png", smooth(30 + i, 30))
    return root


def test_a_folder_is_told_by_names_and_sizes_alone(tmp_path: Path) -> None:
    before = contents(FolderImages(folder(tmp_path / "first", {"a": 3, "b": 2})))
    shutil.copytree(tmp_path / "first", tmp_path / "second")
    copy = contents(FolderImages(tmp_path / "second"))
    assert copy == before
    assert {name: count for name, (count, _) in before.items()} == {"a": 3, "b": 2}
    assert describe_changes(json.loads(json.dumps(before)), copy) == ""


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda root: (root / "a" / "a0.png").rename(root / "b" / "a0.png"),
            "a: 3 images before, 2 now; b: 2 images before, 3 now",
        ),
        (
            lambda root: (root / "a" / "a0.png").rename(root / "a" / "z.png"),
            "a: other names or sizes of files",
        ),
        (lambda root: save(root / "a" / "a0.png", smooth(99, 98)), "a: other names or sizes"),
        (lambda root: save(root / "c" / "c0.png", smooth(30, 30)), "class 'c' is new"),
        (lambda root: shutil.rmtree(root / "a"), "class 'a' is gone"),
    ],
)
def test_every_change_of_a_folder_is_described(
    tmp_path: Path, change: Callable[[Path], object], said: str
) -> None:
    root = folder(tmp_path, {"a": 3, "b": 2})
    before = contents(FolderImages(root))
    change(root)
    assert describe_changes(before, contents(FolderImages(root))).startswith(said)


def test_of_many_changes_a_few_are_named(tmp_path: Path) -> None:
    before = FolderImages(folder(tmp_path / "a", dict.fromkeys("abcdefgh", 1)))
    now = FolderImages(folder(tmp_path / "b", dict.fromkeys("abcdefgh", 2)))
    said = describe_changes(contents(before), contents(now))
    assert said.startswith("a: 1 images before, 2 now; ")
    assert said.endswith("; and 5 more classes")


def test_a_packed_set_is_told_by_names_and_pixels(tmp_path: Path) -> None:
    source = folder(tmp_path / "source", {"a": 12, "b": 11})
    pack(source, tmp_path / "first", 32, 1)
    save(source / "b" / "b0.png", smooth(30, 31))
    pack(source, tmp_path / "other", 32, 1)
    first, other = (contents(PackedImages(tmp_path / n, "train")) for n in ("first", "other"))
    assert contents(PackedImages(tmp_path / "first", "train")) == first
    assert describe_changes(first, other).startswith("b: other names")


def test_the_built_in_set_is_told_by_seed_part_and_count() -> None:
    kinds = (("train", 20), ("val", 20), ("train", 21), ("train", 20, 1))
    sets = [contents(SyntheticImages(*kind)) for kind in kinds]  # type: ignore[arg-type]
    assert all(one != other for i, one in enumerate(sets) for other in sets[:i])
    assert contents(SyntheticImages("train", 20)) == sets[0]
    assert [count for count, _ in sets[2].values()] == [3] + 9 * [2]
