"""Batches, what they are made of and the threads that load them."""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastalex.data import Normalization, decode_size
from fastalex.data.base import ImageCache, Pixels, map_ahead
from fastalex.data.batches import Batch, Batches, Share, Transform
from fastalex.data.datasets import open_datasets
from tests._types import Patch

PLAIN = Normalization((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))


class Coordinates:
    """A source whose pixels say where they are: (row, column, index)."""

    def __init__(self, count: int) -> None:
        self.classes = ["even", "odd"]
        self.labels = np.arange(count) % 2

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, index: int) -> str:
        return f"coordinates {index}"

    def image(self, index: int, size: int) -> Pixels:
        line = np.arange(size)
        rows, columns = np.meshgrid(line, line, indexing="ij")
        return np.stack([rows, columns, np.full_like(rows, index)], -1).astype(np.uint8)


def batches(count: int = 20, size: int = 14, batch_size: int = 8, **options: object) -> Batches:
    augmentation = options.pop("augmentation", "crop")
    transform = Transform(size, options.pop("mean_std", PLAIN), augmentation)  # type: ignore[arg-type]
    share = Share(**{name: options.pop(name) for name in Share._fields if name in options})  # type: ignore[arg-type]
    arguments = {"seed": 3, "train": True, "share": share, **options}
    return Batches(Coordinates(count), batch_size, transform, **arguments)  # type: ignore[arg-type]


def seen(loader: Batches, epoch: int = 0, start: int = 0) -> list[tuple[int, int, int, bool]]:
    """(index, top, left, mirrored) of every image, read from its pixels."""
    found = []
    for batch in loader.epoch(epoch, start):
        images = loader.augment(*batch.inputs)
        for image, index in zip(images, batch.indices.tolist(), strict=True):
            rows, columns, numbers = image.int().tolist()
            size = len(rows)
            top, left = rows[0][0], min(columns[0])
            mirrored = columns[0][0] > columns[0][-1]
            line = list(range(left, left + size))
            assert numbers == [[index] * size] * size
            assert rows == [[top + y] * size for y in range(size)]
            assert columns == [line[::-1] if mirrored else line] * size
            found.append((index, top, left, mirrored))
    return found


def test_training_crops_lie_within_the_decoded_image_and_take_every_place() -> None:
    assert decode_size(14) == 16
    loader = batches(count=200, batch_size=50)
    places = Counter(place[1:] for epoch in range(3) for place in seen(loader, epoch))
    # 600 draws of 3 x 3 x 2 equally likely places, 33 expected of each: fewer than 12 or more than
    # 60 of one has a probability below 1e-4.
    assert len(places) == 18
    assert min(places.values()) >= 12
    assert max(places.values()) <= 60


def test_a_sample_reads_its_crop_from_its_place_in_the_epochs_stream() -> None:
    """The same images as ever for a seed: three words each of stream 1, top, left and mirror."""
    stream = np.random.Philox(np.random.SeedSequence([3, 2, 1]))
    words = stream.random_raw(3 * 20).reshape(20, 3)
    expected = [(i, int(t % 3), int(left % 3), m % 2 == 1) for i, (t, left, m) in enumerate(words)]
    assert sorted(seen(batches(), epoch=2)[:20]) == expected


def test_validation_takes_the_centre_in_order_and_a_short_last_batch() -> None:
    loader = batches(count=20, size=14, train=False)
    assert [len(batch.indices) for batch in loader.epoch(0)] == [8, 8, 4]
    assert seen(loader) == [(i, 1, 1, False) for i in range(20)]


