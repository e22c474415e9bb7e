"""Packing a folder: every good image once, every bad one named, whatever interrupts it."""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import signal
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
from PIL import Image

from fastalex.data import DataError, PackedImages
from fastalex.data.__main__ import main
from fastalex.data.base import printable
from fastalex.data.datasets import open_datasets
from fastalex.data.normalization import Moments
from fastalex.data.pack import Shard, pack
from tests import _commands
from tests._packing import ODD, UNREADABLE, oracle, write_folder
from tests._pictures import save, smooth
from tests._types import Capture, Patch

GOOD, BAD_SETS = 176, 3  # with 8 kinds of bad files: 200
FILES = GOOD + 8 * BAD_SETS
SIDE = 64
SIZED = ("--size", str(SIDE))


def contents(root: Path) -> dict[str, bytes]:
    paths = (path for path in root.rglob("*") if path.is_file())
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in paths}


def run(*arguments: object) -> int:
    """The exit code of ``python -m fastalex.data ARGUMENTS``, in this process."""
    try:
        return main([str(argument) for argument in arguments])
    except SystemExit as error:
        return int(error.code or 0)


def small(root: Path, names: str = "ab", count: int = 2) -> Path:
    """A folder without train and val."""
    for name in names:
        for i in range(count):
            save(root / name / f"{i}.png", smooth(20 + i, 24))
    return root


class Set(NamedTuple):
    source: Path
    root: Path
    out: str
    err: str


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Set:
    """200 files, 24 of them bad, packed by the command line in one go."""
    folder = tmp_path_factory.mktemp("pack")
    source = write_folder(folder / "source", GOOD, BAD_SETS)
    arguments = ["-m", "fastalex.data", "pack", "source", "whole set", "--workers", "2", *SIZED]
    process = _commands.run(arguments, folder)
    assert process.returncode == 0, process.stderr
    return Set(source, folder / "whole set", process.stdout, process.stderr)


@pytest.fixture
def copy(made: Set, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made.root, tmp_path / "copy"))


# What is in a set


def test_every_readable_image_is_packed_as_an_independent_decoder_has_it(made: Set) -> None:
    seen = set()
    for part in ("train", "val"):
        images = PackedImages(made.root, part)
        assert images.classes == ["cat", "dog"]
        for i in range(len(images)):
            path = Path(images.name(i))
            assert path.parent == made.source / part / images.classes[images.labels[i]]
            found = images.image(i, SIDE)
            # Ours is turned upright after resizing, the oracle before: rounding only.
            turned = Image.open(path).getexif().get(0x0112, 1) > 1
            expected = oracle(path, SIDE).astype(int)
            np.testing.assert_allclose(found.astype(int), expected, atol=1 if turned else 0)
            seen.add(path)
    readable = {p for p in made.source.rglob("*.*") if not p.name.endswith(UNREADABLE)}
    assert len(readable) == FILES - len(UNREADABLE) * BAD_SETS
    assert seen == readable


def test_every_bad_file_is_named_with_what_is_wrong(made: Set) -> None:
    tables = {}
    for name in ("left_out.tsv", "odd.tsv"):
        lines = (made.root / name).read_text().splitlines()
        tables[name] = dict(line.split("\t") for line in lines)
    left_out, odd = tables["left_out.tsv"], tables["odd.tsv"]
    bad = {p.relative_to(made.source).as_posix() for p in made.source.rglob("bad*")}
    assert len(bad) == 8 * BAD_SETS
    unreadable = {file for file in bad if file.endswith(UNREADABLE)}
    assert set(left_out) == unreadable
    for file, reason in left_out.items():
        kind = file.rpartition("-")[2]
        words = {
            "empty.jpg": "empty file",
            "text.jpg": "not an image",
            "truncated.jpg": "truncated",
        }
        assert words[kind] in reason
    for file in bad - unreadable:
        assert odd[file] == ODD[file.rpartition("-")[2]]
    for file in unreadable:
        assert file in made.err
    named = [file for file, remark in odd.items() if remark == "PNG under the name of a JPEG"]
    assert named
    assert all(Image.open(made.source / file).format == "PNG" for file in named)


def test_the_statistics_are_those_of_the_training_pixels(made: Set) -> None:
    images = PackedImages(made.root, "train")
    pixels = np.stack([images.image(i, SIDE) for i in range(len(images))])
    channels = pixels.reshape(-1, 3).astype(np.float64)
    manifest = json.loads((made.root / "packed.json").read_text())
    np.testing.assert_allclose(manifest["channel_mean"], channels.mean(0), rtol=1e-12)
    np.testing.assert_allclose(images.covariance, np.cov(channels.T, ddof=0), rtol=1e-9)
    expected = pixels.mean(0, dtype=np.float64).astype(np.float32)
    np.testing.assert_array_equal(images.mean_image, expected)
    assert images.mean_image.dtype == np.float32


