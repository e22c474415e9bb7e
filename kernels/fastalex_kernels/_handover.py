"""A ReLU's backward done by the kernel that makes its gradient, and its bias sums with it.

The gradient of y = relu(z) is masked by y > 0, and the bias gradient is its column sum. Made apart,
that is a pass over two activations; the kernel that writes the gradient of y, of a pooling layer or
of the next convolution, has it in registers. So where both layers apply their gradients in backward
(see momentum) and nobody else looks at what passes between them, that kernel masks what it writes,
sums it, and hands the sums over on the tensor itself.

Nothing relies on it: a gradient that was added to another or changed on the way has no sums, and
masking it once more changes nothing.

A layer's backward also announces its input's gradient as soon as that is written, before it goes on
to its weight's: what sends it to another GPU begins meanwhile.
"""

from __future__ import annotations

from typing import Any

import torch

from fastalex_kernels._epilogue import sum_partials

_SUMS = "_fastalex_relu_sums"
_MOST = 8192  # rows of sums that the update adds up: some 32 loads, one waiting for another
_ROWS = 256  # what it loads in one go


def offers(node: Any, relu: bool, update: object) -> None:
    """Say on an autograd node, in forward, that its ReLU's mask may be applied by its successor."""
    node.relu_is_open = relu and update is not None


def wanted(input: torch.Tensor) -> bool:
    """Whether ``input`` is a ReLU's output whose gradient may come masked."""
    return getattr(input.grad_fn, "relu_is_open", False)


def hand_over(gradient: torch.Tensor, sums: torch.Tensor | None = None) -> torch.Tensor:
    """The masked ``gradient`` with its column sums, float32 [parts, channels], on it."""
    if sums is not None and len(sums) == 0:  # of an empty batch
        return gradient
    setattr(gradient, _SUMS, (None if sums is None else _fewer(sums), gradient._version))
    return gradient


def masked(gradient: torch.Tensor) -> bool:
    """Whether a gradient came masked, and was not changed since."""
    _, version = getattr(gradient, _SUMS, (None, None))
    return version == gradient._version


def taken(gradient: torch.Tensor) -> torch.Tensor | None:
    """The column sums that came with a masked gradient; None where there are none."""
    sums, _ = getattr(gradient, _SUMS, (None, None))
    return sums if masked(gradient) else None


def announce(source: Any, gradient: torch.Tensor) -> None:
    """Tell the node that made a layer's input that the input's gradient is there.

    Args:
        source: the input's ``grad_fn``; only one with a ``gradient_announced`` listens.
        gradient: what the layer's backward is going to return.
    """
    listener = getattr(source, "gradient_announced", None)
    if listener is not None:
        listener(source, gradient)


def _fewer(sums: torch.Tensor) -> torch.Tensor:
    """Too many rows added up to a few, by more programs than the channels would give."""
    parts, channels = sums.shape
    if parts <= _MOST:
        return sums
    rows = next(r for r in range(_ROWS, 0, -1) if parts % r == 0)
    if rows < 8:
        return sums
    folded = sums.view(parts // rows, rows * channels)
    return sum_partials(folded, sums.new_empty((rows, channels)))
