"""The layers of a variant at torchvision's indices, in two forms: fused, and torch's own."""

from __future__ import annotations

import itertools
from dataclasses import asdict
from typing import Any, NoReturn, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastalex.model.layers import (
    Conv2dReLU,
    Dropout,
    Linear,
    LinearReLUDropout,
    LRNMaxPool2d,
    MaxPool2d,
    SpatialResponseNorm,
)
from fastalex.model.variants import Convolution, Variant

USE_UNFUSED = "use model.unfused(), which has the same parameters in torch's own layers"
Module = TypeVar("Module", bound=nn.Module)
_HOOKS = (
    "register_forward_pre_hook", "register_forward_hook", "register_backward_hook",
    "register_full_backward_pre_hook", "register_full_backward_hook",
)  # fmt: skip


class CeilConv2d(nn.Conv2d):
    """nn.Conv2d whose number of outputs is rounded up, by zeros at the bottom and right."""

    ceil_mode = True

    def forward(self, input: Tensor) -> Tensor:
        # Zeros that complete no window are not read, so their number need not follow the size.
        bottom, right = self.stride[0] - 1, self.stride[1] - 1
        padded = F.pad(input, [0, right, 0, bottom])
        return self._conv_forward(padded, self.weight, self.bias)  # type: ignore[no-any-return]


class TowerLocalResponseNorm(nn.LocalResponseNorm):
    """nn.LocalResponseNorm on each of two halves of the channels."""

    def forward(self, input: Tensor) -> Tensor:
        first, second = torch.chunk(input, 2, 1)
        size, alpha, beta, k = self.size, self.alpha, self.beta, self.k
        first = F.local_response_norm(first, size, alpha, beta, k)
        second = F.local_response_norm(second, size, alpha, beta, k)
        return torch.cat([first, second], 1)


class TowerLinear(nn.Linear):
    """Two nn.Linear, each from one half of the inputs to one half of the outputs."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features // 2, out_features)

    def forward(self, input: Tensor) -> Tensor:
        first, second = torch.chunk(input, 2, 1)
        weights, biases = torch.chunk(self.weight, 2, 0), torch.chunk(self.bias, 2, 0)
        first = F.linear(first, weights[0], biases[0])
        second = F.linear(second, weights[1], biases[1])
        return torch.cat([first, second], 1)


def absorb(module: Module) -> Module:
    """Make ``module``, a ReLU or dropout that the layer before computes, pass its input on.

    Its type stays, so that tools which look for just that type find it. As its input is not the
    ReLU's, it refuses their hooks.
    """
    vars(module).update(forward=_pass_on, extra_repr=_absorbed_repr)
    vars(module).update(dict.fromkeys(_HOOKS, _refuse_hook))
    return module


def is_absorbed(module: nn.Module) -> bool:
    """Whether ``module``, or all that is in it, is computed by the layer before it."""
    if isinstance(module, nn.Sequential):
        return len(module) > 0 and all(map(is_absorbed, module))
    return vars(module).get("forward") is _pass_on


def _restore(module: nn.Module) -> None:
    """Undo ``absorb``."""
    for name in ("forward", "extra_repr", *_HOOKS):
        del vars(module)[name]


def _pass_on(input: Tensor) -> Tensor:
    return input


def _absorbed_repr() -> str:
    return "computed by the layer before"


def _refuse_hook(*_: Any, **__: Any) -> NoReturn:
    raise NotImplementedError(
        f"the layer before computes this one, and what it reads is not kept: {USE_UNFUSED}"
    )


class FusedSequential(nn.Sequential):
    """nn.Sequential of fused layers, in which a ReLU is never lost.

    Where another layer takes the place of a fused one, the ReLU and dropout that it computed are
    layers again. In the place of those nothing can be put.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        old = self.__dict__.get("_modules", {}).get(name)
        if old is not None and old is not value:
            self._check_free(name, old)
            fused = isinstance(value, (Conv2dReLU, LinearReLUDropout))
            for module in self._absorbed_by(name, old):
                if isinstance(value, LinearReLUDropout) and isinstance(module, nn.Dropout):
                    value.absorb(module)
                elif not fused:  # a ReLU or dropout again
                    _restore(module)
        super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        self._check_free(name, self._modules.get(name))
        super().__delattr__(name)

    def _check_free(self, name: str, old: nn.Module | None) -> None:
        if old is not None and is_absorbed(old):
            raise NotImplementedError(
                f"{name}: the layer before computes this {type(old).__name__}: {USE_UNFUSED}"
            )

    def _absorbed_by(self, name: str, layer: nn.Module) -> list[nn.Module]:
        """The modules that ``layer``, called ``name``, computes."""
        if not isinstance(layer, (Conv2dReLU, LinearReLUDropout)):
            return []
        following = list(self)[list(self._modules).index(name) + 1 :]
        absorbed = itertools.takewhile(is_absorbed, following)
        return [m for each in absorbed for m in each.modules() if "forward" in vars(m)]


