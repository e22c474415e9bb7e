"""The four published AlexNets, as data.

| name | what it is | source |
|---|---|---|
| paper | the net as the paper prints it | Krizhevsky et al., NIPS 2012 |
| source2012 | the authors' net 145, which logged the paper's errors | S:layers/layers-145.cfg |
| caffe | the widely copied single-GPU net, LRN across groups | BVLC models/bvlc_alexnet |
| owt | "one weird trick": one tower, no LRN, as in torchvision | torchvision models/alexnet.py |

P§n is a section of the paper, S:file a file of the authors' 2012 program
(computerhistory/AlexNet-Source-Code).
"""

from __future__ import annotations

from dataclasses import dataclass, replace


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
    norm_after_pool: bool = False  # convolution, ReLU, pool, norm: the order of CaffeNet
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
    towers: int = 1  # independent halves; conv3, fc6, fc7 and fc8 read both
    pool_ceil_mode: bool = True
    dropout_on_input: bool = False  # of fc6 and fc7, instead of on their outputs
    image_size: int = 224
    bias_lr_multiplier: float = 1.0
    bias_weight_decay: bool = True


# P§3.3 prints alpha = 1e-4 undivided, which is 5e-4 before a division by the window's 5.
_PAPER_NORM = ResponseNorm(k=2.0, alpha=5e-4, groups=2)
_NORM_145 = ResponseNorm(k=2.0, alpha=1e-4, groups=2)
_SPATIAL_145 = ResponseNorm(k=1.0, alpha=1e-3)
_CAFFE_NORM = ResponseNorm(k=1.0, alpha=1e-4)
_FULL = FullyConnected(4096, bias=1.0)
_CAFFE_FULL = FullyConnected(4096, weight_std=0.005, bias=0.1)
_OWT_FULL = FullyConnected(4096, weight_std=None)

_PAPER = Variant(
    "paper",
    (
        Convolution(96, 11, stride=4, ceil_mode=True, norm=_PAPER_NORM, pool=True),
        Convolution(256, 5, padding=2, groups=2, bias=1.0, norm=_PAPER_NORM, pool=True),
        Convolution(384, 3, padding=1),
        Convolution(384, 3, padding=1, groups=2, bias=1.0),
        Convolution(256, 3, padding=1, groups=2, bias=1.0, pool=True),
    ),
    (_FULL, _FULL, FullyConnected(None)),
    towers=2,
)
_conv1, _conv2, *_late = _PAPER.convolutions
_SOURCE2012 = replace(
    _PAPER,
    name="source2012",
    convolutions=(
        replace(_conv1, norm=_NORM_145, relu_after_pool=True),
        replace(_conv2, norm=_NORM_145, spatial_norm=_SPATIAL_145),
        *(replace(convolution, weight_std=0.03) for convolution in _late),
    ),
    bias_lr_multiplier=2.0,
    bias_weight_decay=False,
)
_CAFFE = Variant(
    "caffe",
    (
        Convolution(96, 11, stride=4, norm=_CAFFE_NORM, pool=True),
        Convolution(256, 5, padding=2, groups=2, bias=0.1, norm=_CAFFE_NORM, pool=True),
        Convolution(384, 3, padding=1),
        Convolution(384, 3, padding=1, groups=2, bias=0.1),
        Convolution(256, 3, padding=1, groups=2, bias=0.1, pool=True),
    ),
    (_CAFFE_FULL, _CAFFE_FULL, FullyConnected(None)),
    image_size=227,
    bias_lr_multiplier=2.0,
    bias_weight_decay=False,
)
_OWT = Variant(
    "owt",
    (
        Convolution(64, 11, stride=4, padding=2, weight_std=None, pool=True),
        Convolution(192, 5, padding=2, weight_std=None, pool=True),
        Convolution(384, 3, padding=1, weight_std=None),
        Convolution(256, 3, padding=1, weight_std=None),
        Convolution(256, 3, padding=1, weight_std=None, pool=True),
    ),
    (_OWT_FULL, _OWT_FULL, FullyConnected(None, weight_std=None)),
    pool_ceil_mode=False,
    dropout_on_input=True,
)
VARIANTS = {variant.name: variant for variant in (_PAPER, _SOURCE2012, _CAFFE, _OWT)}

# Nets that others published weights of, to be converted and used, which no recipe trains.
# Source: BVLC models/bvlc_reference_caffenet.
_CAFFENET = tuple(replace(c, norm_after_pool=True) for c in _CAFFE.convolutions)
FOREIGN = {"caffenet": replace(_CAFFE, name="caffenet", convolutions=_CAFFENET)}
