"""Random parts of images, against torchvision's rule written out here."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from fastalex.data import FolderImages, Normalization, PackedImages
from fastalex.data.augment import BOX_WORDS, draw_box
from fastalex.data.batches import WHOLE, Batches, Share, Transform
from fastalex.data.pack import pack
from tests._packing import picture
from tests._pictures import save

PLAIN = Normalization((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
SIZE = 28


def words(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 2**64, (count, BOX_WORDS), np.uint64)


def torchvision_box(
    uniforms: list[float], width: int, height: int
) -> tuple[int, int, int, int] | None:
    """RandomResizedCrop.get_params of torchvision's defaults: (i, j, h, w) of the first try that
    fits, drawn from these numbers; None where none of them does."""
    place, shapes = uniforms[:2], uniforms[2:]
    for k in range(10):
        target_area = width * height * np.interp(shapes[2 * k], [0, 1], [0.08, 1.0])
        log_ratio = np.interp(shapes[2 * k + 1], [0, 1], np.log([3 / 4, 4 / 3]))
        aspect = np.exp(log_ratio)
        w = int(np.rint(np.sqrt(target_area * aspect)))
        h = int(np.rint(np.sqrt(target_area / aspect)))
        if 0 < w <= width and 0 < h <= height:
            return (
                math.floor(place[0] * (height - h + 1)),
                math.floor(place[1] * (width - w + 1)),
                h,
                w,
            )
    return None


@pytest.mark.parametrize(("width", "height"), [(256, 256), (500, 375), (90, 300), (3, 3)])
def test_a_box_is_torchvisions(width: int, height: int) -> None:
    found = 0
    for row in words(500):
        left, top, right, bottom = draw_box(row, width, height)
        assert 0 <= left < right <= width
        assert 0 <= top < bottom <= height
        box = torchvision_box([int(w) / 2**64 for w in row], width, height)
        if box is not None:
            found += 1
            assert (top, left, bottom - top, right - left) == box
    assert found > 450


def test_area_and_shape_and_place_are_spread_as_asked() -> None:
    boxes = np.array([draw_box(row, 2000, 2000) for row in words(4000)])
    w, h = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    share, shape = w * h / 4e6, np.log(w / h)
    assert 0.079 < share.min() < 0.09
    assert np.abs(shape).max() < math.log(4 / 3) + 0.01
    # Below half the area every shape fits, so that nothing is drawn again.
    small = share < 0.5
    for values, low, high in ((share, 0.08, 0.5), (shape, -math.log(4 / 3), math.log(4 / 3))):
        # The mean of n uniform numbers deviates by (high - low) / sqrt(12 n): 5 of them.
        error = 5 * (high - low) / math.sqrt(12 * small.sum())
        assert abs(values[small].mean() - (low + high) / 2) < error
    for first, room in ((boxes[:, 0], 2000 - w), (boxes[:, 1], 2000 - h)):
        place = (first + 0.5) / (room + 1)
        assert abs(place.mean() - 0.5) < 5 / math.sqrt(12 * 4000)
    assert abs(np.corrcoef(boxes[:, 0] / (2001 - w), boxes[:, 1] / (2001 - h))[0, 1]) < 0.1


@pytest.mark.parametrize(
    ("width", "height", "box"),
    [(1000, 10, (493, 0, 506, 10)), (10, 1000, (0, 493, 10, 506)), (1, 1, (0, 0, 1, 1))],
)
def test_where_nothing_fits_it_is_the_centre(
    width: int, height: int, box: tuple[int, int, int, int]
) -> None:
    """The side is round(10 * 4 / 3) = 13, and it begins at (1000 - 13) // 2."""
    row = np.full(BOX_WORDS, 2**64 - 1, np.uint64)  # the whole area, at the widest shape
    if width < height:
        row[3::2] = 0  # at the narrowest
    assert draw_box(row, width, height) == box


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures of several shapes, one of them turned by EXIF, and the same packed."""
    folder = tmp_path_factory.mktemp("resized")
    random = np.random.default_rng(2)
    for part in ("train", "val"):
        for i, (width, height) in enumerate([(50, 40), (40, 64), (90, 45), (48, 48), (33, 70)]):
            save(folder / "source" / part / "a" / f"{i}.png", picture(random, width, height))
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = folder / "source" / "train" / "a" / "5.jpg"
    picture(random, 64, 40).save(turned, quality=95, exif=exif)
    pack(folder / "source", folder / "set", 40, 1)
    return folder


def batches(source: object, share: Share = WHOLE, workers: int = 0) -> Batches:
    transform = Transform(SIZE, PLAIN, "resized")
    return Batches(source, 3, transform, 4, True, share, workers)  # type: ignore[arg-type]


def parts(loader: Batches, epoch: int = 0) -> dict[int, torch.Tensor]:
    """The part of each image as the net gets it."""
    found: dict[int, torch.Tensor] = {}
    for batch in loader.epoch(epoch):
        assert batch.images.shape == (3, SIZE, SIZE, 3)
        images = loader.augment(*batch.inputs)
        found |= dict(zip(batch.indices.tolist(), images, strict=True))
    return found


@pytest.mark.parametrize("packed", [False, True])
def test_a_batch_holds_cut_and_resized_parts_mirrored_half_the_time(
    root: Path, packed: bool
) -> None:
    """Cut from the whole upright file or from the packed square, then resized, as Pillow does it
    for torchvision."""
    train = root / "source" / "train"
    source = PackedImages(root / "set", "train") if packed else FolderImages(train)
    mirrored = []
    for epoch in range(12):
        stream = np.random.Philox(np.random.SeedSequence([4, epoch, 3]))
        drawn = stream.random_raw(24 * len(source)).reshape(len(source), 24)
        for index, found in parts(batches(source), epoch).items():
            path = Path(source.name(index))
            whole = ImageOps.exif_transpose(Image.open(path)).convert("RGB")
            if packed:
                whole = Image.fromarray(source.image(index, 40))
            box = torchvision_box([int(w) / 2**64 for w in drawn[index][:BOX_WORDS]], *whole.size)
            assert box is not None
            i, j, h, w = box
            crop = whole.crop((j, i, j + w, i + h)).resize((SIZE, SIZE), Image.Resampling.BILINEAR)
            expected = torch.from_numpy(np.array(crop)).permute(2, 0, 1).float()
            mirrored.append(not torch.equal(found, expected))
            assert torch.equal(found.flip(2) if mirrored[-1] else found, expected)
    # 72 fair draws: fewer than 18 or more than 54 of one kind has a probability below 1e-4.
    assert 18 <= sum(mirrored) <= 54