@pytest.mark.parametrize("white", [True, False])
@pytest.mark.parametrize(("count", "size"), [(1, 1), (40, 37), (17, 256), (3, 1024)])
def test_moments_are_those_of_integers(count: int, size: int, white: bool) -> None:
    """In one piece and in several, to the last digit; white overflows first."""
    images = np.full((count, size, size, 3), 255, np.uint8)
    if not white:
        images = np.random.default_rng(count).integers(0, 256, images.shape, np.uint8)
    images[..., 2] //= 3  # so that channels that change places are seen
    moments = moments_of(images[:5])
    moments.merge(moments_of(images[5:]))
    channels = images.reshape(-1, 3).astype(np.int64)
    assert moments.images == count
    assert (moments.pixels == images.sum(0, dtype=np.int64)).all()
    assert (moments.products == channels.T @ channels).all()


def moments_of(images: np.ndarray) -> Moments:
    moments = Moments(images.shape[1])
    for image in images:
        moments.add(image)
    return moments


def test_any_reader_of_npy_files_can_read_a_shard(made: Set) -> None:
    counts = [len(np.load(path)) for path in sorted((made.root / "train").glob("0*.npy"))]
    assert len(counts) > 2
    assert sum(counts) == len(np.load(made.root / "train" / "labels.npy"))


def test_it_says_how_much_how_fast_and_what_next(made: Set) -> None:
    counts = {part: len(PackedImages(made.root, part)) for part in ("train", "val")}
    first, second, last = made.out.splitlines()
    assert first == (
        f"{counts['train']} training and {counts['val']} validation images are in 'whole set', "
        f"{len(UNREADABLE) * BAD_SETS} files left out"
    )
    assert second.startswith(f"{FILES} files in ")
    assert second.endswith(" images/s")
    assert last == "next: python -m fastalex.train --data 'whole set'"


def test_packing_again_finds_the_set_there(made: Set, capsys: Capture, monkeypatch: Patch) -> None:
    before = contents(made.root)
    monkeypatch.setattr("fastalex.data.pack.pack_shards", lambda *_: pytest.fail("packed again"))
    assert run("pack", made.source, made.root, *SIZED) == 0
    assert "images were already in" in capsys.readouterr().out
    assert contents(made.root) == before


def test_the_command_does_not_wait_for_torch(tmp_path: Path) -> None:
    code = "import sys, fastalex.data.__main__; print(*sys.modules)"
    process = _commands.run(["-c", code], tmp_path)
    assert process.returncode == 0, process.stderr
    modules = process.stdout.split()
    assert "fastalex.data.pack" in modules
    assert "torch" not in modules


# Interrupted


def shards_done(root: Path) -> int:
    return len(list(root.glob("packing/*.npz")))


@pytest.mark.slow
def test_killed_anywhere_and_resumed_it_equals_an_unkilled_packing(
    made: Set, tmp_path: Path
) -> None:
    root = tmp_path / "killed"
    arguments = [
        "-m",
        "fastalex.data",
        "pack",
        str(made.source),
        str(root),
        "--workers",
        "1",
        *SIZED,
    ]
    done = 0
    for moment in (0.3, 0.5, 0.7, 0.9, 1.1, 1.3):
        process = _commands.start(arguments, tmp_path)
        try:
            time.sleep(moment)
        finally:
            process.kill()
            process.communicate()  # returns when every process that held its pipes has ended
        if (root / "packed.json").exists():  # it was done before it was killed
            break
        assert done <= shards_done(root)
        done = shards_done(root)
        if (root / "packing").exists():
            with pytest.raises(DataError, match="packing is not finished"):
                open_datasets(root, 0)
    result = _commands.run(arguments, tmp_path)
    assert result.returncode == 0, result.stderr
    assert contents(root) == contents(made.root)  # nothing left over, either


@pytest.mark.parametrize("leave", [1, 2, 5])
def test_what_is_done_is_not_done_again_and_leftovers_go(
    made: Set, tmp_path: Path, monkeypatch: Patch, leave: int
) -> None:
    """As a kill after ``leave`` shards leaves a set, with the work of an older version beside."""
    root = tmp_path / "set"

    whole = Shard.write

    def stop(self: Shard, images: Iterable[Any]) -> None:
        if shards_done(root) >= leave:
            raise KeyboardInterrupt
        whole(self, images)

    with monkeypatch.context() as patched:
        if leave < 5:
            patched.setattr(Shard, "write", stop)
        else:  # all shards, and no manifest
            patched.setattr("fastalex.data.pack._finish", stopped)
        with pytest.raises(KeyboardInterrupt):
            pack(made.source, root, SIDE, workers=1)
    done = shards_done(root)
    for name in ("packing/train-00000.journal", "train/.x.npy.7.tmp"):
        (root / name).write_text("left")
    packed = pack(made.source, root, SIDE, workers=1)
    assert packed.decoded <= FILES - 24 * done
    assert (packed.decoded == 0) == (leave == 5)
    assert contents(root) == contents(made.root)


