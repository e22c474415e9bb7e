"""The net from fused layers, at the indices of the layers whose parameters they hold."""

from __future__ import annotations

import itertools
from typing import Any, NoReturn

import torch
from torch import nn

from fastalex.model.layers import (
    Conv2dReLU,
    Dropout,
    Linear,
    LinearReLUDropout,
    LRNMaxPool2d,
    MaxPool2d,
    SpatialResponseNorm,
)
from fastalex.model.unfused import TowerLinear
from fastalex.model.variants import Convolution, Variant

USE_UNFUSED = "use model.unfused(), which has the same parameters in torch's own layers"
_HOOKS = (
    "register_forward_pre_hook", "register_forward_hook", "register_backward_hook",
    "register_full_backward_pre_hook", "register_full_backward_hook",
)  # fmt: skip


def absorb(module: nn.Module) -> nn.Module:
    """Make ``module``, a ReLU or dropout that the layer before computes, pass its input on.

    It keeps its type, so that tools which look for ReLUs find it; as its input is not the ReLU's,
    it refuses their hooks.
    """
    module.forward = _pass_on
    module.extra_repr = _absorbed_repr  # type: ignore[method-assign]
    for name in _HOOKS:
        setattr(module, name, _refuse_hook)
    return module


def is_absorbed(module: nn.Module) -> bool:
    """Whether ``module``, or all that is in it, is computed by the layer before it."""
    if isinstance(module, nn.Sequential):
        return len(module) > 0 and all(map(is_absorbed, module))
    return module.__dict__.get("forward") is _pass_on


def restore(module: nn.Module) -> None:
    """Undo ``absorb``."""
    for name in ("forward", "extra_repr", *_HOOKS):
        module.__dict__.pop(name, None)


def _pass_on(input: torch.Tensor) -> torch.Tensor:
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
            absorbed = self._absorbed_by(name) if isinstance(old, _FUSED) else []
            for module in absorbed:
                if isinstance(value, LinearReLUDropout) and isinstance(module, nn.Dropout):
                    value.absorb(module)
                elif not isinstance(value, _FUSED):
                    restore(module)
        super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        old = self._modules.get(name)
        if old is not None:
            self._check_free(name, old)
        super().__delattr__(name)

    def _check_free(self, name: str, old: nn.Module) -> None:
        if is_absorbed(old):
            raise NotImplementedError(
                f"{name}: the layer before computes this {type(old).__name__}: {USE_UNFUSED}"
            )

    def _absorbed_by(self, name: str) -> list[nn.Module]:
        """The modules that the layer ``name`` computes."""
        following = list(self)[list(self._modules).index(name) + 1 :]
        return _parts(list(itertools.takewhile(is_absorbed, following)))


_FUSED = (Conv2dReLU, LinearReLUDropout)


def fuse_features(variant: Variant, layers: list[nn.Module]) -> FusedSequential:
    """``features`` of fused layers.

    Args:
        variant: whose they are.
        layers: of ``unfused.feature_layers``; those that are absorbed are taken over.
    """
    fused: list[nn.Module] = []
    stock = iter(layers)
    for spec in variant.convolutions:
        convolution, relu = next(stock), next(stock)
        if isinstance(convolution, nn.Conv2d):
            convolution = _convolution(spec, convolution.in_channels)
            relu = relu if spec.relu_after_pool else absorb(relu)
        fused += [convolution, relu]
        if spec.pool:
            next(stock)
            fused.append(_pool(spec, variant.pool_ceil_mode))
    return FusedSequential(*fused)


def _convolution(spec: Convolution, channels: int) -> Conv2dReLU:
    return Conv2dReLU(
        channels, spec.channels, spec.kernel_size, spec.stride, spec.padding, spec.groups,
        spec.ceil_mode, relu=not spec.relu_after_pool,
    )  # fmt: skip


def _pool(spec: Convolution, ceil_mode: bool) -> nn.Module:
    pool: dict[str, Any] = {"kernel_size": spec.pool_size, "stride": 2, "ceil_mode": ceil_mode}
    if spec.norm is None:
        return MaxPool2d(**pool)
    norm = (spec.norm.size, spec.norm.alpha, spec.norm.beta, spec.norm.k, spec.norm.groups)
    if spec.norm_after_pool:
        alone = LRNMaxPool2d(*norm, kernel_size=1, stride=1, signed=False)
        return nn.Sequential(MaxPool2d(**pool), alone)
    if spec.spatial_norm is None:
        relu = spec.relu_after_pool
        return LRNMaxPool2d(*norm, **pool, relu=relu, signed=relu)
    spatial = spec.spatial_norm
    return nn.Sequential(
        LRNMaxPool2d(*norm, kernel_size=1, stride=1, signed=False),
        SpatialResponseNorm(spatial.size, spatial.alpha, spatial.beta, spatial.k),
        MaxPool2d(**pool),
    )


def fuse_classifier(layers: list[nn.Module]) -> FusedSequential:
    """``classifier`` of fused layers, in the places of those of ``unfused.classifier_layers``."""
    fused: list[nn.Module] = []
    for i, layer in enumerate(layers):
        if i == len(layers) - 1:
            assert isinstance(layer, nn.Linear)
            layer = Linear(layer.in_features, layer.out_features)
        elif isinstance(layer, nn.Linear):
            groups = 2 if isinstance(layer, TowerLinear) else 1
            layer = LinearReLUDropout(groups * layer.in_features, layer.out_features, 0.0, groups)
            for dropout in _parts(layers[i + 1 : i + 3]):
                if isinstance(dropout, nn.Dropout):
                    layer.absorb(dropout)
        elif i == 0 and isinstance(layer, nn.Dropout):
            layer = Dropout(layer.p)
        else:
            for part in _parts([layer]):
                if isinstance(part, (nn.ReLU, nn.Dropout)):
                    absorb(part)
        fused.append(layer)
    return FusedSequential(*fused)


def _parts(layers: list[nn.Module]) -> list[nn.Module]:
    return [part for layer in layers for part in layer.modules()]
