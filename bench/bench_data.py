"""Packing against Pillow's own rate, and loading against torchvision's and against the step.

Packing runs on every core, loading on one thread of the host: each side can be given more.
"""

from __future__ import annotations

import multiprocessing
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fastalex.data import FolderImages, PackedImages
from fastalex.data.base import cores
from fastalex.data.batches import Batches, Transform
from fastalex.data.normalization import IMAGENET
from fastalex.data.pack import pack
from fastalex.training.validation import fetch
from fastalex.tuning.train_steps import Training, train_step
from tests._packing import picture

from . import _packing
from ._report import Report
from ._timing import take_turns
from .bench_step import BATCH

pytestmark = pytest.mark.benchmark(timer=time.perf_counter)

IMAGES = 64
SHARDS = 4  # for each core, of 64 images, the smallest that files are cut into
FILE, PACKED, CROP = (500, 375), 256, 224  # pixels; an ordinary file of ImageNet is 500 x 375
ROUNDS = 7
_declared: list[torch.library.Library] = []


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
    pack(root / "source", root / "set", PACKED, 1)
    return root


@pytest.fixture
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_packing(benchmark: Any, report: Report, folder: Path, tmp_path: Path) -> None:
    """Every core at work on each side: ours in threads, Pillow in processes started before."""
    workers, source, root = cores(), tmp_path / "source", tmp_path / "set"
    paths = sorted((folder / "source").glob("train/*/*.jpg"))
    (source / "a").mkdir(parents=True)
    for i in range(SHARDS * workers):
        for path in paths:
            (source / "a" / f"{i:03d}-{path.name}").hardlink_to(path)
    many = sorted((source / "a").iterdir())
    parts = [many[i::workers] for i in range(workers)]
    cpu: dict[str, list[float]] = {"ours": [], "theirs": []}

    def ours() -> None:
        shutil.rmtree(root, ignore_errors=True)
        started = time.process_time()
        pack(source, root, PACKED, workers, 0.0)
        cpu["ours"].append(time.process_time() - started)

    def theirs() -> None:
        cpu["theirs"].append(sum(others.map(_packing.decode, parts, repeat(PACKED))))

    context = multiprocessing.get_context("forkserver")
    with ProcessPoolExecutor(workers, context) as others:
        ours()
        images = PackedImages(root, "train")
        for i, path in enumerate(paths):
            expected = np.asarray(_packing.square(path, PACKED))
            np.testing.assert_array_equal(images.image(i, PACKED), expected)
        times = take_turns(benchmark, ours, theirs, ROUNDS, time.perf_counter)
    if times is None:
        return
    timed = {side: seconds[-ROUNDS:] for side, seconds in cpu.items()}
    report.add(
        benchmark,
        "data",
        times,
        len(many),
        layer="pack",
        direction="packing",
        against="pillow",
        batch=len(many),
        dtype="uint8",
        threads=workers,
        file_bytes=sum(path.stat().st_size for path in paths) // IMAGES,
        **ratios("wall", times.ours, times.theirs),
        **ratios("cpu", timed["ours"], timed["theirs"]),
    )


def ratios(what: str, ours: list[float], theirs: list[float]) -> dict[str, Any]:
    """Median of the rounds' ratios, and each: a busy spell falls into both halves of a round."""
    each = [b / a for a, b in zip(ours, theirs, strict=True)]
    return {
        f"{what} ratio": statistics.median(each),
        f"{what} ratios": [round(ratio, 3) for ratio in each],
        f"{what} seconds": {"ours": statistics.median(ours), "theirs": statistics.median(theirs)},
    }


@pytest.mark.parametrize("kind", ["packed", "folder"])
def test_loading(benchmark: Any, report: Report, folder: Path, one_thread: None, kind: str) -> None:
    """An epoch of normalised batches. From the folder both cut random parts of every file and
    resize them; a packed set has been decoded, and is cropped at its size."""
    theirs = torchvision_loader(folder / "source" / "train")
    if kind == "packed":
        source: Any = PackedImages(folder / "set", "train")
    else:
        source = FolderImages(folder / "source" / "train", unreadable=[])
    augmentation = "crop" if kind == "packed" else "resized"
    batches = Batches(source, 32, Transform(CROP, IMAGENET, augmentation), 0, train=True)

    def ours() -> Iterator[torch.Tensor]:
        return (batches.augment(*batch.inputs) for batch in batches.epoch(0))

    for images in (*ours(), *(images for images, _ in theirs)):
        assert images.shape == (32, 3, CROP, CROP)
        assert images.dtype == torch.float32
        assert abs(images.mean()) < 1
        assert 0.3 < images.std() < 3
    compare(benchmark, report, kind, "torchvision", lambda: drain(ours()), lambda: drain(theirs))


def test_loading_against_the_step(
    benchmark: Any, report: Report, folder: Path, device: str
) -> None:
    """One batch from a packed set on its device, and one training step on as many images."""
    place, size = torch.device(device), BATCH[device] // 2
    source = PackedImages(folder / "set", "train")
    batches = Batches(source, size, Transform(CROP, IMAGENET, device=place), 0, train=True)
    step = train_step(Training(place, "bf16" if device == "cuda" else "float32", size))

    def ours() -> torch.Tensor:
        batch = next(fetch(batches.epoch(0), place))
        assert batch.images.shape == (size, PACKED, PACKED, 3)
        return synchronised(batch.images)

    def theirs() -> torch.Tensor:
        return synchronised(step())

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
) -> None:
    times = take_turns(benchmark, ours, theirs, rounds, time.perf_counter)
    report.add(
        benchmark,
        "data",
        times,
        images,
        layer=what,
        direction="loading",
        against=against,
        batch=images,
        dtype="uint8",
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
