"""The mean image of a packed set: subtracted in training, kept with the weights, used after."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from fastalex import AlexNet
from fastalex.data import DataError, MeanImage, Normalization, PackedImages, SyntheticImages
from fastalex.data.augment import PUBLISHED_NOISE, ColorNoise
from fastalex.data.batches import Batches, Transform
from fastalex.data.datasets import color_noise, mean_image
from fastalex.data.pack import pack
from fastalex.distributed.context import ParallelContext
from fastalex.distributed.world import World
from fastalex.evaluation import evaluate
from fastalex.model.variants import VARIANTS
from fastalex.training import prepare, train, trainer
from fastalex.training.config import Settings
from fastalex.training.options import parse_arguments
from fastalex.training.weights import (
    FORMAT,
    MEAN_IMAGE,
    load_mean_image,
    load_weights,
    save_weights,
    write_tensors,
)
from tests import _small_train
from tests._packing import picture
from tests._pictures import save
from tests._types import Capture, Patch

SIZE, SIDE = 64, 73  # of the net's images, and of packed ones


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A packed set whose mean image is far from flat: dark to the left of "a", all of "b" light."""
    root = tmp_path_factory.mktemp("mean")
    random = np.random.default_rng(5)
    for part, count in (("train", 8), ("val", 3)):
        for name in "ab":
            for i in range(count):
                pixels = np.asarray(picture(random, 80, 76)) // 2
                pixels[:, 40:] += 100 if name == "a" else 20
                save(root / "source" / part / name / f"{i}.png", pixels)
    pack(root / "source", root / "set", SIDE, 1)
    return root


@pytest.fixture(
    scope="module", params=["mean-image", pytest.param("mean-centre", marks=pytest.mark.slow)]
)
def trained(request: pytest.FixtureRequest, folder: Path) -> Path:
    return train_small(folder, "set", request.param)


def train_small(folder: Path, data: str, normalization: str) -> Path:
    """A run in this process, of an epoch of a thin net."""
    output = folder / f"{data}-{normalization}"
    small = ["--image-size", str(SIZE), "--batch-size", "8", "--epochs", "1", "--lr", "0.001"]
    small += ["--variant", "owt", "--normalization", normalization]
    with pytest.MonkeyPatch.context() as patched:
        patched.setitem(VARIANTS, "owt", _small_train.thin(VARIANTS["owt"]))
        assert train.main([*small, "--data", str(folder / data), "--output", str(output)]) == 0
    return output


def less_the_mean(pixels: np.ndarray, mean: np.ndarray, centred: bool) -> torch.Tensor:
    """The centre crop of one image; in validation both kinds come to the same."""
    first = (SIDE - SIZE) // 2
    rows = slice(first, first + SIZE)
    crop = pixels.astype(np.float64)[rows, rows] - mean[rows, rows]
    return torch.tensor(crop.transpose(2, 0, 1).copy())[None]


def test_the_weights_file_has_it_and_the_loss_is_that_of_images_less_it(
    folder: Path, trained: Path
) -> None:
    """Against stock torch in float64, with mean.npy taken off by hand."""
    mean = np.load(folder / "set" / "mean.npy")
    assert mean.std((0, 1)).min() > 10
    path = trained / "model.safetensors"
    weights, metadata = load_weights(path)
    found = load_mean_image(path)
    assert found is not None
    np.testing.assert_array_equal(found, mean)
    about = metadata["normalization"]["mean_image"]
    assert about["centred"] == trained.name.endswith("mean-centre")
    assert metadata["normalization"]["std"] == [1, 1, 1]
    assert set(load_file(path)) == {*weights, MEAN_IMAGE}
    losses = []
    net = AlexNet(2, variant=_small_train.thin(VARIANTS["owt"]), fused=False).double().eval()
    net.load_state_dict(weights)
    val = PackedImages(folder / "set", "val")
    for i in range(len(val)):
        with torch.no_grad():
            logits = net(less_the_mean(val.image(i, SIDE), mean, about["centred"]))
        losses.append(-logits.log_softmax(1)[0, val.labels[i]].item())
    records = map(json.loads, (trained / "metrics.jsonl").read_text().splitlines())
    (epoch,) = [record for record in records if record["kind"] == "epoch"]
    assert epoch["val_loss"] == pytest.approx(math.fsum(losses) / len(losses), rel=1e-4)


@pytest.fixture
def thin(monkeypatch: Patch) -> None:
    """The nets of ``_small_train``, in this process."""
    monkeypatch.setitem(VARIANTS, "owt", _small_train.thin(VARIANTS["owt"]))


def test_evaluation_uses_it(folder: Path, trained: Path, thin: None, capsys: Capture) -> None:
    """The accuracy that training noted, from the weights file alone."""
    weights = trained / "model.safetensors"
    command = ["--weights", str(weights), "--data", str(folder / "set"), "--crops", "1", "--json"]
    assert evaluate.main(command) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["top1_error"] == pytest.approx(1 - load_weights(weights)[1]["top1"])


