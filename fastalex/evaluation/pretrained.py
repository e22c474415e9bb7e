"""A trained net in one call, with what its images need and what its outputs are called."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from fastalex.data import Normalization, decode_size
from fastalex.data.augment import Augment
from fastalex.data.base import MAX_IMAGE_SIZE
from fastalex.data.decode import centre_square
from fastalex.model.alexnet import AlexNet
from fastalex.training.autograd_step import computing
from fastalex.training.weights import load_mean_image, load_model


class Transforms:
    """What evaluation does to an image before the net gets it: resize, centre crop, normalise."""

    def __init__(self, normalization: Normalization, image_size: int) -> None:
        self.image_size = image_size
        self._augment = Augment(normalization, image_size, torch.device("cpu"))

    def __call__(self, image: Image.Image | npt.NDArray[np.uint8]) -> torch.Tensor:
        """float32 [3, image_size, image_size] of a picture.

        Args:
            image: Pillow's, of any mode, or uint8 [height, width, 3] or [height, width].
        """
        if not isinstance(image, Image.Image):
            if image.dtype != np.uint8:
                raise TypeError(f"image: expected uint8, got {image.dtype}")
            image = Image.fromarray(image)
        side = decode_size(self.image_size)
        pixels, first = centre_square(image, side).copy(), (side - self.image_size) // 2
        return self._augment.crop(torch.from_numpy(pixels)[None], first, first)[0].contiguous()


class TrainedNet(NamedTuple):
    """The net of a weights file, with its classes and transforms, and what the file says of it."""

    path: Path
    model: AlexNet
    metadata: dict[str, Any]
    normalization: Normalization

    def precision(self, device: torch.device) -> AbstractContextManager[None]:
        """A context in which the net computes as it was trained; on a CPU in float32."""
        name = self.metadata.get("precision", "float32")
        return computing(name if device.type == "cuda" else "float32", device)


def load_net(path: Path) -> TrainedNet:
    """The net of a weights file, evaluating, on the CPU.

    Raises:
        ValueError: where the file is missing, damaged or not fastalex's.
    """
    model, metadata = load_model(path)
    for key in ("classes", "image_size", "normalization"):
        if key not in metadata:
            raise ValueError(f"{path}: its metadata lack {key!r}")
    try:
        _check(metadata, model)
        scale = Normalization.from_dict(metadata["normalization"], load_mean_image(path))
        model.transforms = Transforms(scale, metadata["image_size"])
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    model.classes = list(metadata["classes"])
    return TrainedNet(path, model, metadata, scale)


def _check(metadata: dict[str, Any], model: AlexNet) -> None:
    """Raise ValueError where classes, image size or seed are not what a net has."""
    names, size, seed = metadata["classes"], metadata["image_size"], metadata.get("seed", 0)
    count, least = model.num_classes, model.smallest_image_size()
    named = isinstance(names, list) and all(isinstance(name, str) for name in names)
    if not named or len(names) != count:
        raise ValueError(f"classes: expected {count} names, got {repr(names)[:50]}")
    if type(size) is not int or not least <= size <= MAX_IMAGE_SIZE:
        raise ValueError(f"image_size: expected {least} to {MAX_IMAGE_SIZE}, got {size!r:.50}")
    if type(seed) is not int or seed < 0:
        raise ValueError(f"seed: expected a number of at least 0, got {seed!r:.50}")


def load(path: str | os.PathLike[str], fused: bool = True) -> AlexNet:
    """The net of a weights file, evaluating, on the CPU.

    Its ``transforms`` makes an input of a Pillow image or an array of bytes, and its ``classes``
    are the names of its outputs.

    Args:
        path: model.safetensors of a run, or what ``python -m fastalex.convert`` wrote.
        fused: False takes torch's own layers, as ``AlexNet(fused=False)``.

    Raises:
        ValueError: where the file is missing, damaged or not fastalex's.
    """
    model = load_net(Path(path)).model
    return model if fused else model.unfused()


def alexnet(
    pretrained: str | os.PathLike[str] | None = None,
    num_classes: int | None = None,
    dropout: float = 0.5,
    variant: str = "owt",
    fused: bool = True,
) -> AlexNet:
    """AlexNet by torchvision's name, with random weights or those of a file.

    Args:
        pretrained: a weights file, as for ``load``; its net is returned, in evaluation mode.
        num_classes: outputs, 1000 if there is no file; of another number than the file's, the last
            layer is new.
        dropout: of a net without a file.
        variant: of a net without a file.
        fused: as for ``AlexNet``.

    Raises:
        ValueError: for an argument out of range, and as ``load``.
    """
    if pretrained is None:
        return AlexNet(1000 if num_classes is None else num_classes, dropout, variant, fused)
    model = load(pretrained, fused)
    if num_classes not in (None, model.num_classes):
        model.reset_classifier(num_classes)
        model.classes = None
    return model
