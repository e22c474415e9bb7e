"""What trained nets make of images: probabilities over one crop or ten, alone or as an ensemble.

Everything a net needs to know about its images comes from its weights file: their size, how they
are normalised, and the names of the classes.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from tqdm import tqdm

from fastalex.data import (
    TRAIN_COUNT,
    VAL_COUNT,
    FolderImages,
    ImageDataset,
    Normalization,
    PackedImages,
    SyntheticImages,
    decode_size,
)
from fastalex.data.augment import Augment
from fastalex.data.base import MAX_IMAGE_SIZE, Pixels, map_ahead
from fastalex.data.datasets import describe
from fastalex.data.decode import read_image, try_read
from fastalex.data.folder import class_folders
from fastalex.data.packed import is_packed
from fastalex.data.synthetic import Split
from fastalex.model.alexnet import AlexNet
from fastalex.training.autograd_step import computing
from fastalex.training.validation import TOP as TOP
from fastalex.training.weights import load_mean_image, load_model

CROPS = (1, 10)
_NAMED = 3  # classes that a message names

Labels = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Member:
    """One net of an ensemble and the file it came from."""

    path: Path
    model: AlexNet
    metadata: dict[str, Any]
    normalization: Normalization

    def precision(self, device: torch.device) -> AbstractContextManager[None]:
        """A context in which the net computes as it was trained; on a CPU in float32."""
        name = self.metadata.get("precision", "float32")
        return computing(name if device.type == "cuda" else "float32", device)


class Ensemble:
    """Nets of the same classes and image size whose probabilities are averaged; often just one.

    Args:
        members: at least one, on one device, in evaluation mode.

    Raises:
        ValueError: where two differ in classes or image size, or one's metadata lack something.
    """

    def __init__(self, members: Sequence[Member]) -> None:
        self.members = list(members)
        first = self.members[0]
        self.classes: list[str] = first.metadata["classes"]
        self.image_size: int = first.metadata["image_size"]
        self.seed: int = first.metadata.get("seed", 0)
        self.device = next(first.model.parameters()).device
        for other in self.members[1:]:
            self._check_alike(first, other)
        self._augments = [
            Augment(member.normalization, self.image_size, self.device) for member in self.members
        ]

    @classmethod
    def load(cls, paths: Sequence[Path], device: torch.device | None = None) -> Ensemble:
        """The nets of weights files; None is the first GPU, or the CPU where there is none.

        Raises:
            ValueError: for a file that ``load_model`` refuses, and as the class says.
        """
        if device is None:
            device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        return cls([_load(path, device) for path in paths])

    @torch.no_grad()
    def probabilities(self, pixels: Pixels, crops: int = 1) -> torch.Tensor:
        """The mean over nets and crops of the softmax.

        Args:
            pixels: uint8 [n, D, D, 3] with D = ``decode_size(image_size)``, RGB.
            crops: 1, the centre; 10, the four corners, the centre, and their mirror images.

        Returns:
            float64 [n, classes] on the CPU; each row sums to 1.

        Raises:
            ValueError: where a net's output is not finite, naming its file.

        Source: P§4.1.
        """
        total = torch.zeros(len(pixels), len(self.classes), dtype=torch.float64)
        images = torch.from_numpy(pixels).to(self.device)
        places = crop_places(images.shape[1] - self.image_size, crops)
        for member, augment in zip(self.members, self._augments, strict=True):
            for place in places:
                crop = cut(augment, images, *place)
                with member.precision(self.device):
                    logits = member.model(crop)
                softmax = logits.double().softmax(1)
                if not bool(softmax.isfinite().all()):
                    raise ValueError(f"{member.path}: its net's output is not finite")
                total += softmax.cpu()
        return total / (len(self.members) * crops)

    @torch.no_grad()
    def features(self, pixels: Pixels) -> torch.Tensor:
        """The last hidden layer's activations of the centre crop, by the first net.

        Args:
            pixels: as for ``probabilities``.

        Returns:
            float32 [n, 4096] on the CPU: fc7's output after ReLU.

        Source: P§6.1.
        """
        member = self.members[0]
        images = torch.from_numpy(pixels).to(self.device)
        (place,) = crop_places(images.shape[1] - self.image_size, 1)
        model = member.model
        with member.precision(self.device):
            maps = model.forward_features(cut(self._augments[0], images, *place))
            return model.forward_head(maps, pre_logits=True).float().cpu()

    def _check_alike(self, first: Member, other: Member) -> None:
        names = str(first.path), str(other.path)
        classes, size = other.metadata["classes"], other.metadata["image_size"]
        what = ""
        if classes != self.classes:
            what = f"classes: {_difference(self.classes, classes, *names)}"
        elif size != self.image_size:
            what = f"image size: {self.image_size} and {size}"
        if what:
            raise ValueError(
                f"--weights: {' and '.join(names)} can't be averaged, they differ in {what}"
            )


def _load(path: Path, device: torch.device) -> Member:
    model, metadata = load_model(path)
    for key in ("classes", "image_size", "normalization"):
        if key not in metadata:
            raise ValueError(f"{path}: its metadata lack {key!r}")
    _check_metadata(path, metadata, model)
    try:
        normalization = Normalization.from_dict(metadata["normalization"], load_mean_image(path))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return Member(path, model.to(device), metadata, normalization)


def _check_metadata(path: Path, metadata: dict[str, Any], model: AlexNet) -> None:
    """Raise ValueError where classes, image size or seed are not what a net has."""
    classes, size, seed = metadata["classes"], metadata["image_size"], metadata.get("seed", 0)
    count, least = metadata["num_classes"], model.smallest_image_size()
    names = classes if isinstance(classes, list) else []
    wrong = ""
    if len(names) != count or not all(isinstance(name, str) for name in names):
        wrong = f"classes: expected {count} names, got {_shown(classes)}"
    elif type(size) is not int or not least <= size <= MAX_IMAGE_SIZE:
        wrong = f"image_size: expected {least} to {MAX_IMAGE_SIZE}, got {_shown(size)}"
    elif type(seed) is not int or seed < 0:
        wrong = f"seed: expected a number of at least 0, got {_shown(seed)}"
    if wrong:
        raise ValueError(f"{path}: {wrong}")


def _shown(value: object) -> str:
    return f"{len(value)} of them" if isinstance(value, list) else repr(value)[:50]


def cut(
    augment: Augment, images: torch.Tensor, top: int, left: int, mirrored: bool
) -> torch.Tensor:
    """The same crop of every image, normalised."""
    count = (len(images),)
    tops, lefts, mirrors = (
        images.new_full(count, v, dtype=torch.int32) for v in (top, left, mirrored)
    )
    return augment(images, tops, lefts, mirrors.bool())


def crop_places(spare: int, crops: int) -> list[tuple[int, int, bool]]:
    """The centre, or the four corners, the centre, and the mirror image of each.

    Args:
        spare: by how many pixels an image is larger than a crop.
        crops: 1 or 10.

    Returns:
        Of each crop the first row, the first column, and whether it is mirrored left to right.

    Raises:
        ValueError: for another number of crops.

    Source: P§4.1.
    """
    if crops not in CROPS:
        raise ValueError(f"crops: expected 1 or 10, got {crops!r}")
    middle = (spare // 2, spare // 2)
    if crops == 1:
        return [(*middle, False)]
    places = [(0, 0), (0, spare), (spare, 0), (spare, spare), middle]
    return [(*place, mirrored) for place in places for mirrored in (False, True)]


def rank_classes(probabilities: torch.Tensor, top: int = TOP) -> Labels:
    """The ``top`` most probable classes of each row, best first; of equal ones the first.

    A fixed rule for ties, so that a net which says the same of every class gets no credit by luck.

    Args:
        probabilities: [n, classes].
        top: how many, or all where there are fewer classes.

    Returns:
        int64 [n, min(top, classes)].
    """
    order = probabilities.sort(dim=1, descending=True, stable=True).indices
    ranked: Labels = order[:, :top].numpy()
    return ranked


@dataclass(frozen=True)
class Scores:
    """What a net said of labelled images.

    Attributes:
        classes: names, by label.
        labels: int64 [n], the correct classes.
        ranked: int64 [n, 5], the most probable ones, best first; fewer columns for fewer classes.
    """

    classes: list[str]
    labels: Labels
    ranked: Labels

    @property
    def top1(self) -> float:
        """Share of images, from 0 to 1, whose most probable class is wrong."""
        return float((self.ranked[:, 0] != self.labels).mean())

    @property
    def top5(self) -> float:
        """Share of images whose class is not among the five; 0 with fewer than five classes."""
        return float((self.ranked != self.labels[:, None]).all(1).mean())

    def per_class(self) -> list[tuple[str, Scores]]:
        """The images of each class that has any."""
        return [
            (self.classes[label], Scores(self.classes, self.labels[mine], self.ranked[mine]))
            for label in np.unique(self.labels)
            for mine in [self.labels == label]
        ]

    def confusion(self) -> npt.NDArray[np.int64]:
        """int64 [classes, classes]: images of the row's class that were taken for the column's."""
        counts = np.zeros((len(self.classes),) * 2, np.int64)
        np.add.at(counts, (self.labels, self.ranked[:, 0]), 1)
        return counts


def evaluate(
    ensemble: Ensemble,
    dataset: ImageDataset,
    crops: int = 10,
    batch_size: int = 64,
    workers: int = 1,
) -> Scores:
    """What ``ensemble`` says of every image of ``dataset``.

    Args:
        ensemble: the nets.
        dataset: labelled images with the ensemble's classes.
        crops: 1 or 10; see ``Ensemble.probabilities``.
        batch_size: images read at a time; each crop of them is one pass through a net.
        workers: threads that read ahead.
    """
    ranked = [
        rank_classes(ensemble.probabilities(pixels, crops))
        for pixels in read_batches(
            dataset, range(len(dataset)), ensemble.image_size, batch_size, workers, "Evaluating"
        )
    ]
    return Scores(ensemble.classes, np.asarray(dataset.labels), np.concatenate(ranked))


def read_batches(
    dataset: ImageDataset,
    indices: Iterable[int],
    image_size: int,
    batch_size: int,
    workers: int,
    what: str,
) -> Iterator[Pixels]:
    """uint8 [n, D, D, 3] of the images of ``dataset``, in order, counted by a bar."""
    indices, side = list(indices), decode_size(image_size)
    starts = range(0, len(indices), batch_size)

    def load(start: int) -> Pixels:
        return np.stack([dataset.image(i, side) for i in indices[start : start + batch_size]])

    with tqdm(total=len(indices), desc=what, unit="image", disable=None, leave=False) as bar:
        for pixels in map_ahead(load, starts, workers, 2 * workers):
            yield pixels
            bar.update(len(pixels))


def read_files(paths: Sequence[Path], size: int, workers: int = 1) -> Iterator[Pixels | str]:
    """The centre square of each image file, uint8 [size, size, 3], or why it can't be read."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, on metadata, without the file's name
        read = lambda path: try_read(read_image, path, size)  # noqa: E731
        yield from map_ahead(read, paths, workers, 2 * workers)


