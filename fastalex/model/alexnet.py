"""AlexNet, drop-in for torchvision's; it knows nothing of devices or processes."""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import fastalex_kernels as kernels
from fastalex.model.ablations import get_variant
from fastalex.model.forms import USE_UNFUSED, classifier_layers, feature_layers
from fastalex.model.layers import (
    AdaptiveAvgPool2d,
    Conv2dReLU,
    CounterDropout,
    Dropout,
    Linear,
    LRNMaxPool2d,
    MaxPool2d,
    SpatialResponseNorm,
)
from fastalex.model.variants import Convolution, FullyConnected, Variant

_GRID = 6  # the last maps are averaged to 6 x 6, which they are at the published image size
_STREAM = 0x9E3779B97F4A7C15  # keeps the dropout seeds of the layers apart
HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
_KINDS = (
    (nn.Conv2d, "conv"), (nn.Linear, "fc"), (MaxPool2d, "pool"),
    (SpatialResponseNorm, "spatial-norm"), (Dropout, "dropout"),
)  # fmt: skip
_FUSED_LAYERS = (Conv2dReLU, MaxPool2d, CounterDropout, Linear, AdaptiveAvgPool2d)


class AlexNet(nn.Module):
    """The AlexNet of 2012, on fused kernels or from torch's own layers.

    ``features``, ``avgpool`` and ``classifier`` are indexed as in torchvision's ``alexnet``.
    Replacing ``classifier[6]``, slicing ``features`` and loading torchvision's state dict (variant
    ``"owt"``) work as there. Fused, a layer computes the ReLU and dropout after it too; those stay
    in their places, pass their input on and refuse hooks. Where another layer takes the place of a
    fused one, they are layers again.

    Args:
        num_classes: outputs, at least 1.
        dropout: probability that a unit is dropped, in [0, 1).
        variant: ``"paper"``, ``"source2012"``, ``"caffe"`` or ``"owt"``; see
            fastalex.model.variants. Or such a name edited, ``"paper-without-lrn"``, or a Variant;
            see fastalex.model.ablations.
        fused: False is the same net from nn.Conv2d, nn.ReLU, nn.LocalResponseNorm, nn.MaxPool2d,
            nn.Linear and nn.Dropout, for whoever hooks, traces, attributes or exports.

    Shapes:
        images [N, 3, H, W] to logits [N, num_classes]. Any size from ``smallest_image_size()`` on;
        published are 224 (227 for caffe).

    Raises:
        ValueError: for an argument out of range, naming it.
    """

    def __init__(
        self,
        num_classes: int = 1000,
        dropout: float = 0.5,
        variant: str | Variant = "paper",
        fused: bool = True,
    ) -> None:
        super().__init__()
        if type(num_classes) is not int or num_classes < 1:
            raise ValueError(f"num_classes: expected an int of at least 1, got {num_classes!r}")
        if type(dropout) not in (int, float) or not 0 <= dropout < 1:
            raise ValueError(f"dropout: expected a probability in [0, 1), got {dropout!r}")
        self.variant: Variant = get_variant(variant)
        self.num_classes, self.dropout, self.is_fused = num_classes, dropout, fused
        self._counters: _Counters | None = None
        # What ``fastalex.load`` finds: names of the outputs, and what makes an input of an image.
        self.classes: list[str] | None = None
        self.transforms: Callable[[Any], Tensor] | None = None
        self.features = feature_layers(self.variant, fused)
        self.avgpool = (AdaptiveAvgPool2d if fused else nn.AdaptiveAvgPool2d)((_GRID, _GRID))
        channels = [spec.channels for spec in self.variant.convolutions if not spec.removed][-1]
        width = channels * _GRID**2
        self.classifier = classifier_layers(self.variant, width, num_classes, dropout, fused)
        self.num_features = int(self.classifier[-1].in_features)  # type: ignore[arg-type]
        self.init_parameters("published")

    def forward(self, images: Tensor) -> Tensor:
        if self.is_fused and not torch.jit.is_scripting():  # type: ignore[attr-defined]
            self._check(images)
        return self.classifier(torch.flatten(self.avgpool(self.features(images)), 1))  # type: ignore[no-any-return]

    def _check(self, images: Tensor) -> None:
        """Raise where fused layers can't compute the logits of ``images``."""
        if _is_observed(images):
            raise NotImplementedError(
                f"fused layers can't be traced, nor transformed by torch.func: {USE_UNFUSED}"
            )
        first = next(self.features.children(), None)
        channels = first.in_channels if isinstance(first, nn.Conv2d) else 3
        if len(images.shape) != 4 or (isinstance(first, nn.Conv2d) and images.shape[1] != channels):
            shape = tuple(images.shape)
            raise ValueError(f"images: expected [N, {channels}, H, W], got shape {shape}")
        self.check_image_size(images.shape[2], images.shape[3])

    def fused(self) -> AlexNet:
        """``unfused`` undone: the same net on fused kernels, with the same parameters.

        Raises:
            ValueError: where a layer was changed in a way that the fused net can't take over.
            NotImplementedError: where a ReLU or dropout that a kernel computes was replaced.
        """
        return self._converted(True)

    def unfused(self) -> AlexNet:
        """The same net from torch's own layers; the parameters are shared, not copied.

        It is what can be hooked, traced, scripted, attributed, pruned, quantised and exported. Its
        dropout draws from torch's generator.

        Raises:
            ValueError: where a layer was changed in a way that torch's own can't take over.
        """
        return self._converted(False)

    def __prepare_scriptable__(self) -> AlexNet:
        """What torch.jit.script compiles."""
        return self.unfused()

    def _converted(self, fused: bool) -> AlexNet:
        if fused == self.is_fused:
            return self
        arguments = (self.num_classes, self.dropout, self.variant)
        with torch.device("meta"):
            made, other = AlexNet(*arguments, not fused), AlexNet(*arguments, fused)
        for part in ("features", "classifier"):
            mine, before, after = (getattr(net, part) for net in (self, made, other))
            if len(mine) != len(before):
                raise ValueError(f"{part}: expected {len(before)} layers, got {len(mine)}")
            for name, layer in mine.named_children():
                if repr(layer) == repr(before.get_submodule(name)):
                    _share(f"{part}.{name}", layer, after.get_submodule(name))
                elif any(isinstance(m, _FUSED_LAYERS) for m in layer.modules()):
                    raise ValueError(f"{part}.{name}: changed since it was made: {layer}")
                else:  # a layer of the user's
                    setattr(after, name, layer)
        modes = {name: module.training for name, module in self.named_modules()}
        for name, module in other.named_modules():
            module.training = modes.get(name, self.training)
        other.classes, other.transforms = self.classes, self.transforms
        return other

    def forward_features(self, images: Tensor) -> Tensor:
        """The last maps, [N, channels, h, w], as timm's models give them."""
        return self.features(images)  # type: ignore[no-any-return]

    def forward_head(self, maps: Tensor, pre_logits: bool = False) -> Tensor:
        """The logits of the last maps, or with ``pre_logits`` what the last layer reads."""
        head = self.classifier[:-1] if pre_logits else self.classifier
        return head(torch.flatten(self.avgpool(maps), 1))  # type: ignore[no-any-return]

    def get_classifier(self) -> nn.Module:
        """The last layer."""
        return self.classifier[-1]

    def reset_classifier(self, num_classes: int) -> None:
        """Put a new last layer with ``num_classes`` outputs in, on the old one's device."""
        old = next(self.classifier[-1].parameters())
        new = (Linear if self.is_fused else nn.Linear)(self.num_features, num_classes)
        self.classifier[-1] = new.to(old.device, old.dtype)
        self.num_classes = num_classes

    def dropout_counters(self) -> object:
        """What ``seed_dropout`` writes to; another object where the layers' counters moved."""
        return self._counters

    def dropout_version(self) -> int:
        """A number that each ``seed_dropout`` raises, -1 before the first."""
        return -1 if self._counters is None else self._counters.held._version

    def check_image_size(self, height: int, width: int) -> None:
        """Raise a ValueError where so few pixels leave nothing for the last layer."""
        if self._sizes(min(height, width))[-1] < 1:
            smallest = self.smallest_image_size()
            raise ValueError(
                f"images: {height} x {width} pixels are too few, "
                f"the smallest image this net takes is {smallest} x {smallest}"
            )

    def map_size(self, image_size: tuple[int, int]) -> tuple[int, int]:
        """Height and width of the maps before ``avgpool``, of images of that size."""
        height, width = image_size
        return self._sizes(height)[-1], self._sizes(width)[-1]

    def smallest_image_size(self) -> int:
        """The side in pixels of the smallest square image that reaches the last layer."""
        return next(size for size in itertools.count(1) if self._sizes(size)[-1] > 0)

    def _sizes(self, size: int) -> list[int]:
        """Outputs of each layer along an axis of ``size`` pixels; 0 from where there are none."""
        sizes = [size]
        for layer in self.features.modules():
            if isinstance(layer, (nn.Conv2d, nn.MaxPool2d, MaxPool2d)):
                sizes.append(_outputs(layer, sizes[-1]) if sizes[-1] > 0 else 0)
        return sizes

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
        specs: list[Convolution | FullyConnected] = [*convolutions, *connected]
        left = [spec for spec in specs if not spec.removed]
        layers = [m for m in self.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
        for layer, spec in zip(layers, left, strict=True):
            if not layer.weight.is_meta:  # there torch would import its compiler to draw nothing
                _init_layer(layer, None if scheme == "he" else spec, generator)

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


def _is_observed(images: Tensor) -> bool:
    """Whether torch traces what is done to ``images``, or is to differentiate it as a function."""
    if isinstance(images, torch.fx.Proxy) or torch._C._get_tracing_state() is not None:
        return True
    return not torch.compiler.is_compiling() and (
        torch._C._functorch.peek_interpreter_stack() is not None
        or torch.autograd.forward_ad._current_level >= 0
    )


def layer_names(model: nn.Module) -> dict[str, nn.Module]:
    """The layers by the names papers use: conv1, pool1, ... fc8; identities are left out."""
    names: dict[str, nn.Module] = {}
    number = 0
    for module in model.modules():
        alone = isinstance(module, LRNMaxPool2d) and module.kernel_size == 1
        number += isinstance(module, (nn.Conv2d, nn.Linear))
        for kind, name in _KINDS:
            if isinstance(module, kind):
                names[f"{'norm' if alone else name}{number}"] = module
    return names


class _Counters:
    """The (seed, offset) of every dropout layer, as rows of one tensor."""

    def __init__(self, layers: Sequence[CounterDropout], device: torch.device) -> None:
        with torch.inference_mode(False):  # or no pass in training could save them
            self.held = torch.empty(len(layers), 2, dtype=torch.int64, device=device)
        self._rows = list(self.held)
        self._written: tuple[int, int] | None = None  # the seed, and the tensor's version since
        for layer, row in zip(layers, self._rows, strict=True):
            layer.set_mask(rng=row)

    def serve(self, layers: Sequence[CounterDropout], device: torch.device) -> bool:
        """Whether these are the layers that read them, on that device."""
        rngs = [layer.mask.rng for layer in layers]
        same = len(rngs) == len(self._rows) and all(map(operator.is_, rngs, self._rows))
        return same and self.held.device == device

    def write(self, seed: int, step: int) -> None:
        # Filled and not copied: a copy from the host's memory waits for the GPU to be done.
        if self._written != (seed, self.held._version):
            for index, row in enumerate(self._rows):
                row[0].fill_((seed + (index + 1) * _STREAM) % 2**63)
        self.held[:, 1].fill_(step)
        self._written = (seed, self.held._version)


def _outputs(layer: nn.Conv2d | nn.MaxPool2d | MaxPool2d, size: int) -> int:
    """Outputs of a layer along an axis of ``size`` pixels."""
    first = lambda v: v if isinstance(v, int) else v[0]  # noqa: E731
    kernel, stride = map(first, (layer.kernel_size, layer.stride))
    ceil = getattr(layer, "ceil_mode", False)
    if not isinstance(layer, nn.Conv2d):
        return max(0, kernels.pooled_size(size, kernel, stride, ceil))
    if isinstance(layer.padding, str):  # "same"
        return size
    span = size + 2 * layer.padding[0] - layer.dilation[0] * (kernel - 1) - 1
    return (span + (stride - 1) * ceil) // stride + 1 if span >= 0 else 0


def _share(path: str, layer: nn.Module, other: nn.Module) -> None:
    """Give ``other`` the parameters of ``layer``."""
    if list(layer._parameters) != list(other._parameters):
        raise ValueError(f"{path}: pruned or otherwise changed, take the other form before that")
    for module in layer.modules():
        if any(module.__dict__[kind] for kind in HOOKS):
            raise ValueError(f"{path}: it has a hook, which the other form would not")
    for name, parameter in layer._parameters.items():
        other._parameters[name] = parameter


def _init_layer(
    layer: nn.Conv2d | nn.Linear,
    spec: Convolution | FullyConnected | None,
    generator: torch.Generator | None,
) -> None:
    """Draw a layer's parameters as ``spec`` says, or with He's variance."""
    assert layer.bias is not None
    fan_in = layer.weight[0].numel()
    weight, bias = torch.empty(layer.weight.shape), torch.empty(layer.bias.shape)
    std, constant = (math.sqrt(2.0 / fan_in), 0.0) if spec is None else (spec.weight_std, spec.bias)
    if std is None:  # as nn.Conv2d and nn.Linear draw theirs
        weight.uniform_(-(fan_in**-0.5), fan_in**-0.5, generator=generator)
        bias.uniform_(-(fan_in**-0.5), fan_in**-0.5, generator=generator)
    else:
        weight.normal_(0.0, std, generator=generator)
        bias.fill_(constant)
    layer.weight.copy_(weight)
    layer.bias.copy_(bias)


class ReferenceAlexNet(AlexNet):
    """``AlexNet(..., fused=False)``: AlexNet from torch's own layers."""

    def __init__(
        self, num_classes: int = 1000, dropout: float = 0.5, variant: str | Variant = "paper"
    ) -> None:
        super().__init__(num_classes, dropout, variant, fused=False)
