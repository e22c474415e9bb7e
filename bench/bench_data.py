"""Packing against Pillow's own rate, and loading against torchvision's and against the step.

All but the last run on one thread of the host: each side can be given more of them.
"""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fastalex import AlexNet
from fastalex.data import Batches, FolderImages, Normalization, PackedImages
from fastalex.data.pack import pack
from fastalex.data.packed import WORK
from fastalex.data.shard import Shard, pack_shard
from fastalex.validation import fetch
from tests._packing import picture

from ._report import Report
from ._timing import Images, take_turns
from .bench_step import BATCH, CLASSES, Trainee

pytestmark = pytest.mark.benchmark(timer=time.perf_counter)

IMAGES = 64
REPEATED = 4  # a shard has 1024, over which what it does once is spread
FILE, PACKED, CROP = (500, 375), 256, 224  # pixels; an ordinary file of ImageNet is 500 x 375
ROUNDS = 5
_declared: list[torch.library.Library] = []
IMAGENET = Normalization((123.675, 116.28, 103.53), (58.395, 57.12, 57.375))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """JPEGs in train/a and in val/a, and the same packed."""
    root = tmp_path_factory.mktemp("data")
    random = np.random.default_rng(0)
    for part, count in (("train", IMAGES), ("val", 1)):
        place = root / "source" / part / "a"
        place.mkdir(parents=True)
        for i in range(count):
            noise = random.normal(0, 12, (FILE[1], FILE[0], 3))
            pixels = np.clip(np.asarray(picture(random, *FILE)) + noise, 0, 255)
            Image.fromarray(pixels.astype(np.uint8)).save(place / f"{i:03d}.jpg", quality=95)
    pack(root / "source", root / "set", PACKED, 1, quiet=True)
    return root


@pytest.fixture
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def decode_all(paths: list[Path]) -> list[Image.Image]:
    """The paper's squares, with Pillow and nothing else."""
    images = []
    for path in paths:
        with Image.open(path) as file:
            image = file.convert("RGB")
            short = min(image.size)
            left, top = ((side - short) / 2 for side in image.size)
            box = (left, top, left + short, top + short)
            images.append(image.resize((PACKED, PACKED), Image.Resampling.BILINEAR, box))
    return images


def test_packing(
    benchmark: Any, report: Report, folder: Path, tmp_path: Path, one_thread: None
) -> None:
    source = folder / "source"
    paths = sorted(source.glob("train/*/*.jpg"))
    files = [path.relative_to(source).as_posix() for path in paths] * REPEATED
    numbers = itertools.count()

    def ours() -> Shard:
        root = tmp_path / str(next(numbers))
        for name in ("train", WORK):
            (root / name).mkdir(parents=True)
        shard = Shard(source, root, "train", 0, files, PACKED)
        pack_shard(shard, lambda *_: True)
        return shard

    packed = np.load(ours().path)
    for found, expected in zip(packed, decode_all(paths) * REPEATED, strict=True):
        np.testing.assert_array_equal(found, np.asarray(expected))
    size = sum(path.stat().st_size for path in paths) // IMAGES
    compare(
        benchmark,
        report,
        "pack",
        "pillow",
        ours,
        lambda: [decode_all(paths) for _ in range(REPEATED)],
        images=len(files),
        file_bytes=size,
    )


@pytest.mark.parametrize("kind", ["packed", "folder"])
def test_loading(benchmark: Any, report: Report, folder: Path, one_thread: None, kind: str) -> None:
    """An epoch of normalised batches. From the folder both cut random parts of every file and
    resize them; a packed set has been decoded, and is cropped at its size."""
    theirs = torchvision_loader(folder / "source" / "train")
    if kind == "packed":
        source: Any = PackedImages(folder / "set", "train")
    else:
        source = FolderImages(folder / "source" / "train", unreadable=[], quiet=True)
    augmentation = "crop" if kind == "packed" else "resized"
    batches = Batches(source, 32, CROP, IMAGENET, 0, train=True, augmentation=augmentation)

    def ours() -> Iterator[torch.Tensor]:
        return (batches.augment(*batch.pixels) for batch in batches.epoch(0))

    for images in (*ours(), *(images for images, _ in theirs)):
        assert images.shape == (32, 3, CROP, CROP)
        assert images.dtype == torch.float32
        assert abs(images.mean()) < 1
        assert 0.3 < images.std() < 3
    compare(benchmark, report, kind, "torchvision", lambda: drain(ours()), lambda: drain(theirs))


def test_loading_against_the_step(
    benchmark: Any, report: Report, folder: Path, device: str, dtype: torch.dtype
) -> None:
    """One batch from a packed set, on its device and augmented, and one training step on it."""
    place, size = torch.device(device), BATCH[device] // 2
    source = PackedImages(folder / "set", "train")
    batches = Batches(source, size, CROP, IMAGENET, 0, train=True, device=place)

    def ours() -> torch.Tensor:
        batch = next(fetch(batches.epoch(0), place))
        return synchronised(batches.augment(*batch.pixels))

    torch.manual_seed(0)
    net = AlexNet(CLASSES, variant="paper")
    net.init_parameters("he")
    trainee = Trainee(net.to(place, dtype), ours().to(dtype))

    def theirs() -> None:
        trainee.step()
        synchronised(trainee.images)

    assert trainee.images.shape == (size, 3, CROP, CROP)
    compare(benchmark, report, "packed", "step", ours, theirs, rounds=3, images=size)


def synchronised(x: torch.Tensor) -> torch.Tensor:
    if x.is_cuda:
        torch.cuda.synchronize(x.device)
    return x


def drain(batches: Any) -> None:
    for _ in batches:
        pass


def compare(
    benchmark: Any,
    report: Report,
    what: str,
    against: str,
    ours: Callable[[], object],
    theirs: Callable[[], object],
    rounds: int = ROUNDS,
    images: int = IMAGES,
    **row: Any,
) -> None:
    times = take_turns(benchmark, ours, theirs, rounds, time.perf_counter)
    report.add(
        benchmark,
        "data",
        times,
        Images(images),
        layer=what,
        direction="packing" if what == "pack" else "loading",
        against=against,
        batch=images,
        dtype="uint8",
        **row,
    )


def torchvision_loader(root: Path) -> Any:
    """Random parts of images as pytorch/examples loads them for ImageNet, in this process."""
    import_torchvision()
    from torchvision import transforms
    from torchvision.datasets import ImageFolder

    mean, std = ([value / 255 for value in values] for values in (IMAGENET.mean, IMAGENET.std))
    steps = [
        transforms.RandomResizedCrop(CROP),
        transforms.RandomHorizontalFlip(),
        transforms.ToTensor(),
        transforms.Normalize(mean, std),
    ]
    images = ImageFolder(str(root), transforms.Compose(steps))
    return torch.utils.data.DataLoader(images, batch_size=32, shuffle=True, num_workers=0)


def import_torchvision() -> None:
    """Skip the test where there is no torchvision.

    Its wheel is compiled for one build of torch. Under another its operators are missing, and its
    data sets and transforms, which are Python, work once the two that it names are declared.
    """
    try:
        import torchvision
    except ImportError:
        pytest.skip("torchvision is not installed: see bench/README.md")
    except RuntimeError:
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        operators = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            operators.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _declared.append(operators)  # they go with it
        import torchvision  # noqa: F401