# Of the same command, with a pause before each file.
SLOWLY = """
import sys, time
import fastalex.data.pack
from fastalex.data.__main__ import main
pack = sys.modules["fastalex.data.pack"]
read = pack.try_read

def slowly(*arguments, **options):
    time.sleep(0.01)
    return read(*arguments, **options)

pack.try_read = slowly
sys.exit(main())
"""


def test_ctrl_c_says_what_is_kept(made: Set, tmp_path: Path) -> None:
    root = tmp_path / "stopped"
    command = ["pack", str(made.source), str(root), "--workers", "1", *SIZED]
    process = _commands.start(["-c", SLOWLY, *command], tmp_path)
    try:
        _commands.wait_until(lambda: shards_done(root) > 0, "a shard")
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
        out, err = process.communicate(timeout=60)
    finally:
        _commands.end(process)
    assert process.returncode == 130
    assert out == ""
    expected = rf"data: interrupted; \d+ of {FILES} files are done, the same command goes on .*\n"
    assert re.fullmatch(expected, err)


# Refused


def test_a_full_disk_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: Patch, capsys: Capture
) -> None:
    source = small(tmp_path / "source")
    free(monkeypatch, 400_000)
    assert run("pack", source, tmp_path / "set") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "and 0.4 MB are free; free " in error
    assert not (tmp_path / "set").exists()


def test_free_space_counts_what_is_packed_already(tmp_path: Path, monkeypatch: Patch) -> None:
    """Four images of 256 pixels and what is there while they are packed need more than 2 MB."""
    source, root = small(tmp_path / "source"), tmp_path / "set"
    (root / "packing").mkdir(parents=True)
    monkeypatch.setattr("fastalex.data.pack.pack_shards", stopped)
    free(monkeypatch, 1 << 20)
    with pytest.raises(DataError, match="are free"):
        pack(source, root)
    (root / "packing" / "train-00000.pixels").write_bytes(bytes(2 << 20))
    with pytest.raises(KeyboardInterrupt):
        pack(source, root)


def free(monkeypatch: Patch, count: int) -> None:
    """Have every disk say that ``count`` bytes are free."""
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=count))


def other_images(source: Path, root: Path) -> None:
    save(source / "a" / "more.png", smooth(20, 20))


def other_size(source: Path, root: Path) -> None:
    pass


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize(("change", "size"), [(other_images, 16), (other_size, 24)])
def test_a_set_of_other_images_is_left_alone(
    tmp_path: Path,
    monkeypatch: Patch,
    capsys: Capture,
    finished: bool,
    change: Callable[[Path, Path], None],
    size: int,
) -> None:
    source, root = small(tmp_path / "source"), tmp_path / "set"
    with monkeypatch.context() as patch:
        if not finished:
            patch.setattr("fastalex.data.pack.pack_shards", stopped)
        assert run("pack", source, root, "--size", 16, "--val-split", 0.5) == (
            0 if finished else 130
        )
    before = contents(root)
    change(source, root)
    capsys.readouterr()
    assert run("pack", source, root, "--size", size, "--val-split", 0.5) == 2
    expected = f"{root}: holds a packed set of other images, or of another size; name a new folder"
    assert capsys.readouterr().err == f"data: error: {expected}\n"
    assert contents(root) == before


def stopped(*_: object) -> int:
    raise KeyboardInterrupt("stopped")


def in_use(source: Path, root: Path) -> None:
    root.mkdir()
    (root / "mine.txt").write_text("keep")


@pytest.mark.parametrize(
    ("prepare", "options", "message"),
    [
        (lambda source, root: shutil.rmtree(source), [], "{source}: no such folder; images go in"),
        (lambda source, root: (source / "c").mkdir(), [], "{source}/c: no image in it; put some"),
        (
            lambda source, root: [shutil.rmtree(source / name) for name in "ab"],
            [],
            "{source}: no class in it; put images in a sub-folder for each class",
        ),
        (
            lambda source, root: (source / "a").rename(source / "val"),
            [],
            "{source}: a val folder and no train folder beside it",
        ),
        (in_use, [], "{root}: exists and is not an empty folder; name another one"),
        (lambda source, root: root.write_text("x"), [], "{root}: not a folder; name a new one"),
        (lambda *_: None, ["--size", "0"], "from 1 to 1024, got '0'"),
        (lambda *_: None, ["--size", "x"], "--size: expected a whole number from 1"),
        (lambda *_: None, ["--workers", "0"], "--workers: expected a whole number of at"),
        (lambda *_: None, ["--val-split", "1"], "--val-split: expected at least 0 and below 1"),
        (lambda *_: None, ["--speed"], "unrecognized arguments: --speed"),
    ],
)
def test_what_cannot_be_packed_is_refused_in_one_line(
    tmp_path: Path,
    capsys: Capture,
    prepare: Callable[[Path, Path], object],
    options: list[str],
    message: str,
) -> None:
    source, root = small(tmp_path / "source"), tmp_path / "set"
    prepare(source, root)
    before = contents(tmp_path)
    assert run("pack", source, root, *options) == 2
    error = capsys.readouterr().err
    assert message.format(source=source, root=root) in error
    assert error.count("\n") == 1
    assert contents(tmp_path) == before