def open_dataset(data: Path | None, part: Split, ensemble: Ensemble) -> ImageDataset:
    """One part of a data set whose classes are those of ``ensemble``.

    Only that part of a folder is opened, and of training images no file is decoded yet. What a
    user should know of validation images is said on stderr.

    Args:
        data: a folder of images or a packed set; None is the built-in set, drawn with the seed of
            the first net.
        part: "train" or "val".
        ensemble: whose classes and image size count.

    Raises:
        ValueError: where the classes are not the ensemble's, or nothing can be read.
    """
    classes, side = ensemble.classes, decode_size(ensemble.image_size)
    where = "the built-in set (name images with --data)" if data is None else str(data)
    dataset: ImageDataset
    if data is None:
        count = TRAIN_COUNT if part == "train" else VAL_COUNT
        dataset = SyntheticImages(part, count, ensemble.seed)
        found = dataset.classes
    elif is_packed(data):
        dataset = PackedImages(data, part)
        found = dataset.classes
    else:
        found = class_folders(data / "train") if (data / "train").is_dir() else classes
        _check_classes(where, found, classes)
        unchecked = () if part == "train" else None
        dataset = FolderImages(data / part, classes, side, unchecked)
    _check_classes(where, found, classes)
    if part == "val":
        for line in describe([dataset], side):
            print(line, file=sys.stderr)
    return dataset


def _check_classes(where: str, found: list[str], classes: list[str]) -> None:
    if found != classes:
        difference = _difference(found, classes, where, "the weights")
        raise ValueError(f"the classes of {where} are not those of the weights: {difference}")


def _difference(a: Sequence[str], b: Sequence[str], a_name: str, b_name: str) -> str:
    """Which names are in one list alone."""
    parts = []
    for mine, other, where in ((a, b, a_name), (b, a, b_name)):
        names = sorted(set(mine) - set(other))
        if names:
            more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
            parts.append(f"in {where} alone {', '.join(map(repr, names[:_NAMED]))}{more}")
    return "; ".join(parts) or "they are in another order"
