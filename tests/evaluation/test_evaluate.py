"""The commands that use weights, at their edges: what they say, refuse and leave out."""

from __future__ import annotations

import errno
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fastalex.data import SyntheticImages, decode_size
from fastalex.data.decode import read_image
from fastalex.evaluation import evaluate, predict
from fastalex.evaluation.ensemble import Ensemble, open_dataset
from fastalex.training.weights import load_weights, save_weights
from tests._nets import CLASSES, SIZE, random_weights
from tests._types import Capture, Patch


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_weights(tmp_path_factory.mktemp("weights") / "a", 0)


def _images(root: Path, part: str, names: list[str], count: int = 1) -> Path:
    """A folder of noise: ``count`` images of each class."""
    random = np.random.default_rng(0)
    for name in names:
        place = root / part / name
        place.mkdir(parents=True)
        for i in range(count):
            pixels = random.integers(0, 256, (SIZE + 30, SIZE + 40, 3), np.uint8)
            pixels[:, : 7 * (i + 1)] //= 4
            Image.fromarray(pixels).save(place / f"{i}.png")
    return root


def _refused(capsys: Capture, *arguments: object) -> str:
    assert evaluate.main([str(argument) for argument in arguments]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("\n") == 1
    return said.err


def test_a_net_that_says_nan_is_named(weights: Path, tmp_path: Path, capsys: Capture) -> None:
    tensors, metadata = load_weights(weights)
    tensors["classifier.6.bias"][0] = float("nan")
    save_weights(tmp_path / "bad", tensors, metadata)
    data = _images(tmp_path / "data", "val", CLASSES[:1])
    error = _refused(capsys, "--weights", weights, tmp_path / "bad", "--data", data)
    assert f"{tmp_path / 'bad'}: its net's output is not finite" in error


def test_some_of_the_classes_will_do_to_validate_but_no_others(
    weights: Path, tmp_path: Path, capsys: Capture
) -> None:
    data = _images(tmp_path / "some", "val", CLASSES[2:4])
    ensemble = Ensemble([weights])
    assert [CLASSES[i] for i in open_dataset(data, "val", ensemble).labels] == CLASSES[2:4]
    _images(tmp_path / "other", "val", [CLASSES[0], "violet"])
    assert "violet" in _refused(capsys, "--weights", weights, "--data", tmp_path / "other")
    # Labels of a net that was trained on these classes would be others.
    (data / "train" / CLASSES[0]).mkdir(parents=True)
    assert "alone 'green'" in _refused(capsys, "--weights", weights, "--data", data)


def test_the_built_in_set_is_the_one_that_the_net_was_trained_on() -> None:
    drawn = SyntheticImages("val", 3, seed=4)
    trained = SyntheticImages("train", 3, seed=4)
    ensemble: Any = SimpleNamespace(classes=drawn.classes, image_size=SIZE, seed=4)
    for found, expected in (
        (open_dataset(None, "val", ensemble), drawn),
        (open_dataset(None, "train", ensemble), trained),
    ):
        assert all(np.array_equal(found.image(i, 32), expected.image(i, 32)) for i in range(3))


def test_the_seed_is_that_of_the_weights(tmp_path: Path) -> None:
    assert Ensemble([random_weights(tmp_path / "a", 0, seed=9)]).seed == 9
    assert Ensemble([random_weights(tmp_path / "b", 0)]).seed == 0


def test_a_bad_file_of_a_folder_is_named_and_the_rest_is_evaluated(
    weights: Path, tmp_path: Path, capsys: Capture
) -> None:
    data = _images(tmp_path, "val", CLASSES)
    bad = data / "val" / CLASSES[0] / "bad.png"
    bad.write_bytes(b"text")
    assert evaluate.main(["--weights", str(weights), "--data", str(data), "--crops", "1"]) == 0
    said = capsys.readouterr()
    count = len(CLASSES) + 1
    assert said.err.splitlines() == [
        f"{bad}: left out: not an image",
        f"1 of {count} images can't be read and are left out",
    ]
    assert f"{len(CLASSES)} images of {len(CLASSES)} classes" in said.out


@pytest.mark.parametrize(("count", "said"), [(5, True), (6, False)])
def test_with_five_classes_the_top_5_error_is_said_to_mean_nothing(
    tmp_path: Path, capsys: Capture, count: int, said: bool
) -> None:
    some = CLASSES[:count]
    weights = random_weights(tmp_path / "a", 0, classes=some)
    data = _images(tmp_path / "data", "val", some)
    assert evaluate.main(["--weights", str(weights), "--data", str(data), "--crops", "1"]) == 0
    out = capsys.readouterr().out
    assert (f"With {count} classes the top-5 error is 0 for any net." in out) is said


def test_the_scores_are_printed_even_if_the_table_can_not_be_written(
    weights: Path, tmp_path: Path, capsys: Capture, monkeypatch: Patch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "table.csv")

    monkeypatch.setattr(evaluate, "replacing", full)
    data = _images(tmp_path / "data", "val", CLASSES)
    arguments = ["--weights", str(weights), "--data", str(data), "--crops", "1"]
    for more in ([], ["--json"]):
        table = str(tmp_path / "table.csv")
        assert evaluate.main([*arguments, "--confusion", table, *more]) == 2
        said = capsys.readouterr()
        assert "top1_error" in said.out if more else "top-1 error" in said.out
        assert said.err.count("\n") == 1
        assert "table.csv" in said.err


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"classes": None}, "classes: expected 7 names, got None"),
        ({"classes": CLASSES[:-1]}, "classes: expected 7 names, got ['blue', 'green'"),
        ({"classes": [*CLASSES[:-1], 7]}, "classes: expected 7 names, got ['blue', 'green'"),
        ({"classes": "abcdefg"}, "classes: expected 7 names, got 'abcdefg'"),
        ({"image_size": 10**9}, "image_size: expected "),
        ({"image_size": "64"}, "image_size: expected "),
        ({"image_size": 1}, "image_size: expected "),
        ({"seed": -1}, "seed: expected a number of at least 0, got -1"),
        ({"num_classes": 10**12}, "num_classes: its metadata say 1000000000000, its weights 7"),
        ({"num_classes": None}, "num_classes: its metadata say None, its weights 7"),
        ({"variant": None}, "variant"),
        ({"dropout": "much"}, "dropout"),
        ({"normalization": None}, "normalization: expected mean and std, got None"),
    ],
)
def test_metadata_that_no_net_has_are_named(
    weights: Path, tmp_path: Path, capsys: Capture, changes: dict[str, object], said: str
) -> None:
    """Of a file whose checksums are right: who wrote it may have erred, or meant harm."""
    tensors, metadata = load_weights(weights)
    save_weights(tmp_path / "bad", tensors, {**metadata, **changes})
    Image.new("RGB", (60, 60)).save(tmp_path / "a.png")
    for main in (predict.main, evaluate.main):
        arguments = ["--weights", str(tmp_path / "bad")]
        assert main([str(tmp_path / "a.png")] * (main is predict.main) + arguments) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert f"{tmp_path / 'bad'}: " in error
        assert said in error


