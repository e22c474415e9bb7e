"""Batches of a dataset: their order, crops and colours are functions of (seed, epoch, index) alone.

An epoch draws a Philox stream each for order, crops and colours, and sample i reads the words that
belong to i. So neither the number of processes or threads nor the batch at which a run goes
on changes what is seen. Batches are bytes; the device augments them.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from fastalex.data.augment import (
    AUGMENTATIONS,
    BOX_WORDS,
    PUBLISHED_NOISE,
    Augment,
    ColorNoise,
    resized_crop,
)
from fastalex.data.base import ImageDataset, Pixels, decode_size, map_ahead
from fastalex.data.normalization import Normalization
from fastalex.data.packed import PackedImages

_ORDER, _CROPS, _COLORS, _BOXES = 0, 1, 2, 3  # the streams of an epoch
_CROP_WORDS = 3  # random 64-bit words for a sample: top, left, mirror
_COLOR_WORDS = 4
_BOX_COUNTERS = -(-BOX_WORDS // 4)  # Philox makes four words of each count


@dataclass(frozen=True)
class Batch:
    """Images as bytes and what augmentation is to do to them, drawn on the CPU.

    All but the indices lie in page-locked memory where there is a GPU.
    """

    images: torch.Tensor  # uint8 [n, D, D, 3], RGB; a row more where two towers load an odd n
    loaded: slice  # the rows of them that this process loads; the rest is the other tower's
    labels: torch.Tensor  # int64 [n]
    indices: torch.Tensor  # int64 [n], which samples of the dataset these are; always on the CPU
    tops: torch.Tensor  # int32 [n], the first row of each crop
    lefts: torch.Tensor  # int32 [n], its first column
    mirrors: torch.Tensor  # bool [n], which crops are mirrored left to right
    colors: torch.Tensor | None = None  # float32 [n, 3], added to an image's pixels, 0 to 255

    @property
    def inputs(self) -> tuple[torch.Tensor, ...]:
        """What ``fastalex.data.augment.Augment`` is called with."""
        drawn = (self.images[: len(self.labels)], self.tops, self.lefts, self.mirrors)
        return drawn if self.colors is None else (*drawn, self.colors)

    def empty(self, device: torch.device) -> Batch:
        """Memory on ``device`` for a batch of this one's shapes."""
        return replace(self, **{n: x.new_empty(x.shape, device=device) for n, x in self._moved()})

    def copy_to(self, place: Batch) -> Batch:
        """What was loaded of this batch, copied into ``place``; the host does not wait for it."""
        for name, x in self._moved():
            rows = self.loaded if name == "images" else slice(None)
            getattr(place, name)[rows].copy_(x[rows], non_blocking=True)
        return replace(place, indices=self.indices)

    def _moved(self) -> list[tuple[str, Any]]:
        stay = ("loaded", "indices")
        return [(n, x) for n, x in vars(self).items() if x is not None and n not in stay]


class Transform(NamedTuple):
    """What becomes of an image on its way to the net."""

    image_size: int  # side in pixels of the images the net gets
    normalization: Normalization
    augmentation: str = "crop"  # of training, one of AUGMENTATIONS
    noise: ColorNoise = PUBLISHED_NOISE  # of the colours, where the augmentation has any
    device: torch.device | None = None  # where batches are augmented; None is the CPU


class Share(NamedTuple):
    """Which part of each batch a replica gets, and which part of those images a tower loads."""

    rank: int = 0
    replicas: int = 1
    tower: int = 0
    towers: int = 1


WHOLE = Share()


