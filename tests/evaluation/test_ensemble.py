"""Evaluation, prediction and figures, against slow oracles and as real commands."""

from __future__ import annotations

import csv
import json
import re
import sys
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from fastalex.data import FolderImages, MeanImage, SyntheticImages, decode_size
from fastalex.data.pack import pack
from fastalex.evaluation import evaluate, figures, predict
from fastalex.evaluation.ensemble import Ensemble, Scores, crop_places, open_dataset, rank_classes
from fastalex.evaluation.evaluate import RESULTS, is_imagenet
from fastalex.training.weights import load_mean_image, load_model
from tests._nets import CLASSES, SIZE, random_weights
from tests._types import Capture, Patch


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two nets, and images: two of each class to validate on, three to train on."""
    root = tmp_path_factory.mktemp("evaluation")
    random = np.random.default_rng(0)
    for part, count in (("train", 3), ("val", 2)):
        for name in CLASSES:
            place = root / "data" / part / name
            place.mkdir(parents=True)
            for i in range(count):
                pixels = random.integers(0, 256, (60, 70, 3), np.uint8)
                pixels[:, : random.integers(10, 60)] //= 3
                Image.fromarray(pixels).save(place / f"{i}.png")
    random_weights(root / "a", 0)
    random_weights(root / "b", 1)
    return root


def _slow(path: Path, pixels: np.ndarray, crops: int) -> np.ndarray:
    """The mean softmax, a crop and an image at a time, in numpy; mirrored by hand."""
    net, metadata = load_model(path)
    net.double()
    scale = metadata["normalization"]
    image = load_mean_image(path)
    mean = np.broadcast_to(scale["mean"] if image is None else image, pixels.shape)
    spare = pixels.shape[0] - SIZE
    middle = slice(spare // 2, spare // 2 + SIZE)
    corners = [(0, 0), (0, spare), (spare, 0), (spare, spare), (spare // 2, spare // 2)]
    total = np.zeros(len(CLASSES))
    for top, left in corners if crops == 10 else corners[4:]:
        place = (slice(top, top + SIZE), slice(left, left + SIZE))
        for turn in (1, -1) if crops == 10 else (1,):
            crop, less = pixels[place][:, ::turn].astype(np.float64), mean[place][:, ::turn]
            if scale.get("mean_image", {}).get("centred"):
                less = mean[middle, middle]
            image = (crop - less) / scale["std"]
            with torch.no_grad():
                logits = net(torch.tensor(image.transpose(2, 0, 1).copy())[None])[0].numpy()
            e = np.exp(logits - logits.max())
            total += e / e.sum()
    return total / crops


@pytest.fixture(scope="module")
def pixels(folder: Path) -> np.ndarray:
    source = FolderImages(folder / "data" / "val")
    return np.stack([source.image(i, decode_size(SIZE)) for i in range(4)])


@pytest.mark.parametrize("crops", [1, 10])
@pytest.mark.parametrize("mean", ["channels", "image", "centre"])
def test_probabilities_are_those_of_a_crop_at_a_time(
    folder: Path, tmp_path: Path, pixels: np.ndarray, mean: str, crops: int
) -> None:
    path = folder / "a"
    if mean != "channels":
        drawn = np.random.default_rng(1).uniform(0, 255, pixels.shape[1:]).astype(np.float32)
        image = MeanImage.of(drawn, len(drawn), mean == "centre")
        path = random_weights(tmp_path / "w", 0, image)
    found = Ensemble([path]).probabilities(pixels, crops).numpy()
    expected = np.stack([_slow(path, image, crops) for image in pixels])
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)
    assert found.std(0).max() > 1e-3  # the images differ


def test_an_ensemble_is_the_mean_of_its_softmaxes(folder: Path, pixels: np.ndarray) -> None:
    paths = [folder / "a", folder / "b"]
    each = [Ensemble([path]).probabilities(pixels) for path in paths]
    torch.testing.assert_close(Ensemble(paths).probabilities(pixels), sum(each) / 2)
    assert not torch.allclose(*each)


@pytest.mark.parametrize(("device", "expected"), [("cuda", "bf16"), ("cpu", "float32")])
def test_on_a_gpu_a_net_computes_as_it_was_trained(
    tmp_path: Path, pixels: np.ndarray, monkeypatch: Patch, device: str, expected: str
) -> None:
    weights = random_weights(tmp_path / "w", 0, precision="bf16")
    seen = []

    def computing(name: str, on: torch.device) -> AbstractContextManager[None]:
        seen.append(name)
        return nullcontext()

    monkeypatch.setattr("fastalex.evaluation.pretrained.computing", computing)
    ensemble = Ensemble([weights], torch.device("cpu"))
    assert len(ensemble.probabilities(pixels)) == len(pixels)
    with ensemble.members[0].precision(torch.device(device)):
        assert seen == ["float32", expected]


def test_ten_crops_are_four_corners_the_centre_and_their_mirrors() -> None:
    corners = [(0, 0), (0, 3), (3, 0), (3, 3), (1, 1)]
    expected = {(*corner, mirrored) for corner in corners for mirrored in (False, True)}
    places = crop_places(3, 10)
    assert len(places) == 10
    assert set(places) == expected
    assert crop_places(3, 1) == [(1, 1, False)]
    with pytest.raises(ValueError, match="crops: expected 1 or 10, got 5"):
        crop_places(3, 5)


def test_of_equal_classes_the_first_counts() -> None:
    ranked = rank_classes(torch.full((8, 8), 0.125))
    assert ranked.tolist() == [[0, 1, 2, 3, 4]] * 8
    scores = Scores(list("abcdefgh"), np.arange(8), ranked)
    assert (scores.top1, scores.top5) == (7 / 8, 3 / 8)
    assert scores.confusion().tolist() == [[1] + [0] * 7] * 8
    assert rank_classes(torch.tensor([[0.1, 0.3, 0.3]])).tolist() == [[1, 2, 0]]


def _json(folder: Path, capsys: Capture, *arguments: str) -> dict:
    data = ["--data", str(folder / "data"), "--json"]
    assert evaluate.main(["--weights", str(folder / "a"), *data, *arguments]) == 0
    return json.loads(capsys.readouterr().out)


def test_evaluation_counts_what_prediction_says(
    folder: Path, tmp_path: Path, capsys: Capture
) -> None:
    table = tmp_path / "confusion.csv"
    report = _json(folder, capsys, "--per-class", "--confusion", str(table), "--batch-size", "3")
    files = sorted((folder / "data" / "val").glob("*/*.png"))
    assert predict.main([*map(str, files), "--weights", str(folder / "a")]) == 0
    blocks = capsys.readouterr().out.split(str(folder))[1:]
    assert len(blocks) == len(files) == report["images"]
    guesses = [[line.split()[0] for line in block.splitlines()[1:]] for block in blocks]
    wrong = [f.parent.name != g[0] for f, g in zip(files, guesses, strict=True)]
    missed = [f.parent.name not in g for f, g in zip(files, guesses, strict=True)]
    assert all(len(g) == 5 for g in guesses)
    assert report["top1_error"] == pytest.approx(sum(wrong) / len(files))
    assert report["top5_error"] == pytest.approx(sum(missed) / len(files))
    assert sum(c["images"] for c in report["per_class"].values()) == len(files)
    header, *rows = csv.reader(table.open())
    assert header[1:] == [row[0] for row in rows] == CLASSES
    diagonal = sum(int(row[i + 1]) for i, row in enumerate(rows))
    assert diagonal == len(files) - sum(wrong)
    assert [p.name for p in tmp_path.iterdir()] == ["confusion.csv"]


def test_a_packed_set_is_evaluated_as_its_folder_is(
    folder: Path, tmp_path: Path, capsys: Capture
) -> None:
    from_folder = _json(folder, capsys)
    pack(folder / "data", tmp_path / "data", decode_size(SIZE), 1)
    arguments = ["--weights", str(folder / "a"), "--data", str(tmp_path / "data"), "--json"]
    assert evaluate.main(arguments) == 0
    out, err = capsys.readouterr()
    assert err == ""
    from_set = json.loads(out)
    assert from_set.pop("data") != from_folder.pop("data")
    assert from_set == from_folder


def test_what_is_to_be_said_of_a_packed_set_is_said_once(
    folder: Path, tmp_path: Path, capsys: Capture
) -> None:
    pack(folder / "data", tmp_path / "set", 50, 1)
    ensemble = Ensemble([folder / "a"])
    counts = [len(open_dataset(tmp_path / "set", part, ensemble)) for part in ("val", "train")]
    assert counts == [2 * len(CLASSES), 3 * len(CLASSES)]
    expected = f"Images packed at 50 pixels are resized to {decode_size(SIZE)} as they are read\n"
    assert capsys.readouterr().err == expected


def test_the_published_errors_stand_beside_and_are_said_to_be_of_other_images(
    folder: Path, capsys: Capture
) -> None:
    arguments = ["--weights", str(folder / "a"), "--data", str(folder / "data"), "--crops", "1"]
    assert evaluate.main(arguments) == 0
    out = capsys.readouterr().out
    for result in RESULTS["paper"]:
        assert f"{result.top1}%" in out
    assert "another data set" in out
    assert is_imagenet([f"n{i:08}" for i in range(1000)])
    assert not is_imagenet(CLASSES)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": 48}, "differ in image size: 40 and 48"),
        ({"classes": ["violet", *CLASSES[1:]]}, "differ in classes: .*'blue'.*'violet'"),
        ({"normalization": {"mean": [1]}}, "normalization"),
    ],
)
def test_nets_that_do_not_match_are_refused_in_one_line(
    folder: Path, tmp_path: Path, changes: dict, message: str, capsys: Capture
) -> None:
    other = random_weights(tmp_path / "c", 2, **changes)
    assert evaluate.main(["--weights", str(folder / "a"), str(other)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert re.search(message, error)


def test_data_of_other_classes_are_refused(folder: Path, tmp_path: Path, capsys: Capture) -> None:
    for part in ("train", "val"):
        (tmp_path / part / "violet").mkdir(parents=True)
    for arguments in (["--data", str(tmp_path)], []):
        assert evaluate.main(["--weights", str(folder / "a"), *arguments]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert "classes" in error


# Figures.

matplotlib = pytest.importorskip("matplotlib")


def test_figures_are_pictures_of_the_right_size(
    folder: Path, tmp_path: Path, capsys: Capture, monkeypatch: Patch
) -> None:
    for name, rows in (("_PICTURES", 4), ("_QUERIES", 1)):  # one row each
        monkeypatch.setattr(figures, name, rows)
    out = tmp_path / "out"
    arguments = ["--weights", str(folder / "a"), "--data", str(folder / "data")]
    assert figures.main([*arguments, "--output", str(out)]) == 0
    names = ["conv1", "neighbours", "predictions"]
    kinds = [f"{name}.{kind}" for name in names for kind in ("pdf", "png")]
    assert sorted(p.name for p in out.iterdir()) == kinds
    for name in names:
        assert (out / f"{name}.pdf").read_bytes().startswith(b"%PDF-")
        with Image.open(out / f"{name}.png") as image:
            assert image.format == "PNG"
            assert 1500 < image.width < 2200  # a page's width at 300 dots an inch
    assert capsys.readouterr().out.count("\n") == len(names)


def test_the_conv1_figure_holds_exactly_the_kernels(tmp_path: Path) -> None:
    kernels = np.random.default_rng(0).normal(size=(96, 3, 11, 11)).astype(np.float32)
    paths = figures.save_figure(figures.draw_kernels(kernels, towers=2, scale=4), tmp_path / "k")
    with Image.open(paths[0]) as image:
        page = np.asarray(image.convert("RGB"))
    # Where every row or column of a block begins: found from the picture, not from the code.
    inside = (page[:, 200:] != 255).any(2)
    tops = np.flatnonzero(np.diff(inside.any(1).astype(int), prepend=0) == 1)
    block = (page[tops[0] : tops[0] + 44] != 255).any(2).any(0)
    lefts = np.flatnonzero(np.diff(block.astype(int), prepend=0) == 1)[-16:]
    assert (len(tops), len(lefts)) == (6, 16)
    for i, kernel in enumerate(kernels):
        top, left = tops[i // 16], lefts[i % 16]
        tile = page[top : top + 44, left : left + 44].reshape(11, 4, 11, 4, 3)
        assert (tile == tile[:, :1, :, :1]).all()
        shown = tile[:, 0, :, 0].astype(float) / 127.5 - 1
        expected = kernel.transpose(1, 2, 0) / np.abs(kernel).max()
        assert np.abs(shown - expected).max() <= 0.5 / 127.5 + 1e-6


def test_neighbours_are_the_nearest_by_features(folder: Path) -> None:
    ensemble = Ensemble([folder / "a"])
    val, train = (FolderImages(folder / "data" / part) for part in ("val", "train"))
    side = decode_size(SIZE)
    rows = figures.find_neighbours(ensemble, val, train, 1000)
    images = np.stack([train.image(i, side) for i in range(len(train))])
    features = ensemble.features(images).double().numpy()
    for row, query in zip(rows, figures.spread(val, len(rows)), strict=True):
        mine = ensemble.features(np.stack([val.image(query, side)])).double().numpy()
        order = np.argsort(((features - mine) ** 2).sum(1))[: len(row.nearest)]
        expected = [train.image(int(i), 224) for i in order]
        assert all(np.array_equal(a, p) for (p, _), a in zip(row.nearest, expected, strict=True))
    assert len({row.label for row in rows}) == 5


def test_a_part_of_the_gallery_holds_every_class(monkeypatch: Patch) -> None:
    train, val = SyntheticImages("train", 600), SyntheticImages("val", 20)
    seen: dict[str, list[int]] = {}

    def features(_: object, source: object, indices: list[int], what: str) -> torch.Tensor:
        seen[what] = indices
        return torch.zeros(len(indices), 1)

    monkeypatch.setattr(figures, "ensemble_features", features)
    ensemble = SimpleNamespace(classes=train.classes)
    figures.find_neighbours(ensemble, val, train, 100)
    assert len(set(seen["Features"])) == 100
    assert {i % 10 for i in seen["Features"]} == set(range(10))


def test_features_are_what_the_last_layer_reads(folder: Path, pixels: np.ndarray) -> None:
    ensemble = Ensemble([folder / "a"])
    last = ensemble.members[0].model.classifier[6]
    with torch.no_grad():
        found = last(ensemble.features(pixels)).double().softmax(1)
    torch.testing.assert_close(found, ensemble.probabilities(pixels, 1))


def test_without_matplotlib_one_line_says_what_to_install(
    folder: Path, tmp_path: Path, capsys: Capture, monkeypatch: Patch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    arguments = ["--weights", str(folder / "a"), "--output", str(tmp_path / "out")]
    assert figures.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "fastalex[figures]" in error
    assert not list(tmp_path.iterdir())
