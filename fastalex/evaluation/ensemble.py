"""What trained nets make of images: probabilities over one crop or ten, alone or as an ensemble.

Everything a net needs to know about its images comes from its weights file: their size, how they
are normalised, and the names of the classes.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from tqdm import tqdm

from fastalex.data import ImageDataset, decode_size
from fastalex.data.augment import Augment
from fastalex.data.base import Pixels, map_ahead
from fastalex.data.datasets import class_names, describe, open_part
from fastalex.data.synthetic import Split
from fastalex.evaluation.pretrained import load_net
from fastalex.training.validation import TOP as TOP

CROPS = (1, 10)
_NAMED = 3  # classes that a message names

Labels = npt.NDArray[np.int64]


class Ensemble:
    """Nets of weights files whose probabilities are averaged; often just one.

    They compute on ``device``; None is the first GPU, or the CPU where there is none.

    Raises:
        ValueError: for a file that ``load_net`` refuses, and where two differ in classes or image
            size.
    """

    def __init__(self, paths: Sequence[Path], device: torch.device | None = None) -> None:
        if device is None:
            device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.device = device
        self.members = [load_net(path) for path in paths]
        first = self.members[0].metadata
        self.classes: list[str] = first["classes"]
        self.image_size: int = first["image_size"]
        self.seed: int = first.get("seed", 0)
        for path, model, metadata, _ in self.members:
            differ, size = "", metadata["image_size"]
            if metadata["classes"] != self.classes:
                names = str(paths[0]), str(path)
                differ = f"classes: {_difference(self.classes, metadata['classes'], *names)}"
            elif size != self.image_size:
                differ = f"image size: {self.image_size} and {size}"
            if differ:
                both = f"{paths[0]} and {path}"
                raise ValueError(f"--weights: {both} can't be averaged, they differ in {differ}")
            model.to(device)
        self._augments = [
            Augment(member.normalization, self.image_size, device) for member in self.members
        ]

    @torch.no_grad()
    def probabilities(self, pixels: Pixels, crops: int = 1) -> torch.Tensor:
        """The mean over nets and crops of the softmax, float64 [n, classes] on the CPU.

        Args:
            pixels: uint8 [n, D, D, 3] with D = ``decode_size(image_size)``, RGB.
            crops: 1, the centre; 10, the four corners, the centre, and their mirror images.

        Raises:
            ValueError: where a net's output is not finite, naming its file.

        Source: P§4.1.
        """
        total = torch.zeros(len(pixels), len(self.classes), dtype=torch.float64)
        images = torch.from_numpy(pixels).to(self.device)
        places = crop_places(images.shape[1] - self.image_size, crops)
        for member, augment in zip(self.members, self._augments, strict=True):
            for place in places:
                crop = augment.crop(images, *place)
                with member.precision(self.device):
                    logits = member.model(crop)
                softmax = logits.double().softmax(1)
                if not bool(softmax.isfinite().all()):
                    raise ValueError(f"{member.path}: its net's output is not finite")
                total += softmax.cpu()
        return total / (len(self.members) * crops)

    @torch.no_grad()
    def features(self, pixels: Pixels) -> torch.Tensor:
        """float32 [n, 4096] on the CPU: fc7's output after ReLU for the centre crops (P§6.1).

        It is the first net's; ``pixels`` as for ``probabilities``.
        """
        member = self.members[0]
        images = torch.from_numpy(pixels).to(self.device)
        (place,) = crop_places(images.shape[1] - self.image_size, 1)
        with member.precision(self.device):
            maps = member.model.forward_features(self._augments[0].crop(images, *place))
            return member.model.forward_head(maps, pre_logits=True).float().cpu()


def crop_places(spare: int, crops: int) -> list[tuple[int, int, bool]]:
    """Of each crop the first row, the first column, and whether it is mirrored left to right.

    One is the centre; ten are the four corners, the centre, and the mirror image of each (P§4.1).
    An image is larger than a crop by ``spare`` pixels.

    Raises:
        ValueError: for another number of crops.
    """
    if crops not in CROPS:
        raise ValueError(f"crops: expected 1 or 10, got {crops!r}")
    middle = (spare // 2, spare // 2)
    if crops == 1:
        return [(*middle, False)]
    places = [(0, 0), (0, spare), (spare, 0), (spare, spare), middle]
    return [(*place, mirrored) for place in places for mirrored in (False, True)]


def rank_classes(probabilities: torch.Tensor, top: int = TOP) -> Labels:
    """int64 [n, top]: the most probable classes of each row, best first; of equal ones the first.

    A fixed rule for ties, so that a net which says the same of every class gets no credit by luck.
    """
    order = probabilities.sort(dim=1, descending=True, stable=True).indices
    ranked: Labels = order[:, :top].numpy()
    return ranked


class Scores(NamedTuple):
    """What a net said of labelled images."""

    classes: list[str]  # names, by label
    labels: Labels  # [n], the correct classes
    ranked: Labels  # [n, 5], the most probable ones, best first; fewer for fewer classes

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
    """What ``ensemble`` says of every image of ``dataset``, which has its classes.

    ``batch_size`` images are read at a time by ``workers`` threads; each crop of them is one pass
    through a net.
    """
    indices = range(len(dataset))
    batches = read_batches(dataset, indices, ensemble.image_size, "Evaluating", batch_size, workers)
    ranked = [rank_classes(ensemble.probabilities(pixels, crops)) for pixels in batches]
    return Scores(ensemble.classes, np.asarray(dataset.labels), np.concatenate(ranked))


def read_batches(
    dataset: ImageDataset,
    indices: Iterable[int],
    image_size: int,
    what: str,
    batch_size: int = 64,
    workers: int = 1,
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


def open_dataset(data: Path | None, part: Split, ensemble: Ensemble) -> ImageDataset:
    """The "train" or the "val" part of a data set, whose classes have to be those of ``ensemble``.

    ``data`` is a folder or a packed set; None is the built-in set, drawn with the seed of the first
    net. Only that part of a folder is opened, and of training images no file is decoded yet. What a
    user should know of validation images is said on stderr.
    """
    where = "the built-in set (name images with --data)" if data is None else str(data)
    classes, found = ensemble.classes, class_names(data)
    if found not in (None, classes):
        difference = _difference(found or [], classes, where, "the weights")
        raise ValueError(f"the classes of {where} are not those of the weights: {difference}")
    side, unchecked = decode_size(ensemble.image_size), () if part == "train" else None
    dataset = open_part(data, part, ensemble.seed, side, classes, unchecked)
    for line in describe([dataset], side) if part == "val" else ():
        print(line, file=sys.stderr)
    return dataset


def _difference(a: Sequence[str], b: Sequence[str], a_name: str, b_name: str) -> str:
    """Which names are in one list alone."""
    parts = []
    for mine, other, where in ((a, b, a_name), (b, a, b_name)):
        names = sorted(set(mine) - set(other))
        if names:
            more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
            parts.append(f"in {where} alone {', '.join(map(repr, names[:_NAMED]))}{more}")
    return "; ".join(parts) or "they are in another order"