@given(
    count=st.integers(1, 40),
    per_replica=st.integers(1, 6),
    replicas=st.integers(1, 4),
    train=st.booleans(),
)
def test_replicas_share_each_batch(
    count: int, per_replica: int, replicas: int, train: bool
) -> None:
    batch_size = per_replica * replicas
    whole = batches(count, 7, batch_size, train=train)
    parts = [
        batches(count, 7, batch_size, train=train, rank=rank, replicas=replicas)
        for rank in range(replicas)
    ]
    assert len(whole) == -(-count // batch_size)
    for full, *shares in zip(whole.epoch(1), *(part.epoch(1) for part in parts), strict=True):
        for field in ("images", "labels", "indices", "tops", "lefts", "mirrors"):
            joined = torch.cat([getattr(share, field) for share in shares])
            assert torch.equal(joined, getattr(full, field))
        if train:
            assert [len(share.indices) for share in shares] == [per_replica] * replicas


@given(count=st.integers(1, 40), batch_size=st.integers(1, 9), train=st.booleans())
def test_towers_load_the_halves_of_what_their_replica_gets(
    count: int, batch_size: int, train: bool
) -> None:
    """All but the images is there on both; each writes as many rows as the other, or one fewer."""
    share = {"rank": 1, "replicas": 2, "train": train}
    whole = batches(count, 7, 2 * batch_size, **share)
    pair = [batches(count, 7, 2 * batch_size, **share, tower=t, towers=2) for t in (0, 1)]
    for full, *halves in zip(whole.epoch(1), *(tower.epoch(1) for tower in pair), strict=True):
        both = torch.cat([half.images[half.loaded] for half in halves])
        assert len(both) == len(halves[0].images) == 2 * -(-len(full.labels) // 2)
        assert torch.equal(both[: len(full.labels)], full.images)
        for half in halves:
            assert [len(x) for x in half.inputs] == [len(full.labels)] * 4
            for field in ("labels", "indices", "tops", "lefts", "mirrors"):
                assert torch.equal(getattr(half, field), getattr(full, field))


@given(count=st.integers(1, 40), batch_size=st.integers(1, 50), epoch=st.integers(0, 5))
def test_a_training_epoch_has_full_batches_and_misses_no_sample(
    count: int, batch_size: int, epoch: int
) -> None:
    indices = [b.indices.tolist() for b in batches(count, 7, batch_size).epoch(epoch)]
    flat = [index for batch in indices for index in batch]
    assert {len(batch) for batch in indices} == {batch_size}
    assert sorted(flat[:count]) == list(range(count))
    assert flat[count:] == [flat[i % count] for i in range(count, len(flat))]


def test_what_is_seen_depends_on_seed_and_epoch_alone() -> None:
    first = seen(batches())
    assert seen(batches()) == first
    assert seen(batches(workers=3)) == first
    assert seen(batches(), start=2) == first[16:]
    assert sorted(seen(batches(batch_size=5))) == sorted(first[:20])  # crops follow the sample
    assert seen(batches(), epoch=1) != first
    assert seen(batches(seed=4)) != first
    order, other = ([i for i, *_ in seen(batches(), epoch=epoch)] for epoch in (0, 1))
    assert order != other


def test_batches_hold_bytes_that_augment_normalises_and_their_labels() -> None:
    norm = Normalization((1.0, 2.0, 3.0), (2.0, 4.0, 0.5))
    loader = batches(count=3, batch_size=3, size=7, mean_std=norm, train=False)
    (batch,) = loader.epoch(0)
    assert isinstance(batch, Batch)
    assert batch.images.shape == (3, 8, 8, 3)
    assert batch.images.dtype == torch.uint8
    assert batch.labels.dtype == batch.indices.dtype == torch.int64
    assert batch.labels.tolist() == [0, 1, 0]
    images = loader.augment(*batch.inputs)
    assert images.shape == (3, 3, 7, 7)
    assert images.dtype == torch.float32
    assert images.is_contiguous(memory_format=torch.channels_last)
    # Exact: small integers and powers of two.
    assert images[2, 2].unique().tolist() == [(2 - 3) / 0.5]
    assert images[1, 0, :, 0].tolist() == [(row - 1) / 2 for row in range(7)]


def test_a_batch_moves_to_a_device_and_its_indices_stay() -> None:
    batch = next(batches().epoch(0))
    moved = batch.copy_to(batch.empty(torch.device("meta")))
    tensors = {name: x for name, x in vars(moved).items() if isinstance(x, torch.Tensor)}
    kinds = {name: x.device.type for name, x in tensors.items()}
    assert kinds.pop("indices") == "cpu"
    assert set(kinds) == {"images", "labels", "tops", "lefts", "mirrors"}
    assert set(kinds.values()) == {"meta"}
    assert moved.indices.tolist() == batch.indices.tolist()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size: expected at least 1, got 0"),
        ({"size": 0}, "image_size: expected at least 1, got 0"),
        ({"seed": -1}, "seed: expected at least 0, got -1"),
        ({"workers": -1}, "workers: expected at least 0, got -1"),
        ({"replicas": 3}, "batch_size: expected a multiple of replicas=3, got 8"),
        ({"rank": 2, "replicas": 2}, "rank: expected 0 to 1, got 2"),
        ({"tower": 2, "towers": 2}, "tower: expected 0 to 1, got 2"),
        (
            {"augmentation": "mixup"},
            "augmentation: expected one of none, crop, full, resized, got .*",
        ),
        ({"count": 0}, "dataset: expected at least one image, got none"),
    ],
)
def test_arguments_out_of_range_are_named(options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        batches(**options)  # type: ignore[arg-type]


@pytest.mark.parametrize("start", [-1, 4])
def test_a_start_outside_the_epoch_is_refused(start: int) -> None:
    with pytest.raises(ValueError, match=r"^start: expected 0 to 3"):
        next(batches().epoch(0, start))


# Normalization


def test_measured_normalisation_gives_zero_mean_and_unit_variance() -> None:
    source, _ = open_datasets(None, seed=5)
    norm = Normalization.measure(source, 16, sample=3000)
    pixels = np.stack([source.image(i, 16) for i in range(3000)]).reshape(-1, 3)
    scaled = (pixels - np.array(norm.mean)) / np.array(norm.std)
    # Measured in float64 on these very pixels: only rounding is left.
    np.testing.assert_allclose(scaled.mean(0), 0, atol=1e-9)
    np.testing.assert_allclose(scaled.var(0), 1, rtol=1e-9)


@pytest.mark.parametrize("order", ["in turn", "together"])
def test_every_class_has_its_share_in_what_is_measured(order: str) -> None:
    """Of 10,000 images of ten classes, 1,000 evenly spaced ones can be one class."""
    asked: list[int] = []

    class Recorded:
        def __len__(self) -> int:
            return 10_000

        def image(self, index: int, size: int) -> np.ndarray:
            asked.append(index)
            return np.zeros((size, size, 3), np.uint8)

    Normalization.measure(Recorded(), 2)  # type: ignore[arg-type]
    first, asked = asked, []
    Normalization.measure(Recorded(), 2)  # type: ignore[arg-type]
    assert asked == first == sorted(set(first))
    labels = [index % 10 if order == "in turn" else index // 1000 for index in first]
    counts = np.bincount(labels, minlength=10)
    # In turn, about a tenth each by chance: six standard deviations of a binomial are 57.
    assert np.abs(counts - 100).max() <= (57 if order == "in turn" else 0)


def test_a_constant_channel_keeps_its_scale() -> None:
    norm = Normalization.measure(Coordinates(1), 4)
    assert norm.mean[2] == 0
    assert norm.std[2] == 1


def test_normalisation_survives_json() -> None:
    norm = Normalization((0.1, 1 / 3, 255.0), (1e-3, 2 / 3, 77.7))
    assert Normalization.from_dict(json.loads(json.dumps(norm.to_dict()))) == norm


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"mean": [1, 2, 3]},
        {"mean": [1, 2], "std": [1, 2, 3]},
        {"mean": [1, 2, 3], "std": [1, 0, 1]},
        {"mean": [1, 2, 3], "std": [1, float("nan"), 1]},
        {"mean": "abc", "std": [1, 1, 1]},
    ],
)
def test_a_normalisation_that_makes_no_sense_is_refused(values: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"^normalization: "):
        Normalization.from_dict(values)