def test_two_packings_do_not_write_one_set(tmp_path: Path) -> None:
    source, root = small(tmp_path / "source"), tmp_path / "set"
    (root / "packing").mkdir(parents=True)
    with open(root / "packing" / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(DataError, match="another process is packing into it"):
            pack(source, root, 16)


def test_a_part_of_which_nothing_can_be_read_makes_no_set(tmp_path: Path, capsys: Capture) -> None:
    source = small(tmp_path / "source")
    for path in source.rglob("*.png"):
        path.write_text("broken")
    assert run("pack", source, tmp_path / "set", "--size", 16) == 2
    assert "no train image of it can be read" in capsys.readouterr().err
    assert not (tmp_path / "set").exists()
    (tmp_path / "set").mkdir()
    assert run("pack", source, tmp_path / "set", "--size", 16) == 2
    assert list((tmp_path / "set").iterdir()) == []


def test_files_of_every_name_are_packed_or_named(tmp_path: Path, capsys: Capture) -> None:
    source = small(tmp_path / "source", count=10)
    names = [
        "a\rb",
        "a\tb",
        "a\nb",
        "a\r\nb",
        "a\\tb",
        "a\u2028b",
        "a\udcffb",
        "a\x1b[2Jb",
        "-a b ",
    ]
    for name in names:
        save(source / "a" / f"{name}.png", smooth(20, 20))
        (source / "b" / f"{name}.png").write_text("broken")
    (source / "b" / "loop.png").symlink_to(source / "b" / "loop.png")
    (source / "b" / "dangling.png").symlink_to(tmp_path / "nowhere")
    (source / "loop").symlink_to(source / "loop")
    pack(source, tmp_path / "set", 16, 1, 0.0)
    images = PackedImages(tmp_path / "set", "train")
    found = {Path(images.name(i)).name for i in range(len(images))}
    assert {f"{name}.png" for name in names} <= found
    table = (tmp_path / "set" / "left_out.tsv").read_text(encoding="utf-8").splitlines()
    left_out = dict(line.split("\t") for line in table)
    assert left_out == {
        **{printable(f"b/{n}.png".replace("\\", 2 * "\\")): "not an image" for n in names},
        "b/loop.png": "too many levels of symbolic links",
        "b/dangling.png": "no such file or directory",
    }
    assert len(images) + len(left_out) == sum(path.suffix == ".png" for path in source.rglob("*"))
    # The command says it too, on a line for each.
    assert run("pack", source, tmp_path / "set", "--size", 16, "--val-split", 0) == 0
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 11
    assert all(line.isprintable() for line in lines)


def test_a_link_to_itself_is_no_folder(tmp_path: Path, capsys: Capture) -> None:
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    source = small(tmp_path / "source")
    for arguments in ((loop, tmp_path / "set"), (source, loop), (source, loop / "set")):
        assert run("pack", *arguments) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert str(loop) in error


# Without a folder of validation images


@pytest.mark.parametrize(("split", "kept"), [(None, 2), (0.25, 5), (0.0, 0)])
def test_a_share_of_each_class_becomes_the_validation_images(
    tmp_path: Path, split: float | None, kept: int
) -> None:
    source = small(tmp_path / "source", count=20)
    packed = pack(source, tmp_path / "set", 8, 2, split)
    assert packed.counts.get("val", 0) == 2 * kept
    names = {}
    for part in packed.counts:
        images = PackedImages(tmp_path / "set", part)
        names[part] = [images.name(i) for i in range(len(images))]
        assert [Path(name).parent.name for name in names[part]] == [
            images.classes[label] for label in images.labels
        ]
    both = [name for some in names.values() for name in some]
    assert sorted(both) == sorted(str(path) for path in source.rglob("*.png"))
    if kept == 0:
        with pytest.raises(DataError, match="no val images in this packed set"):
            open_datasets(tmp_path / "set", 0)
