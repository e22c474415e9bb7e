"""A trained net in one call, with what its images need and what its outputs are called."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from fastalex.data import Normalization, decode_size
from fastalex.data.augment import Augment
from fastalex.data.decode import centre_square
from fastalex.evaluation.ensemble import Ensemble, crop_places, cut
from fastalex.model.alexnet import AlexNet


class Transforms:
    """What evaluation does to an image before the net gets it: resize, centre crop, normalise.

    Attributes:
        image_size: side in pixels of what comes out.

    Args:
        normalization: of the net.
        image_size: of the net.
    """

    def __init__(self, normalization: Normalization, image_size: int) -> None:
        self.image_size = image_size
        self._augment = Augment(normalization, image_size, torch.device("cpu"))

    def __call__(self, image: Image.Image | npt.NDArray[np.uint8]) -> torch.Tensor:
        """float32 [3, image_size, image_size] of a picture.

        Args:
            image: Pillow's, of any mode, or uint8 [height, width, 3] or [height, width].

        Raises:
            TypeError: for an array that does not hold bytes.
        """
        if not isinstance(image, Image.Image):
            if image.dtype != np.uint8:
                raise TypeError(f"image: expected uint8, got {image.dtype}")
            image = Image.fromarray(image)
        pixels = torch.from_numpy(centre_square(image, decode_size(self.image_size)).copy())
        (place,) = crop_places(len(pixels) - self.image_size, 1)
        return cut(self._augment, pixels[None], *place)[0].contiguous()


def load(path: str | os.PathLike[str], fused: bool = True) -> AlexNet:
    """The net of a weights file, evaluating, on the CPU.

    Args:
        path: model.safetensors of a run, or what ``python -m fastalex.convert`` wrote.
        fused: False takes torch's own layers, as ``AlexNet(fused=False)``.

    Returns:
        The net. Its ``transforms`` makes an input of a Pillow image or an array of bytes, and its
        ``classes`` are the names of its outputs.

    Raises:
        ValueError: where the file is missing, damaged or not fastalex's.
    """
    (member,) = Ensemble.load([Path(path)], torch.device("cpu")).members
    model = member.model if fused else member.model.unfused()
    model.classes = list(member.metadata["classes"])
    model.transforms = Transforms(member.normalization, member.metadata["image_size"])
    return model


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