class Batches:
    """The batches of each epoch over a dataset, or one replica's share of them.

    Training: images decoded at ``decode_size(image_size)``, a random crop, mirrored half the time,
    with colour noise where ``augmentation`` says so, in a new random order each epoch; or random
    parts of the images, resized to ``image_size`` already. Every batch is full: the last one is
    filled with the first samples of the same order.

    Validation: the centre crop of the same decoded image, in the dataset's order; the last batch
    may be short.

    Replica ``rank`` of r gets samples ``[rank * n // r, (rank + 1) * n // r)`` of a batch of n:
    none at all in a short validation batch of fewer than r samples, so that all replicas take the
    same number of steps. Both towers of a replica get the same samples, and each loads half of
    their images.

    Args:
        dataset: where the images come from.
        batch_size: samples in a batch, over all replicas.
        transform: what becomes of an image.
        seed: with the epoch, decides order, crops and mirrors of training; not negative.
        train: training or validation, as above.
        share: this replica's.
        workers: threads that load batches ahead; 0 loads each when it is asked for.

    Attributes:
        augment: makes of a batch, on its device, what the net gets: ``augment(*batch.inputs)``.
    """

    def __init__(
        self,
        dataset: ImageDataset,
        batch_size: int,
        transform: Transform,
        seed: int,
        train: bool,
        share: Share = WHOLE,
        workers: int = 0,
    ) -> None:
        image_size, normalization, augmentation, noise, device = transform
        rank, replicas, tower, towers = share
        checks = {
            f"batch_size: expected at least 1, got {batch_size}": batch_size >= 1,
            f"image_size: expected at least 1, got {image_size}": image_size >= 1,
            f"seed: expected at least 0, got {seed}": seed >= 0,
            f"workers: expected at least 0, got {workers}": workers >= 0,
            f"batch_size: expected a multiple of replicas={replicas}, got {batch_size}": (
                batch_size % replicas == 0
            ),
            f"rank: expected 0 to {replicas - 1}, got {rank}": 0 <= rank < replicas,
            f"tower: expected 0 to {towers - 1}, got {tower}": 0 <= tower < towers,
            f"augmentation: expected one of {', '.join(AUGMENTATIONS)}, got {augmentation!r}": (
                augmentation in AUGMENTATIONS
            ),
            "dataset: expected at least one image, got none": len(dataset) > 0,
        }
        for message, holds in checks.items():
            if not holds:
                raise ValueError(message)
        self.dataset, self.batch_size, self.image_size = dataset, batch_size, image_size
        self.seed, self.train, self.share, self.workers = seed, train, share, workers
        self.augmentation = augmentation if train else "none"
        resized = self.augmentation == "resized"
        if resized and normalization.mean_image is not None:
            raise ValueError("augmentation: resized parts of images have no mean image")
        self._side = image_size if resized else decode_size(image_size)
        self._noise = noise
        colored = self.augmentation == "full"
        self.augment = Augment(normalization, image_size, device or torch.device("cpu"), colored)

    def __len__(self) -> int:
        """Batches in an epoch."""
        return -(-len(self.dataset) // self.batch_size)

    def epoch(self, epoch: int, start: int = 0) -> Generator[Batch, None, None]:
        """Batches ``start``, ``start + 1``, ... of an epoch, this replica's share of each.

        Close it where an error may keep it: its threads must not end in a garbage collection.
        """
        if epoch < 0:
            raise ValueError(f"epoch: expected at least 0, got {epoch}")
        if not 0 <= start <= len(self):
            raise ValueError(f"start: expected 0 to {len(self)}, got {start}")
        tops, lefts, mirrors = self._crops(epoch)
        order, drawn = self._order(epoch), [tops, lefts, mirrors.astype(bool)]
        if self.augmentation == "full":
            drawn.append(self._noise.draw(self._words(epoch, _COLORS, _COLOR_WORDS)))
        shares = (self._indices(order, batch) for batch in range(start, len(self)))
        load = lambda indices: self._load(epoch, indices, drawn)  # noqa: E731
        # Two batches a thread: one being loaded and one ready.
        return map_ahead(load, shares, self.workers, 2 * self.workers)

    def _order(self, epoch: int) -> npt.NDArray[np.int64]:
        """int64 [len(dataset)]: the samples in the order in which the epoch visits them."""
        if not self.train:
            return np.arange(len(self.dataset))
        return np.argsort(self._words(epoch, _ORDER, 1)[:, 0], kind="stable")

    def _crops(self, epoch: int) -> npt.NDArray[np.int32]:
        """int32 [3, len(dataset)]: top, left and whether to mirror, for each sample."""
        spare = decode_size(self.image_size) - self.image_size
        if self.augmentation == "none":
            centre = np.array([[spare // 2], [spare // 2], [0]], np.int32)
            return np.repeat(centre, len(self.dataset), 1)
        words = self._words(epoch, _CROPS, _CROP_WORDS)
        ranges = np.array([spare + 1, spare + 1, 2], np.uint64)
        if self.augmentation == "resized":
            ranges[:2] = 1
        return np.ascontiguousarray((words % ranges).T, np.int32)

    def _words(self, epoch: int, stream: int, words: int) -> npt.NDArray[np.uint64]:
        # Raw words, because numpy may change what its distributions make of them.
        generator = np.random.Philox(np.random.SeedSequence([self.seed, epoch, stream]))
        return generator.random_raw(len(self.dataset) * words).reshape(-1, words)

    def _indices(self, order: npt.NDArray[np.int64], batch: int) -> npt.NDArray[np.int64]:
        start, stop = batch * self.batch_size, (batch + 1) * self.batch_size
        positions = np.arange(start, stop if self.train else min(stop, len(order)))
        rank, replicas, *_ = self.share
        first, last = (r * len(positions) // replicas for r in (rank, rank + 1))
        return order[positions[first:last] % len(order)]

    def _load(
        self, epoch: int, indices: npt.NDArray[np.int64], drawn: list[npt.NDArray[Any]]
    ) -> Batch:
        """One batch; ``drawn`` has tops, lefts, mirrors and colours, if any, of all samples."""
        pinned = torch.cuda.is_available()  # then a copy to it goes on beside the step before
        *_, tower, towers = self.share
        each = -(-len(indices) // towers)
        loaded = slice(tower * each, (tower + 1) * each)
        shape = (towers * each, self._side, self._side, 3)
        images = torch.empty(shape, dtype=torch.uint8, pin_memory=pinned)
        read = self._part if self.augmentation == "resized" else self._whole
        for out, index in zip(images.numpy()[loaded], indices[loaded].tolist(), strict=False):
            read(epoch, index, out)
        rows = [torch.from_numpy(values[indices]) for values in (self.dataset.labels, *drawn)]
        labels, *inputs = (
            torch.empty(row.shape, dtype=row.dtype, pin_memory=pinned).copy_(row) for row in rows
        )
        return Batch(images, loaded, labels, torch.from_numpy(indices), *inputs)

    def _whole(self, epoch: int, index: int, out: Pixels) -> None:
        if isinstance(self.dataset, PackedImages) and self.dataset.size == self._side:
            self.dataset.read(index, out)  # from the file straight into the batch
        else:
            out[:] = self.dataset.image(index, self._side)

    def _part(self, epoch: int, index: int, out: Pixels) -> None:
        """A random part of an image; its words are read where they lie in the epoch's stream."""
        stream = np.random.Philox(np.random.SeedSequence([self.seed, epoch, _BOXES]))
        words = stream.advance(index * _BOX_COUNTERS).random_raw(BOX_WORDS)
        out[:] = resized_crop(self.dataset, index, words, decode_size(self.image_size), self._side)
