"""The built-in set: the same for everyone, and not to be told by its pixels' statistics."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import numpy.typing as npt

from fastalex.data import TRAIN_COUNT, VAL_COUNT, SyntheticImages
from fastalex.data.base import Pixels
from fastalex.data.datasets import open_datasets
from tests import _commands

CLASSES = [
    "broad_horizontal_stripes",
    "checkerboard",
    "cross",
    "diagonal_stripes",
    "fine_horizontal_stripes",
    "green_disc_on_red",
    "red_disc_on_green",
    "ring",
    "triangle",
    "vertical_stripes",
]


def pictures(name: str, size: int = 64, count: int = 40) -> list[Pixels]:
    source = SyntheticImages("train", 10 * count)
    return [source.image(CLASSES.index(name) + 10 * i, size) for i in range(count)]


def test_open_datasets_without_a_folder_gives_the_ten_classes_in_equal_numbers() -> None:
    train, val = open_datasets(None, seed=0)
    assert (len(train), len(val)) == (TRAIN_COUNT, VAL_COUNT)
    for source in (train, val):
        assert source.classes == CLASSES == sorted(CLASSES)
        assert source.labels.dtype == np.int64
        assert set(np.bincount(source.labels)) == {len(source) // 10}
    assert train.name(17) == "synthetic train 17"
    assert val.name(0) == "synthetic val 0"


def test_a_picture_is_the_same_in_any_order_and_in_another_process(tmp_path: Path) -> None:
    script = (
        "import hashlib; from fastalex.data import SyntheticImages; "
        "s = SyntheticImages('val', 20, 7); "
        "print(hashlib.sha256(b''.join(s.image(i, 33).tobytes() for i in range(20))).hexdigest())"
    )
    other = _commands.run(["-c", script], tmp_path)
    source = SyntheticImages("val", 20, seed=7)
    images = {i: source.image(i, 33) for i in reversed(range(20))}
    here = hashlib.sha256(b"".join(images[i].tobytes() for i in range(20))).hexdigest()
    assert other.stdout.strip() == here, other.stderr
    assert all(np.array_equal(source.image(i, 33), images[i]) for i in images)  # from the cache


def test_index_split_and_seed_each_change_the_picture() -> None:
    first = SyntheticImages("train", 20, seed=1)
    image = first.image(2, 32)
    assert image.shape == (32, 32, 3)
    assert image.dtype == np.uint8
    assert not np.array_equal(image, first.image(12, 32))
    assert not np.array_equal(image, SyntheticImages("val", 20, seed=1).image(2, 32))
    assert not np.array_equal(image, SyntheticImages("train", 20, seed=2).image(2, 32))


def test_a_scene_is_the_same_at_every_size() -> None:
    source = SyntheticImages("train", 40)
    for index in range(40):
        small = source.image(index, 32).astype(np.float64)
        large = source.image(index, 96).reshape(32, 3, 32, 3, 3).mean((1, 3))
        # Blocks of nine average the large picture's noise; the small one has its own and coarser
        # edges. Two unrelated scenes correlate by less than 0.5 nearly always.
        assert np.corrcoef(small.ravel(), large.ravel())[0, 1] > 0.8


# What the classes are


def spectrum_peak(image: Pixels) -> tuple[float, float]:
    """Cycles over the picture, down and across, of the strongest wave in any channel."""
    waves = image - image.mean((0, 1))
    power = np.square(np.abs(np.fft.rfft2(waves, axes=(0, 1)))).sum(-1)
    power[:2, :2] = power[-1, :2] = 0  # uneven light
    row, column = np.unravel_index(power.argmax(), power.shape)
    size = len(image)
    return float(min(row, size - row)), float(column)


def test_stripes_have_the_direction_and_width_of_their_name() -> None:
    for image in pictures("vertical_stripes"):
        down, across = spectrum_peak(image)
        assert across > 2 * down
    for image in pictures("diagonal_stripes"):
        down, across = spectrum_peak(image)
        assert 0.5 <= down / across <= 2
    broad = [spectrum_peak(image) for image in pictures("broad_horizontal_stripes")]
    fine = [spectrum_peak(image) for image in pictures("fine_horizontal_stripes")]
    assert all(down > 2 * across for down, across in broad + fine)
    assert max(down for down, _ in broad) < min(down for down, _ in fine)


def test_discs_of_either_colour_cover_the_same_share() -> None:
    """So the mean colour doesn't say which of the two is in front."""
    redness = [
        np.array([float((image[..., 0] > image[..., 1]).mean()) for image in pictures(name)])
        for name in ("red_disc_on_green", "green_disc_on_red")
    ]
    assert abs(redness[0].mean() - 0.5) < 0.05
    assert abs(redness[1].mean() - 0.5) < 0.05
    threshold = np.median(np.concatenate(redness))
    told = ((redness[0] > threshold).mean() + (redness[1] <= threshold).mean()) / 2
    assert abs(told - 0.5) < 0.2  # 80 coins: 0.2 is 3.6 standard deviations


def flat(source: SyntheticImages) -> npt.NDArray[np.float64]:
    pixels = np.stack([source.image(i, 16) for i in range(len(source))])
    return pixels.reshape(len(source), -1) / 127.5 - 1


def test_a_linear_classifier_on_pixels_does_poorly() -> None:
    """Ridge regression in closed form: the net has to find features to do better."""
    train, val = SyntheticImages("train", 600), SyntheticImages("val", 500)
    x, targets = flat(train), np.eye(10)[train.labels] - 0.1
    centre = x.mean(0)
    x, held_out = x - centre, flat(val) - centre
    for strength in (10.0, 100.0, 1000.0):
        weights = np.linalg.solve(x @ x.T + strength * np.eye(len(x)), targets)
        right = (held_out @ x.T @ weights).argmax(1) == val.labels
        assert right.mean() < 0.5