def feature_layers(variant: Variant, fused: bool) -> nn.Sequential:
    """``features``: thirteen layers, those that a variant adds inside the poolings."""
    layers: list[nn.Module] = []
    channels = 3
    for spec in variant.convolutions:
        if spec.removed:
            layers += [nn.Identity(), nn.Identity()]
        else:
            layers += _convolution(spec, channels, fused)
            channels = spec.channels
        if spec.pool:
            layers.append(_pool(spec, variant.pool_ceil_mode, fused))
    return FusedSequential(*layers) if fused else nn.Sequential(*layers)


def _convolution(spec: Convolution, channels: int, fused: bool) -> list[nn.Module]:
    """A convolution, and its ReLU unless that comes later."""
    window = (channels, spec.channels, spec.kernel_size, spec.stride, spec.padding)
    late = spec.relu_after_pool
    if fused:
        layer = Conv2dReLU(*window, spec.groups, spec.ceil_mode, relu=not late)
        return [layer, nn.Identity() if late else absorb(nn.ReLU())]
    kind = CeilConv2d if spec.ceil_mode else nn.Conv2d
    return [kind(*window, groups=spec.groups), nn.Identity() if late else nn.ReLU()]


def _pool(spec: Convolution, ceil_mode: bool, fused: bool) -> nn.Module:
    """A pooling, with the norms before or after it, and the ReLU that comes late."""
    norm, spatial, late = spec.norm, spec.spatial_norm, spec.relu_after_pool
    pool: dict[str, Any] = {"kernel_size": spec.pool_size, "stride": 2, "ceil_mode": ceil_mode}
    if fused and norm is not None and spatial is None and not spec.norm_after_pool:
        return LRNMaxPool2d(**asdict(norm), **pool, relu=late, signed=late)
    norms: list[nn.Module] = []
    if norm is not None and fused:
        norms.append(LRNMaxPool2d(**asdict(norm), kernel_size=1, stride=1, signed=False))
    elif norm is not None:
        kind = TowerLocalResponseNorm if norm.groups == 2 else nn.LocalResponseNorm
        norms.append(kind(norm.size, norm.alpha, norm.beta, norm.k))
    if spatial is not None:
        norms.append(SpatialResponseNorm(spatial.size, spatial.alpha, spatial.beta, spatial.k))
    pooled: list[nn.Module] = [MaxPool2d(**pool) if fused else nn.MaxPool2d(**pool)]
    pooled += [nn.ReLU()] if late else []
    layers = [*pooled, *norms] if spec.norm_after_pool else [*norms, *pooled]
    return nn.Sequential(*layers) if len(layers) > 1 else layers[0]


def classifier_layers(
    variant: Variant, width: int, num_classes: int, dropout: float, fused: bool
) -> nn.Sequential:
    """``classifier``: seven layers, the first of which reads ``width`` features."""
    hidden = variant.fully_connected[:-1]
    left = sum(not spec.removed for spec in hidden)
    layers: list[nn.Module] = [nn.Identity()]
    if variant.dropout_on_input and left > 0:
        layers = [Dropout(dropout) if fused else nn.Dropout(dropout)]
    for spec in hidden:
        if spec.removed:
            layers += [nn.Identity(), nn.Identity(), nn.Identity()]
            continue
        assert spec.features is not None
        left -= 1
        drops = left > 0 or not variant.dropout_on_input  # what the next layer reads
        if fused:
            layer = LinearReLUDropout(width, spec.features, 0.0, spec.groups)
            drop = absorb(nn.Dropout(dropout))
            layers += [layer, absorb(nn.ReLU()), drop if drops else nn.Identity()]
            if drops:
                layer.absorb(drop)
        else:
            kind = TowerLinear if spec.groups == 2 else nn.Linear
            after = nn.Dropout(dropout) if drops else nn.Identity()
            layers += [kind(width, spec.features), nn.ReLU(), after]
        width = spec.features
    *layers, relu, last = layers  # no index is left for the last dropout
    layers.append(relu if isinstance(last, nn.Identity) else nn.Sequential(relu, last))
    layers.append((Linear if fused else nn.Linear)(width, num_classes))
    return FusedSequential(*layers) if fused else nn.Sequential(*layers)
