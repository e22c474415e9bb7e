"""The photographs: cut from separate parts, written whole or not at all, and said where."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fastalex.data import photos
from fastalex.data.__main__ import main
from fastalex.data.datasets import open_datasets
from fastalex.data.photos import PHOTOS, Box, Photo, write_photos
from tests._types import Capture, Patch

needs_pictures = pytest.mark.skipif(
    importlib.util.find_spec("skimage") is None, reason="needs scikit-image's pictures"
)


def run(*arguments: object) -> int:
    """The exit code of ``python -m fastalex.data ARGUMENTS``, in this process."""
    try:
        return main([str(argument) for argument in arguments])
    except SystemExit as error:
        return int(error.code or 0)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos") / "P"
    assert write_photos(folder, (6, 3)) == 9 * len(PHOTOS)
    return folder


@pytest.fixture(scope="module")
def manifest(written: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((written / "manifest.json").read_text(encoding="utf-8"))
    return values


def original(name: str) -> Image.Image:
    (file,) = (photo.file for photo in PHOTOS if photo.name == name)
    folder = importlib.util.find_spec("skimage")
    assert folder is not None
    assert folder.submodule_search_locations is not None
    return Image.open(Path(folder.submodule_search_locations[0]) / "data" / file)


@needs_pictures
def test_the_folder_is_what_training_reads(written: Path) -> None:
    train, val = open_datasets(written, 0, quiet=True)
    assert train.classes == val.classes == sorted(photo.name for photo in PHOTOS)
    assert np.bincount(train.labels).tolist() == [6] * len(PHOTOS)
    assert np.bincount(val.labels).tolist() == [3] * len(PHOTOS)
    assert train.unreadable == val.unreadable == []  # type: ignore[attr-defined]


@needs_pictures
def test_every_file_is_the_crop_that_the_manifest_says(
    written: Path, manifest: dict[str, Any]
) -> None:
    files = {path.relative_to(written).as_posix() for path in written.glob("*/*/*.jpg")}
    assert {crop["file"] for crop in manifest["crops"]} == files
    for crop in manifest["crops"]:
        assert crop["file"].split("/")[1] == crop["photo"]
        left, top, right, bottom = crop["box"]
        assert any(within(crop["box"], region) for region in regions(crop))
        assert right - left == bottom - top >= 128
        photo = original(crop["photo"])
        assert 0 <= left < right <= photo.width
        assert 0 <= top < bottom <= photo.height
        saved = Image.open(written / crop["file"])
        assert saved.size == (right - left, bottom - top)
        expected = np.asarray(photo.convert("L"), float)[top:bottom, left:right]
        error = np.abs(np.asarray(saved.convert("L"), float) - expected).mean()
        assert error < 4  # JPEG's own; a crop one pixel off in the gravel is off by more than 8


def regions(crop: dict[str, Any]) -> tuple[Box, ...]:
    (photo,) = (photo for photo in PHOTOS if photo.name == crop["photo"])
    return photo.train if crop["file"].startswith("train/") else (photo.val,)


def within(box: Box, region: Box) -> bool:
    return all(a >= b for a, b in zip(box[:2], region[:2], strict=True)) and all(
        a <= b for a, b in zip(box[2:], region[2:], strict=True)
    )


@needs_pictures
@pytest.mark.parametrize("photo", PHOTOS, ids=lambda photo: photo.name)
def test_no_crop_can_mix_training_and_validation(photo: Photo) -> None:
    width, height = original(photo.name).size
    parts = {"train": photo.train, "val": (photo.val,)}
    cover = {part: np.zeros((height, width), bool) for part in parts}
    for part, boxes in parts.items():
        for left, top, right, bottom in boxes:
            assert 0 <= left <= right - 128
            assert right <= width
            assert 0 <= top <= bottom - 128
            assert bottom <= height
            cover[part][top:bottom, left:right] = True
    assert not (cover["train"] & cover["val"]).any()


@needs_pictures
def test_it_writes_the_same_files_each_time(written: Path, tmp_path: Path) -> None:
    write_photos(tmp_path / "P", (6, 3))
    first, second = (
        {p.relative_to(root): p.read_bytes() for p in root.rglob("[!.]*.*")}
        for root in (written, tmp_path / "P")
    )
    assert first == second


@needs_pictures
def test_the_manifest_names_author_and_licence_of_every_photograph(
    manifest: dict[str, Any],
) -> None:
    assert [photo["name"] for photo in manifest["photos"]] == [photo.name for photo in PHOTOS]
    for photo in manifest["photos"]:
        assert photo["credit"].endswith((" CC0.", " public domain."))
        assert photo["source"].startswith("http")


@needs_pictures
def test_the_last_line_says_where_and_what_next(
    tmp_path: Path, capsys: Capture, monkeypatch: Patch
) -> None:
    folder = tmp_path / "my photos"
    folder.mkdir()  # an empty folder is taken
    monkeypatch.setattr("fastalex.data.__main__.write_photos", lambda p: write_photos(p, (1, 1)))
    assert run("photos", folder) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == f"20 crops are in '{folder}'; next: python -m fastalex.train --data '{folder}'"
    assert [path.name for path in tmp_path.iterdir()] == ["my photos"]


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_a_place_in_use_is_refused_and_left_alone(
    tmp_path: Path, capsys: Capture, kind: str
) -> None:
    place = tmp_path / "P"
    kept = place
    if kind == "folder":
        place.mkdir()
        kept = place / "mine.txt"
    kept.write_text("keep")
    assert run("photos", place) == 2
    expected = f"data: error: {place}: exists and is not an empty folder; name another one\n"
    assert capsys.readouterr().err == expected
    assert kept.read_text() == "keep"
    assert list(tmp_path.rglob("*")) == ([place, kept] if kind == "folder" else [place])


def test_without_scikit_image_it_says_what_to_install(
    tmp_path: Path, capsys: Capture, monkeypatch: Patch
) -> None:
    monkeypatch.setattr(photos.importlib.util, "find_spec", lambda name: None)
    assert run("photos", tmp_path / "P") == 2
    expected = 'data: error: scikit-image is missing; run: pip install "fastalex[photos]"\n'
    assert capsys.readouterr().err == expected
    assert list(tmp_path.iterdir()) == []


@needs_pictures
@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (OSError(28, "No space left on device"), 2, "error: [Errno 28] No space left on device"),
        (KeyboardInterrupt(), 130, "interrupted, nothing was written"),
    ],
)
def test_what_fails_half_way_leaves_nothing(
    tmp_path: Path,
    capsys: Capture,
    monkeypatch: Patch,
    error: BaseException,
    code: int,
    message: str,
) -> None:
    saved = 0

    def save(self: Image.Image, *arguments: object, **options: object) -> None:
        nonlocal saved
        saved += 1
        if saved == 5:
            raise error

    monkeypatch.setattr(Image.Image, "save", save)
    assert run("photos", tmp_path / "P") == code
    assert capsys.readouterr().err == f"data: {message}\n"
    assert list(tmp_path.iterdir()) == []
