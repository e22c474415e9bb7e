"""The net from torch's own layers, at torchvision's indices."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from fastalex.model.layers import SpatialResponseNorm
from fastalex.model.variants import Convolution, Variant


class CeilConv2d(nn.Conv2d):
    """nn.Conv2d whose number of outputs is rounded up, by zeros at the bottom and right."""

    ceil_mode = True

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        # Zeros that complete no window are not read, so their number need not follow the size.
        bottom, right = self.stride[0] - 1, self.stride[1] - 1
        padded = F.pad(input, [0, right, 0, bottom])
        return self._conv_forward(padded, self.weight, self.bias)  # type: ignore[no-any-return]


class TowerLocalResponseNorm(nn.LocalResponseNorm):
    """nn.LocalResponseNorm on each of two halves of the channels."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        first, second = torch.chunk(input, 2, 1)
        size, alpha, beta, k = self.size, self.alpha, self.beta, self.k
        first = F.local_response_norm(first, size, alpha, beta, k)
        second = F.local_response_norm(second, size, alpha, beta, k)
        return torch.cat([first, second], 1)


class TowerLinear(nn.Linear):
    """Two nn.Linear, each from one half of the inputs to one half of the outputs."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features // 2, out_features)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        first, second = torch.chunk(input, 2, 1)
        weights, biases = torch.chunk(self.weight, 2, 0), torch.chunk(self.bias, 2, 0)
        first, second = (
            F.linear(first, weights[0], biases[0]),
            F.linear(second, weights[1], biases[1]),
        )
        return torch.cat([first, second], 1)


def feature_layers(variant: Variant) -> list[nn.Module]:
    """The layers of ``features``: thirteen, those that a variant adds inside the poolings."""
    layers: list[nn.Module] = []
    channels = 3
    for spec in variant.convolutions:
        if spec.removed:
            layers += [nn.Identity(), nn.Identity()]
        else:
            kind = CeilConv2d if spec.ceil_mode else nn.Conv2d
            window = (spec.kernel_size, spec.stride, spec.padding)
            layers.append(kind(channels, spec.channels, *window, groups=spec.groups))
            layers.append(nn.Identity() if spec.relu_after_pool else nn.ReLU())
            channels = spec.channels
        if spec.pool:
            layers.append(_pool(spec, variant.pool_ceil_mode))
    return layers


def _pool(spec: Convolution, ceil_mode: bool) -> nn.Module:
    pool = nn.MaxPool2d(spec.pool_size, 2, ceil_mode=ceil_mode)
    layers: list[nn.Module] = []
    if spec.norm is not None:
        norm = TowerLocalResponseNorm if spec.norm.groups == 2 else nn.LocalResponseNorm
        layers.append(norm(spec.norm.size, spec.norm.alpha, spec.norm.beta, spec.norm.k))
    if spec.spatial_norm is not None:
        s = spec.spatial_norm
        layers.append(SpatialResponseNorm(s.size, s.alpha, s.beta, s.k))
    after: list[nn.Module] = [nn.ReLU()] if spec.relu_after_pool else []
    if spec.norm_after_pool:
        layers, after = [], layers
    return nn.Sequential(*layers, pool, *after) if layers or after else pool


def classifier_layers(
    variant: Variant, width: int, num_classes: int, dropout: float
) -> list[nn.Module]:
    """The seven layers of ``classifier``.

    Args:
        variant: whose they are.
        width: inputs of the first.
        num_classes: outputs of the last.
        dropout: probability that a unit is dropped.
    """
    hidden = variant.fully_connected[:-1]
    left = sum(not spec.removed for spec in hidden)
    before = variant.dropout_on_input and left > 0
    layers: list[nn.Module] = [nn.Dropout(dropout) if before else nn.Identity()]
    for spec in hidden:
        if spec.removed:
            layers += [nn.Identity(), nn.Identity(), nn.Identity()]
            continue
        assert spec.features is not None
        left -= 1
        kind = TowerLinear if spec.groups == 2 else nn.Linear
        drops = left > 0 or not variant.dropout_on_input  # what the next layer reads
        after = nn.Dropout(dropout) if drops else nn.Identity()
        layers += [kind(width, spec.features), nn.ReLU(), after]
        width = spec.features
    *layers, relu, drop = layers  # no index is left for the last dropout
    layers.append(relu if isinstance(drop, nn.Identity) else nn.Sequential(relu, drop))
    return [*layers, nn.Linear(width, num_classes)]
