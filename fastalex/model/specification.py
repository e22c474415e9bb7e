"""What a net of this family is made of, as data."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ResponseNorm:
    """Normalisation by x * (k + alpha / n * sum of squares) ^ -beta, n the size of the window."""

    k: float
    alpha: float  # divided by the size of the window, as torch does
    beta: float = 0.75
    size: int = 5
    groups: int = 1  # the window stays inside one of this many groups of channels


@dataclass(frozen=True)
class Convolution:
    """A convolutional layer and what follows it."""

    channels: int
    kernel_size: int
    stride: int = 1
    padding: int = 0
    groups: int = 1
    ceil_mode: bool = False  # outputs counted with ceil: zeros at the bottom and right
    weight_std: float | None = 0.01  # None: torch's default initialisation
    bias: float = 0.0
    norm: ResponseNorm | None = None
    spatial_norm: ResponseNorm | None = None  # within a map, over size x size pixels
    pool: bool = False  # max, stride 2
    pool_size: int = 3
    relu_after_pool: bool = False  # convolution, norm, pool, ReLU: the order of net 145
    removed: bool = False  # the convolution and its ReLU are left out; its pooling stays


@dataclass(frozen=True)
class FullyConnected:
    """A fully connected layer; the last one has neither ReLU nor dropout."""

    features: int | None  # None: the number of classes
    weight_std: float | None = 0.01
    bias: float = 0.0
    groups: int = 1  # of inputs and outputs that do not meet
    removed: bool = False


@dataclass(frozen=True)
class Variant:
    """One published net: its layers, and how it is initialised and trained."""

    name: str
    convolutions: tuple[Convolution, ...]
    fully_connected: tuple[FullyConnected, ...]
    towers: int = 1  # independent halves that exchange before conv3, fc6, fc7 and fc8
    pool_ceil_mode: bool = True
    dropout_on_input: bool = False  # of fc6 and fc7, instead of on their outputs
    image_size: int = 224
    bias_lr_multiplier: float = 1.0
    bias_weight_decay: bool = True