def test_weights_without_their_mean_image_are_refused(
    trained: Path, tmp_path: Path, thin: None, capsys: Capture
) -> None:
    weights, metadata = load_weights(trained / "model.safetensors")
    kept = {k: v for k, v in metadata.items() if "sha256" not in k and k != "format"}
    other = {MEAN_IMAGE: torch.ones(SIDE, SIDE, 3)}
    for image, message in (({}, "its mean image is missing"), (other, "is another one")):
        write_tensors(tmp_path / "w", {**weights, **image}, FORMAT, kept)
        assert evaluate.main(["--weights", str(tmp_path / "w")]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1


def test_what_was_loaded_is_saved_with_its_mean_image_or_not_at_all(
    trained: Path, tmp_path: Path
) -> None:
    path = trained / "model.safetensors"
    tensors, metadata = load_weights(path)
    with pytest.raises(ValueError, match="mean_image: the normalization has one"):
        save_weights(tmp_path / "b", tensors, metadata)
    assert not (tmp_path / "b").exists()
    save_weights(tmp_path / "b", tensors, metadata, load_mean_image(path))
    assert load_file(tmp_path / "b").keys() == load_file(path).keys()
    assert load_weights(tmp_path / "b")[1] == metadata
    image = Normalization.from_dict(metadata["normalization"], load_mean_image(tmp_path / "b"))
    assert image.mean_image is not None


def test_images_without_one_have_their_channels_mean_subtracted(
    folder: Path, capsys: Capture
) -> None:
    """And the run says so."""
    assert mean_image(SyntheticImages("train", 3), "mean-image", 8) is None
    norm = Normalization((1.0, 2.0, 3.0), (4.0, 5.0, 6.0)).scaled("mean-image", None)
    assert norm == Normalization((1.0, 2.0, 3.0), (1.0, 1.0, 1.0))
    output = train_small(folder, "source", "mean-centre")
    expected = "normalization mean (only a packed set has a mean image, for mean-centre)\n"
    assert expected in capsys.readouterr().out
    assert load_mean_image(output / "model.safetensors") is None


@pytest.mark.parametrize("kind", ["unit", "mean", "imagenet"])
def test_other_kinds_do_not_subtract_it(folder: Path, kind: str) -> None:
    assert mean_image(PackedImages(folder / "set", "train"), kind, SIDE) is None


def test_a_damaged_mean_image_is_refused(folder: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(folder / "set", tmp_path / "set"))
    mean = np.load(root / "mean.npy")
    mean[3, 4, 1] += 1
    np.save(root / "mean.npy", mean)
    with pytest.raises(DataError, match=re.escape(f"{root / 'mean.npy'}: damaged, it does not")):
        mean_image(PackedImages(root, "train"), "mean-image", SIDE)


def test_a_resumed_run_goes_on_with_the_same_mean_image(folder: Path) -> None:
    image = mean_image(PackedImages(folder / "set", "train"), "mean-centre", 30)
    assert image is not None
    begun = Normalization((1.0, 2.0, 3.0), (1.0, 1.0, 1.0), image)
    state = {"normalization": json.loads(json.dumps(begun.to_dict()))}
    resume: Any = SimpleNamespace(folder="R", state=state)
    again = prepare._kept_normalization(resume, image)
    assert again == begun
    assert again.mean_image is not None
    np.testing.assert_array_equal(again.mean_image.pixels, image.pixels)
    other = MeanImage.of(image.pixels + 1, 30, centred=True)
    with pytest.raises(DataError, match="has not the mean image that the run started with"):
        prepare._kept_normalization(resume, other)
    with pytest.raises(DataError, match="name that set with --data"):
        prepare._kept_normalization(resume, None)


# Of the packed set too: its covariance


def test_measured_colour_noise_is_of_the_packed_sets_covariance(folder: Path) -> None:
    source = PackedImages(folder / "set", "train")
    pixels = np.concatenate([source.image(i, SIDE).reshape(-1, 3) for i in range(len(source))])
    noise = color_noise(source, "measured")
    rebuilt = noise.vectors @ np.diag(noise.std**2) @ noise.vectors.T
    np.testing.assert_allclose(rebuilt, np.cov(pixels.T.astype(float), ddof=0), rtol=1e-8)
    assert color_noise(source, "published") is PUBLISHED_NOISE


@pytest.mark.parametrize("kind", ["published", "measured"])
def test_training_draws_the_colour_noise_it_is_told_to(folder: Path, kind: str) -> None:
    source = PackedImages(folder / "set", "train")
    given = ["--augmentation", "full", "--color-noise", kind, "--image-size", "64"]
    run: Any = SimpleNamespace(
        settings=Settings.choose(parse_arguments([*given, "--data", "set"]), "cpu"),
        config=SimpleNamespace(normalization=Normalization((0, 0, 0), (1, 1, 1))),
        parallel=ParallelContext(World("cpu", processes=1, towers=1, threads=1)),
    )
    noise = PUBLISHED_NOISE if kind == "published" else ColorNoise.measured(source.covariance)
    plain = Normalization((0, 0, 0), (1, 1, 1))
    same = Batches(source, 64, Transform(64, plain, "full", noise), 0, True)
    found, expected = (
        next(batches.epoch(2)).colors
        for batches in (trainer.Trainer._batches(run, source, True), same)
    )
    assert found is not None
    assert expected is not None
    assert torch.equal(found, expected)
    validation = trainer.Trainer._batches(run, source, False)
    assert next(validation.epoch(2)).colors is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--color-noise", "measured", "--augmentation", "full"],
            "--color-noise measured: the covariance is that of a packed set",
        ),
        (["--color-noise", "measured"], "--color-noise has no part in the augmentation crop"),
        (
            ["--augmentation", "resized", "--normalization", "mean-image"],
            "--augmentation resized: parts of any size have no mean image",
        ),
        (["--recipe", "paper", "--augmentation", "resized"], "another --normalization than mean-i"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(
    tmp_path: Path, capsys: Capture, arguments: list[str], message: str
) -> None:
    assert train.main(["--output", str(tmp_path / "run"), *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()
