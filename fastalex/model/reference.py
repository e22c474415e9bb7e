"""The same nets from stock torch.nn: the oracle of the tests and the baseline of the benchmarks.

Nothing here is fused, laid out or tuned; a layer is what its name says.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from fastalex.model.ablations import get_variant
from fastalex.model.layers import SpatialResponseNorm
from fastalex.model.variants import Convolution


class _CeilConv2d(nn.Conv2d):
    """nn.Conv2d whose number of outputs is rounded up, by zeros at the bottom and right."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        kernel, stride = self.kernel_size[0], self.stride[0]
        bottom, right = (-(size - kernel) % stride for size in input.shape[2:])
        return super().forward(F.pad(input, (0, right, 0, bottom)))


class _TowerLocalResponseNorm(nn.LocalResponseNorm):
    """nn.LocalResponseNorm on each of two halves of the channels."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        n, c, h, w = input.shape
        return super().forward(input.reshape(n * 2, c // 2, h, w)).reshape(n, c, h, w)


class ReferenceAlexNet(nn.Module):
    """AlexNet from nn.Conv2d, nn.LocalResponseNorm, nn.MaxPool2d, nn.Linear and nn.Dropout.

    Takes the arguments and the state dict of ``fastalex.AlexNet``; its dropout is torch's own.

    Args:
        num_classes: outputs.
        dropout: probability that a unit is dropped, in [0, 1).
        variant: as ``fastalex.AlexNet``.
    """

    def __init__(
        self, num_classes: int = 1000, dropout: float = 0.5, variant: str = "paper"
    ) -> None:
        super().__init__()
        spec = get_variant(variant)
        removed = [layer.removed for layer in spec.convolutions]
        connected = [layer.removed or layer.groups > 1 for layer in spec.fully_connected]
        if any(removed + connected):
            raise ValueError(f"variant: the reference has no {spec.name!r}")
        layers: list[nn.Module] = []
        channels = 3
        for convolution in spec.convolutions:
            layers += _block(convolution, channels, spec.pool_ceil_mode)
            channels = convolution.channels
        self.features = nn.Sequential(*layers)
        self.avgpool = nn.AdaptiveAvgPool2d((6, 6))
        before, after = (dropout, 0.0) if spec.dropout_on_input else (0.0, dropout)
        self.classifier = nn.Sequential(
            nn.Dropout(before),
            nn.Linear(channels * 36, 4096),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(4096, 4096),
            nn.Sequential(nn.ReLU(), nn.Dropout(after)),
            nn.Linear(4096, num_classes),
        )

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.avgpool(self.features(images)).flatten(1))  # type: ignore[no-any-return]


def _block(spec: Convolution, channels: int, ceil_mode: bool) -> list[nn.Module]:
    convolution = _CeilConv2d if spec.ceil_mode else nn.Conv2d
    layers: list[nn.Module] = [
        convolution(
            channels, spec.channels, spec.kernel_size, spec.stride, spec.padding, groups=spec.groups
        ),
        nn.Identity() if spec.relu_after_pool else nn.ReLU(),
    ]
    if not spec.pool:
        return layers
    tail: list[nn.Module] = []
    if spec.norm is not None:
        norm = _TowerLocalResponseNorm if spec.norm.groups == 2 else nn.LocalResponseNorm
        tail.append(norm(spec.norm.size, spec.norm.alpha, spec.norm.beta, spec.norm.k))
    if spec.spatial_norm is not None:
        s = spec.spatial_norm
        tail.append(SpatialResponseNorm(s.size, s.alpha, s.beta, s.k))
    tail.append(nn.MaxPool2d(spec.pool_size, 2, ceil_mode=ceil_mode))
    if spec.relu_after_pool:
        tail.append(nn.ReLU())
    return [*layers, nn.Sequential(*tail)]
