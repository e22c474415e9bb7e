"""What every reader returns: the layers of a file, and what it says about them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from fastalex.model.ablations import get_variant
from fastalex.model.alexnet import AlexNet
from fastalex.model.variants import FOREIGN, VARIANTS

Array = npt.NDArray[np.floating]


class ForeignNet(NamedTuple):
    """The layers of another program's file, in torch's order of axes.

    Each layer that has weights, from the images on, is a weight [outputs, inputs, height, width] or
    [outputs, inputs] and a bias [outputs]; axes of one element may be left out.
    """

    kind: str  # what the file is, for the user
    layers: list[tuple[Array, Array]]
    variant: str | None = None  # where the file says which; else the shapes have to
    bgr: bool = False  # whether the net reads blue, green, red
    image_size: int | None = None  # in pixels, and all that follows: where the file says it
    classes: list[str] | None = None
    normalization: dict[str, Any] | None = None  # as a weights file's metadata have it

    def told(self, metadata: Mapping[str, str]) -> ForeignNet:
        """With what fastalex.export wrote beside the weights, if it did."""
        if not {"variant", "classes", "image_size", "normalization"} <= set(metadata):
            return self
        classes, scale = (json.loads(metadata[name]) for name in ("classes", "normalization"))
        if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
            raise ValueError("classes: expected a list of names in its metadata")
        return self._replace(
            variant=metadata["variant"],
            classes=classes,
            image_size=int(metadata["image_size"]),
            normalization=scale,
        )


def find_variant(net: ForeignNet, asked: str | None = None) -> str:
    """The variant, the one that the user ``asked`` for if any, whose layers have ``net``'s shapes.

    Raises:
        ValueError: where none fits, or where several do and neither user nor file says which.
    """
    names = [asked or net.variant] if asked or net.variant else [*VARIANTS, *FOREIGN]
    fitting = [name for name in names if name and _fits(net, name)]
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        raise ValueError(f"its layers fit {', '.join(fitting)}: say which with --variant")
    shapes = ", ".join(str(list(weight.shape)) for weight, _ in net.layers[:9])
    what = f"variant {names[0]}" if len(names) == 1 else "no AlexNet"
    raise ValueError(f"its {len(net.layers)} layers of weights fit {what}: {shapes}"[:300])


def state_dict(net: ForeignNet, variant: str) -> dict[str, torch.Tensor]:
    """The parameters of ``AlexNet(variant=variant)``, float32, reading RGB.

    Raises:
        ValueError: where a number is not finite.
    """
    tensors: dict[str, torch.Tensor] = {}
    arrays = [array for layer in net.layers for array in layer]
    for (name, shape), array in zip(_shapes(net, variant).items(), arrays, strict=True):
        with np.errstate(over="ignore"):  # what is too large is infinite, and refused below
            values = np.array(array, np.float32, order="C").reshape(shape)
        if net.bgr and not tensors:
            values = np.ascontiguousarray(values[:, ::-1])
        tensors[name] = torch.from_numpy(values)
        if not bool(tensors[name].isfinite().all()):
            raise ValueError(f"{name}: holds numbers that are not finite")
    return tensors


def _fits(net: ForeignNet, variant: str) -> bool:
    """Whether the shapes are the variant's but for axes of one element."""
    shapes = [array.shape for layer in net.layers for array in layer]
    ours, theirs = (
        [[n for n in shape if n != 1] for shape in some]
        for some in (_shapes(net, variant).values(), shapes)
    )
    return ours == theirs


def _shapes(net: ForeignNet, variant: str) -> dict[str, tuple[int, ...]]:
    classes = max(1, net.layers[-1][1].size) if net.layers else 1
    with torch.device("meta"):
        model = AlexNet(classes, variant=get_variant(variant))
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