# The cache


def test_the_cache_keeps_what_its_limit_allows() -> None:
    cache = ImageCache(limit=2 * 3 * 4 * 4 + 1)
    image = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    for index in range(3):
        cache.put(index, image + np.uint8(index))
    kept = [cache.get(index, 4) for index in range(3)]
    assert kept[2] is None
    np.testing.assert_array_equal(kept[:2], [image, image + 1])
    assert cache.get(0, 8) is None


# The threads


def loader_threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("fastalex-data")]


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_results_come_in_order_and_no_further_ahead_than_asked(workers: int) -> None:
    drawn = 0

    def items() -> Iterator[int]:
        nonlocal drawn
        for item in range(30):
            drawn += 1
            yield item

    for done, result in enumerate(map_ahead(lambda x: x * x, items(), workers, ahead=4)):
        assert result == done * done
        assert drawn <= done + 1 + 4
    assert drawn == 30
    assert loader_threads() == []


@pytest.mark.parametrize("error", [OSError("gone"), KeyboardInterrupt()])
@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_comes_at_its_turn_and_leaves_no_thread(
    workers: int, error: BaseException
) -> None:
    def fail_at_five(item: int) -> int:
        if item == 5:
            raise error
        return item

    results = map_ahead(fail_at_five, range(100), workers, ahead=4)
    assert [next(results) for _ in range(5)] == [0, 1, 2, 3, 4]
    with pytest.raises(type(error)):
        next(results)
    assert loader_threads() == []


def test_work_not_begun_is_cancelled() -> None:
    begun: list[int] = []
    gate = threading.Event()

    def wait(item: int) -> int:
        begun.append(item)
        if item > 0:
            gate.wait()
        return item

    results = map_ahead(wait, range(100), workers=1, ahead=20)
    assert next(results) == 0
    threading.Timer(0.3, gate.set).start()  # closing waits for the item under way
    results.close()  # type: ignore[attr-defined]
    assert len(begun) < 21
    assert loader_threads() == []


def test_an_epoch_left_half_way_leaves_no_thread() -> None:
    epoch = batches(count=100, workers=2).epoch(0)
    next(epoch)
    assert loader_threads() != []
    epoch.close()  # type: ignore[attr-defined]
    assert loader_threads() == []


def test_threads_use_the_gpu_of_the_process_and_no_other(monkeypatch: Patch) -> None:
    taken: list[tuple[int, str]] = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    take = lambda device: taken.append((device, threading.current_thread().name))  # noqa: E731
    monkeypatch.setattr(torch.cuda, "set_device", take)
    assert list(map_ahead(abs, range(9), workers=2, ahead=4)) == list(range(9))
    assert {device for device, _ in taken} == {1}
    assert all(name.startswith("fastalex-data") for _, name in taken)
