"""Augmentation against loops over single images, and what its noise is distributed as."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fastalex.data import Batches, Normalization, SyntheticImages
from fastalex.data.augment import COLOR_SCALE, augment, color_noise

RANDOM = np.random.default_rng(3)


@pytest.mark.parametrize("mean_image", [False, True])
@pytest.mark.parametrize("colored", [False, True])
def test_a_batch_is_what_a_loop_makes(mean_image: bool, colored: bool) -> None:
    images = RANDOM.integers(0, 256, (6, 9, 11, 3), np.uint8)
    tops, lefts = RANDOM.integers(0, 5, 6), RANDOM.integers(0, 7, 6)
    mirrors = np.array([True, False, True, True, False, False])
    color = RANDOM.normal(size=(6, 3)).astype(np.float32) if colored else None
    mean = RANDOM.normal(size=(5, 5, 3) if mean_image else 3).astype(np.float32)
    std = np.array([1.0, 2.0, 3.0], np.float32)
    result = augment(
        torch.from_numpy(images),
        torch.from_numpy(tops),
        torch.from_numpy(lefts),
        torch.from_numpy(mirrors),
        None if color is None else torch.from_numpy(color),
        torch.from_numpy(mean),
        torch.from_numpy(std),
        5,
    )
    assert result.shape == (6, 3, 5, 5)
    assert result.is_contiguous(memory_format=torch.channels_last)
    for i in range(6):
        crop = images[i, tops[i] : tops[i] + 5, lefts[i] : lefts[i] + 5].astype(np.float64)
        crop = crop[:, ::-1] if mirrors[i] else crop
        expected = (crop + (0 if color is None else color[i]) - mean) / std
        np.testing.assert_allclose(result[i].permute(1, 2, 0).numpy(), expected, 1e-5, 1e-4)


def test_color_noise_has_a_hundredth_of_the_pixels_covariance() -> None:
    """0.1 squared times sum of lambda p p^T, with the numbers of C2:make-data/input_meta."""
    words = np.random.default_rng(0).integers(0, 2**64, (200_000, 4), np.uint64)
    noise = color_noise(words).astype(np.float64)
    red, green, blue = (0.41796, -0.71258, -0.56351), (-0.81698, -0.02354, -0.57618), None
    blue = (0.39731, 0.70120, -0.59200)
    vectors = np.array([red, green, blue])
    expected = 0.01 * vectors @ np.diag(np.square([19.7208, 37.0939, 121.7801])) @ vectors.T
    # The standard error of a variance is sqrt(2 / 200,000) of it: 5 of them.
    np.testing.assert_allclose(np.cov(noise.T), expected, atol=0.016 * expected.max())
    assert np.abs(noise.mean(0)).max() < 5 * np.sqrt(expected.max() / 200_000)


def _batches(augmentation: str, **options: int) -> Batches:
    unit = Normalization((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    source = SyntheticImages("train", 12)
    return Batches(source, 4, 28, unit, 0, train=True, augmentation=augmentation, **options)


def test_colours_depend_on_seed_epoch_and_index_alone() -> None:
    def pixels(batches: Batches, epoch: int) -> dict[int, torch.Tensor]:
        found = {}
        for batch in batches.epoch(epoch):
            found |= dict(zip(batch.indices.tolist(), batch.images, strict=True))
        return found

    whole = pixels(_batches("full"), 1)
    halves = [pixels(_batches("full", rank=r, replicas=2, workers=1), 1) for r in (0, 1)]
    for half in halves:
        assert all(torch.equal(image, whole[i]) for i, image in half.items())
    assert set(halves[0]) | set(halves[1]) == set(whole)
    cropped, later = pixels(_batches("crop"), 1), pixels(_batches("full"), 2)
    for i, image in whole.items():
        shift = image * COLOR_SCALE - cropped[i]
        spread = shift.amax((1, 2)) - shift.amin((1, 2))
        assert spread.max() < 1e-3  # one colour for the whole image
        assert shift.abs().max() > 1e-2
        assert not torch.equal(later[i], image)


def test_without_augmentation_epochs_differ_in_order_only() -> None:
    def by_index(epoch: int) -> dict[int, torch.Tensor]:
        batches = _batches("none").epoch(epoch)
        return {int(i): x for b in batches for i, x in zip(b.indices, b.images, strict=True)}

    first, second = by_index(0), by_index(1)
    assert list(first) != list(second)
    assert all(torch.equal(first[i], second[i]) for i in first)


def test_an_unknown_augmentation_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^augmentation: expected one of none, crop, full"):
        _batches("mixup")
