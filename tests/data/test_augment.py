"""Augmentation against loops over single images, and what its noise is distributed as."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

import fastalex_kernels as kernels
from fastalex.data import MeanImage, Normalization, SyntheticImages
from fastalex.data.augment import COLOR_SCALE, PUBLISHED_NOISE, Augment, ColorNoise
from fastalex.data.batches import Batches, Share, Transform
from fastalex.training.validation import fetch

RANDOM = np.random.default_rng(3)
CPU = torch.device("cpu")


@pytest.mark.parametrize("mean", ["channels", "image", "centre"])
@pytest.mark.parametrize("colored", [False, True])
def test_a_batch_is_what_a_loop_makes(mean: str, colored: bool) -> None:
    """In float64, with numpy: the mean image is cropped and mirrored with the image, its centre
    is neither."""
    images = RANDOM.integers(0, 256, (6, 9, 9, 3), np.uint8)
    tops, lefts = (RANDOM.integers(0, 5, 6).astype(np.int32) for _ in range(2))
    mirrors = np.array([True, False, True, True, False, False])
    colors = RANDOM.normal(size=(6, 3)).astype(np.float32) if colored else None
    mean_pixels = RANDOM.uniform(0, 255, (9, 9, 3)).astype(np.float32)
    image = None if mean == "channels" else MeanImage.of(mean_pixels, 9, mean == "centre")
    norm = Normalization((100.0, 110.0, 120.0), (1.0, 2.0, 3.0), image)
    given = [torch.from_numpy(x) for x in (images, tops, lefts, mirrors, colors) if x is not None]
    result = Augment(norm, 5, CPU, colored)(*given)
    assert result.shape == (6, 3, 5, 5)
    assert result.dtype == torch.float32
    assert result.is_contiguous(memory_format=torch.channels_last)
    for i in range(6):
        rows, columns = (slice(first, first + 5) for first in (tops[i], lefts[i]))
        crop = images[i].astype(np.float64)
        if mean == "image":
            crop = crop - mean_pixels
        elif mean == "channels":
            crop = crop - norm.mean
        crop = crop[rows, columns][:, :: -1 if mirrors[i] else 1]
        if mean == "centre":
            crop = crop - mean_pixels[2:7, 2:7]
        std = np.array(norm.std) * (1.1 if colored else 1)
        expected = (crop + (0 if colors is None else colors[i])) / std
        np.testing.assert_allclose(result[i].permute(1, 2, 0).numpy(), expected, 1e-5, 1e-4)


@pytest.mark.parametrize("centred", [False, True])
def test_under_autocast_it_rounds_as_the_first_layer_would(centred: bool) -> None:
    batches = _batches("full")
    batch = next(batches.epoch(0))
    norm = Normalization((1.0, 2.0, 3.0), (60.0, 61.0, 62.0))
    mean_image = RANDOM.uniform(0, 255, (32, 32, 3)).astype(np.float32)
    norm = norm.scaled("mean-image", MeanImage.of(mean_image, 32, centred))
    augment = Augment(norm, 28, CPU, colored=True)
    wide = augment(*batch.inputs)
    weight = torch.randn(4, 3, 11, 11)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        narrow = augment(*batch.inputs)
        assert narrow.dtype == torch.bfloat16
        ours, theirs = (kernels.conv2d_relu(x, weight, stride=4) for x in (narrow, wide))
    assert torch.equal(narrow, wide.bfloat16())
    assert torch.equal(ours, theirs)


def test_a_mean_image_of_another_size_is_the_mean_of_resized_images() -> None:
    """Resizing is linear: only the rounding of each image to bytes is between the two."""
    images = RANDOM.integers(0, 256, (40, 64, 64, 3), np.uint8)
    resized = [Image.fromarray(x).resize((27, 27), Image.Resampling.BILINEAR) for x in images]
    mean = MeanImage.of(images.mean(0).astype(np.float32), 27, centred=False)
    expected = np.mean([np.asarray(x, np.float64) for x in resized], 0)
    assert mean.pixels.shape == (27, 27, 3)
    assert mean.pixels.dtype == np.float32
    np.testing.assert_allclose(mean.pixels, expected, atol=0.5)
    assert np.abs(mean.pixels - expected).mean() < 0.1


def test_a_net_larger_than_its_mean_image_is_refused() -> None:
    image = MeanImage.of(np.zeros((9, 9, 3), np.float32), 9, centred=True)
    with pytest.raises(ValueError, match="size: expected at most the mean image's 9, got 10"):
        Augment(Normalization((0.0,) * 3, (1.0,) * 3, image), 10, CPU)


def test_color_noise_has_a_hundredth_of_the_pixels_covariance() -> None:
    """0.1 squared times sum of lambda p p^T, with the numbers of C2:make-data/input_meta."""
    red, green, blue = (0.41796, -0.71258, -0.56351), (-0.81698, -0.02354, -0.57618), None
    blue = (0.39731, 0.70120, -0.59200)
    vectors = np.array([red, green, blue])
    covariance = vectors @ np.diag(np.square([19.7208, 37.0939, 121.7801])) @ vectors.T
    _check_noise(PUBLISHED_NOISE, covariance)


def test_measured_noise_has_a_hundredth_of_the_covariance_given() -> None:
    pixels = RANDOM.normal(size=(50, 3)) @ RANDOM.normal(size=(3, 3)) * 60
    covariance = np.cov(pixels.T)
    noise = ColorNoise.measured(covariance)
    _check_noise(noise, covariance)
    turned = ColorNoise(noise.std, -noise.vectors)  # what another eigensolver might return
    rebuilt = turned.vectors @ np.diag(turned.std**2) @ turned.vectors.T
    again = ColorNoise.measured((rebuilt + rebuilt.T) / 2)
    np.testing.assert_allclose(again.vectors, noise.vectors, atol=1e-9)
    assert (noise.vectors[np.abs(noise.vectors).argmax(0), range(3)] > 0).all()


def test_pixels_of_one_colour_give_no_noise() -> None:
    """A covariance of zero may have eigenvalues just below it."""
    noise = ColorNoise.measured(np.full((3, 3), -1e-12))
    words = np.random.default_rng(0).integers(0, 2**64, (5, 4), np.uint64)
    assert np.abs(noise.draw(words)).max() < 1e-5


def _check_noise(noise: ColorNoise, covariance: np.ndarray) -> None:
    words = np.random.default_rng(0).integers(0, 2**64, (200_000, 4), np.uint64)
    drawn = noise.draw(words).astype(np.float64)
    expected = 0.01 * covariance
    # The standard error of a variance is sqrt(2 / 200,000) of it: 5 of them.
    np.testing.assert_allclose(np.cov(drawn.T), expected, atol=0.016 * expected.max())
    assert np.abs(drawn.mean(0)).max() < 5 * np.sqrt(expected.max() / 200_000)


def _batches(augmentation: str, **options: int) -> Batches:
    unit = Normalization((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    source = SyntheticImages("train", 12)
    share = Share(options.pop("rank", 0), options.pop("replicas", 1))
    return Batches(source, 4, Transform(28, unit, augmentation), 0, True, share, **options)


def _images(batches: Batches, epoch: int) -> dict[int, torch.Tensor]:
    """What the net gets of each sample, in the order of the epoch."""
    found = {}
    for batch in batches.epoch(epoch):
        images = batches.augment(*batch.inputs)
        found |= dict(zip(batch.indices.tolist(), images, strict=True))
    return found


def test_colours_depend_on_seed_epoch_and_index_alone() -> None:
    whole = _images(_batches("full"), 1)
    halves = [_images(_batches("full", rank=r, replicas=2, workers=1), 1) for r in (0, 1)]
    for half in halves:
        assert all(torch.equal(image, whole[i]) for i, image in half.items())
    assert set(halves[0]) | set(halves[1]) == set(whole)
    cropped, later = _images(_batches("crop"), 1), _images(_batches("full"), 2)
    for i, image in whole.items():
        shift = image * COLOR_SCALE - cropped[i]
        spread = shift.amax((1, 2)) - shift.amin((1, 2))
        assert spread.max() < 1e-3  # one colour for the whole image
        assert shift.abs().max() > 1e-2
        assert not torch.equal(later[i], image)


def test_without_augmentation_epochs_differ_in_order_only() -> None:
    first, second = (_images(_batches("none"), epoch) for epoch in (0, 1))
    assert list(first) != list(second)
    assert all(torch.equal(first[i], second[i]) for i in first)


def test_an_unknown_augmentation_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^augmentation: expected one of none, crop, full"):
        _batches("mixup")


@pytest.mark.gpu
@pytest.mark.parametrize("augmentation", ["full", "resized"])
def test_a_gpu_makes_what_the_cpu_makes(augmentation: str) -> None:
    """Copied beside other work, from memory that is used again for the next batches."""
    gpu = torch.device("cuda")
    unit = Normalization((100.0, 110.0, 120.0), (50.0, 60.0, 70.0))
    source = SyntheticImages("train", 12)
    transform = Transform(28, unit, augmentation)
    expected = _images(Batches(source, 4, transform, 0, True), 1)
    batches = Batches(source, 4, transform._replace(device=gpu), 0, True, workers=2)
    busy = torch.randn(2048, 2048, device=gpu)
    for _ in range(3):
        for batch in fetch(batches.epoch(1), gpu):
            for _ in range(10):
                busy = (busy @ busy).clamp_(-1, 1)  # the next batch is copied while this runs
            assert batch.images.is_cuda
            assert batch.indices.device.type == "cpu"
            for image, i in zip(
                batches.augment(*batch.inputs), batch.indices.tolist(), strict=True
            ):
                torch.testing.assert_close(image.cpu(), expected[i], rtol=1e-5, atol=1e-5)