def test_prediction_names_files_on_one_line_each(
    weights: Path, tmp_path: Path, capsys: Capture
) -> None:
    good, bad, loop = (tmp_path / name for name in ("a\nb\udcff.png", "a\rb.jpg", "loop.jpg"))
    Image.new("RGB", (60, 60)).save(good)
    bad.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n")
    loop.symlink_to(loop)
    files = [str(good), str(bad), str(loop)]
    assert predict.main([*files, "--weights", str(weights), "--top", "1"]) == 2
    said = capsys.readouterr()
    assert said.out.splitlines()[0] == f"{tmp_path}/a\\nb\\udcff.png"
    assert said.err.splitlines() == [
        f"predict: error: {tmp_path}/a\\rb.jpg: not an image",
        f"predict: error: {loop}: too many levels of symbolic links",
    ]


@pytest.mark.parametrize("crops", [1, 10])
def test_prediction_prints_the_net_s_probabilities(
    weights: Path, tmp_path: Path, capsys: Capture, monkeypatch: Patch, crops: int
) -> None:
    data = _images(tmp_path, "val", CLASSES[:1], count=5)
    files = sorted((data / "val" / CLASSES[0]).iterdir())
    ensemble = Ensemble([weights])
    pixels = np.stack([read_image(file, decode_size(SIZE)) for file in files])
    expected = ensemble.probabilities(pixels, crops)
    sizes: list[int] = []
    plain = Ensemble.probabilities

    def probabilities(self: Ensemble, pixels: np.ndarray, crops: int = 1) -> torch.Tensor:
        sizes.append(len(pixels))
        return plain(self, pixels, crops)

    monkeypatch.setattr(Ensemble, "probabilities", probabilities)
    arguments = [*map(str, files), "--weights", str(weights), "--batch-size", "2"]
    assert predict.main([*arguments, "--crops", str(crops), "--top", "1"]) == 0
    assert sizes == [2, 2, 1]
    lines = capsys.readouterr().out.splitlines()
    assert lines[::2] == [str(file) for file in files]
    for line, row in zip(lines[1::2], expected, strict=True):
        name, share = line.split()
        assert name == CLASSES[int(row.argmax())]
        assert float(share.rstrip("%")) == pytest.approx(100 * float(row.max()), abs=0.051)
    assert predict.main(["--weights", str(weights), "--batch-size", "1", str(files[0])]) == 0
