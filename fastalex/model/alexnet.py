"""AlexNet, drop-in for torchvision's; it knows nothing of devices or processes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from fastalex.model.ablations import get_variant
from fastalex.model.layers import (
    AdaptiveAvgPool2d,
    Conv2dReLU,
    CounterDropout,
    Dropout,
    Linear,
    LinearReLUDropout,
    LRNMaxPool2d,
    MaxPool2d,
    SpatialResponseNorm,
)
from fastalex.model.variants import Convolution, FullyConnected, Variant

_GRID = 6  # the last maps are averaged to 6 x 6, which they are at the published image size
_STREAM = 0x9E3779B97F4A7C15  # keeps the dropout seeds of the layers apart


class AlexNet(nn.Module):
    """The AlexNet of 2012 on fused kernels.

    ``features``, ``avgpool`` and ``classifier`` are indexed as in torchvision's ``alexnet``: a
    fused layer stands at its convolution's or linear layer's index, an identity where its ReLU or
    dropout was. Replacing ``classifier[6]``, slicing ``features`` and loading torchvision's state
    dict (variant ``"owt"``) work as there.

    Args:
        num_classes: outputs, at least 1.
        dropout: probability that a unit is dropped, in [0, 1).
        variant: ``"paper"``, ``"source2012"``, ``"caffe"`` or ``"owt"``; see
            fastalex.model.variants. Or such a name edited, ``"paper-without-lrn"``, or a Variant;
            see fastalex.model.ablations.

    Shapes:
        images [N, 3, H, W] to logits [N, num_classes]. Any size from ``smallest_image_size()`` on;
        published are 224 (227 for caffe).

    Raises:
        ValueError: for an argument out of range, naming it.
    """

    def __init__(
        self, num_classes: int = 1000, dropout: float = 0.5, variant: str | Variant = "paper"
    ) -> None:
        super().__init__()
        if not isinstance(num_classes, int) or isinstance(num_classes, bool) or num_classes < 1:
            raise ValueError(f"num_classes: expected an int of at least 1, got {num_classes!r}")
        if (
            isinstance(dropout, bool)
            or not isinstance(dropout, (int, float))
            or not 0 <= dropout < 1
        ):
            raise ValueError(f"dropout: expected a probability in [0, 1), got {dropout!r}")
        self.variant: Variant = get_variant(variant)
        self._counters: _Counters | None = None
        self.features = nn.Sequential(*_feature_layers(self.variant))
        self.avgpool = AdaptiveAvgPool2d((_GRID, _GRID))
        self.classifier = nn.Sequential(*_classifier_layers(self.variant, num_classes, dropout))
        self.init_parameters("published")

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if len(images.shape) != 4 or images.shape[1] != 3:
            raise ValueError(f"images: expected [N, 3, H, W], got shape {tuple(images.shape)}")
        self.check_image_size(images.shape[2], images.shape[3])
        maps = self.avgpool(self.features(images))
        return self.classifier(torch.flatten(maps, 1))  # type: ignore[no-any-return]

    def dropout_counters(self) -> object:
        """What ``seed_dropout`` writes to; another object where the layers' counters moved."""
        return self._counters

    def dropout_version(self) -> int:
        """A number that each ``seed_dropout`` raises, -1 before the first."""
        return -1 if self._counters is None else self._counters.version()

    def check_image_size(self, height: int, width: int) -> None:
        """Raise a ValueError where so few pixels leave nothing for the last layer."""
        if not _reaches(min(height, width), self._spatial_layers()):
            smallest = self.smallest_image_size()
            raise ValueError(
                f"images: {height} x {width} pixels are too few, "
                f"the smallest image this net takes is {smallest} x {smallest}"
            )

    def map_size(self, image_size: tuple[int, int]) -> tuple[int, int]:
        """Height and width of the maps before ``avgpool``, of images of that size."""
        height, width = image_size
        for layer in self._spatial_layers():
            height, width = layer.output_size(height), layer.output_size(width)
        return height, width

    def smallest_image_size(self) -> int:
        """The side in pixels of the smallest square image that reaches the last layer."""
        layers = self._spatial_layers()
        size = 1
        while not _reaches(size, layers):
            size += 1
        return size

    def _spatial_layers(self) -> list[Conv2dReLU | MaxPool2d]:
        return [m for m in self.features.modules() if isinstance(m, (Conv2dReLU, MaxPool2d))]

    @torch.no_grad()
    def init_parameters(
        self, scheme: str = "published", generator: torch.Generator | None = None
    ) -> None:
        """Draw every parameter anew, on the CPU and in a fixed order, so that a seed names one net.

        Args:
            scheme: ``"published"``, the variant's own (normal weights of a given deviation and
                constant biases; torch's default for owt); ``"he"``, normal with variance
                2 / fan-in and no bias, which learns from the first steps on small sets too.
            generator: a CPU generator; None is torch's default.

        Raises:
            ValueError: for another scheme.

        Source: P§5; He et al., ICCV 2015.
        """
        if scheme not in ("published", "he"):
            raise ValueError(f"scheme: expected 'published' or 'he', got {scheme!r}")
        convolutions, connected = self.variant.convolutions, self.variant.fully_connected
        all_specs: list[Convolution | FullyConnected] = [*convolutions, *connected]
        specs = [spec for spec in all_specs if not spec.removed]
        layers = [m for m in self.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
        for layer, spec in zip(layers, specs, strict=True):
            _init_layer(layer, spec, scheme, generator)

    def seed_dropout(self, seed: int, step: int) -> None:
        """Fix what the next pass in training drops: a function of (seed, step, layer, unit, image).

        The counters live in one tensor on the layers' device, written in place, so that a captured
        graph can advance them. From step to step that is a single write.
        """
        layers = [m for m in self.modules() if isinstance(m, CounterDropout)]
        device = next(self.parameters()).device
        if self._counters is None or not self._counters.serve(layers, device):
            self._counters = _Counters(layers, device)
        self._counters.write(seed, step)


def layer_names(model: nn.Module) -> dict[str, nn.Module]:
    """The layers by the names papers use: conv1, pool1, ... fc8; identities are left out."""
    names: dict[str, nn.Module] = {}
    number = 0
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            number += 1
            names[f"{'conv' if isinstance(module, nn.Conv2d) else 'fc'}{number}"] = module
        elif isinstance(module, LRNMaxPool2d) and module.kernel_size == 1:
            names[f"norm{number}"] = module
        elif isinstance(module, MaxPool2d):
            names[f"pool{number}"] = module
        elif isinstance(module, SpatialResponseNorm):
            names[f"spatial-norm{number}"] = module
        elif isinstance(module, Dropout):
            names[f"dropout{number}"] = module
    return names


class _Counters:
    """The (seed, offset) of every dropout layer, as rows of one tensor."""

    def __init__(self, layers: Sequence[CounterDropout], device: torch.device) -> None:
        with torch.inference_mode(False):  # or no pass in training could save them
            self._held = torch.empty(len(layers), 2, dtype=torch.int64, device=device)
        self._rows = list(self._held)
        self._written: tuple[int, int] | None = None  # the seed, and the tensor's version since
        for layer, row in zip(layers, self._rows, strict=True):
            layer.rng = row

    def serve(self, layers: Sequence[CounterDropout], device: torch.device) -> bool:
        """Whether these are the layers that read them, on that device."""
        known = len(layers) == len(self._rows) and self._held.device == device
        return known and all(x.rng is row for x, row in zip(layers, self._rows, strict=True))

    def version(self) -> int:
        """Of the tensor: how often it was written."""
        return self._held._version

    def write(self, seed: int, step: int) -> None:
        # Filled and not copied: a copy from the host's memory waits for the GPU to be done.
        if self._written != (seed, self._held._version):
            for index, row in enumerate(self._rows):
                row[0].fill_((seed + (index + 1) * _STREAM) % 2**63)
        self._held[:, 1].fill_(step)
        self._written = (seed, self._held._version)


def _feature_layers(variant: Variant) -> list[nn.Module]:
    layers: list[nn.Module] = []
    channels = 3
    for spec in variant.convolutions:
        layers += [nn.Identity() if spec.removed else _convolution(spec, channels), nn.Identity()]
        if spec.pool:
            layers.append(_pool_layer(spec, variant.pool_ceil_mode))
        channels = channels if spec.removed else spec.channels
    return layers


def _convolution(spec: Convolution, channels: int) -> Conv2dReLU:
    return Conv2dReLU(
        channels,
        spec.channels,
        spec.kernel_size,
        spec.stride,
        spec.padding,
        spec.groups,
        spec.ceil_mode,
        relu=not spec.relu_after_pool,
    )


def _pool_layer(spec: Convolution, ceil_mode: bool) -> nn.Module:
    pool: dict[str, Any] = {"kernel_size": spec.pool_size, "stride": 2, "ceil_mode": ceil_mode}
    if spec.norm is None:
        return MaxPool2d(**pool)
    norm = (spec.norm.size, spec.norm.alpha, spec.norm.beta, spec.norm.k, spec.norm.groups)
    if spec.spatial_norm is None:
        relu = spec.relu_after_pool
        return LRNMaxPool2d(*norm, **pool, relu=relu, signed=relu)
    spatial = spec.spatial_norm
    return nn.Sequential(
        LRNMaxPool2d(*norm, kernel_size=1, stride=1, signed=False),
        SpatialResponseNorm(spatial.size, spatial.alpha, spatial.beta, spatial.k),
        MaxPool2d(**pool),
    )


def _classifier_layers(variant: Variant, num_classes: int, dropout: float) -> list[nn.Module]:
    present = [spec for spec in variant.convolutions if not spec.removed]
    width = present[-1].channels * _GRID * _GRID
    hidden = variant.fully_connected[:-1]
    left = sum(not spec.removed for spec in hidden)
    layers: list[nn.Module] = [
        Dropout(dropout) if variant.dropout_on_input and left else nn.Identity()
    ]
    for spec in hidden:
        if spec.removed:
            layers.append(nn.Identity())
        else:
            assert spec.features is not None
            left -= 1
            # Dropout on the next hidden layer's input is this one's epilogue.
            p = 0.0 if variant.dropout_on_input and not left else dropout
            layers.append(LinearReLUDropout(width, spec.features, p, spec.groups))
            width = spec.features
        layers += [nn.Identity(), nn.Identity()]
    # Nothing stands between fc7's ReLU, which is absorbed, and fc8.
    return [*layers[:-1], Linear(width, num_classes)]


def _reaches(size: int, layers: list[Conv2dReLU | MaxPool2d]) -> bool:
    """Whether an axis of ``size`` pixels leaves something for every one of ``layers``."""
    for layer in layers:
        if (
            isinstance(layer, Conv2dReLU)
            and size + 2 * int(layer.padding[0]) < layer.kernel_size[0]
        ):
            return False
        size = layer.output_size(size)
        if size < 1:
            return False
    return True


def _init_layer(
    layer: nn.Conv2d | nn.Linear,
    spec: Convolution | FullyConnected,
    scheme: str,
    generator: torch.Generator | None,
) -> None:
    assert layer.bias is not None
    fan_in = layer.weight[0].numel()
    weight, bias = torch.empty(layer.weight.shape), torch.empty(layer.bias.shape)
    if scheme == "he":
        weight.normal_(0.0, math.sqrt(2.0 / fan_in), generator=generator)
        bias.zero_()
    elif spec.weight_std is None:  # as nn.Conv2d and nn.Linear draw theirs
        weight.uniform_(-(fan_in**-0.5), fan_in**-0.5, generator=generator)
        bias.uniform_(-(fan_in**-0.5), fan_in**-0.5, generator=generator)
    else:
        weight.normal_(0.0, spec.weight_std, generator=generator)
        bias.fill_(spec.bias)
    layer.weight.copy_(weight)
    layer.bias.copy_(bias)
