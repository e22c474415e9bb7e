"""fastalex_kernels: AlexNet's layers as fused Triton kernels, each a torch autograd function.

Every function takes logical NCHW tensors of any strides and is differentiable. On a GPU it runs
Triton kernels, on a CPU torch's own operators; ``backend`` chooses otherwise.
"""

from . import layers, reference
from .augment import Crops, PixelNorm, augment
from .common.backend import backend
from .conv2d.function import conv2d_relu
from .cross_entropy import cross_entropy
from .linear.function import dropout, linear_relu_dropout
from .lrn_pool.function import lrn_max_pool2d, max_pool2d, pooled_size

__all__ = [
    "Crops",
    "PixelNorm",
    "augment",
    "backend",
    "conv2d_relu",
    "cross_entropy",
    "dropout",
    "layers",
    "linear_relu_dropout",
    "lrn_max_pool2d",
    "max_pool2d",
    "pooled_size",
    "reference",
]
