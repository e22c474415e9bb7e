"""The layers of AlexNet, each called alone and forward and backward, on tensors without data."""

from __future__ import annotations

from collections.abc import Callable

import torch

from fastalex import AlexNet
from fastalex.distributed.exchange import LoopbackExchange
from fastalex.distributed.towers import cut_to_tower
from fastalex.inspection.record import Layer, layers_of

NAMES = (
    "conv1", "pool1", "conv2", "pool2", "conv3", "conv4", "conv5", "pool5", "fc6", "fc7", "fc8",
)  # fmt: skip


def layers(batch: int, towers: int = 1) -> dict[str, Layer]:
    """The layers by name, one tower's of two where asked, with the shapes of published images."""
    model = AlexNet()
    if towers > 1:
        cut_to_tower(model, LoopbackExchange())
    model.seed_dropout(0, 0)
    return layers_of(model, batch, model.variant.image_size)


def call(name: str, batch: int, dtype: torch.dtype, towers: int = 1) -> Callable[[], None]:
    """A layer's forward and backward by autograd, to be recorded by ``offline``."""

    def run() -> None:
        layer = layers(batch, towers)[name]
        assert isinstance(layer.module, torch.nn.Module)
        x = torch.empty(layer.input, dtype=dtype, requires_grad=layer.needs_input_grad)
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            output = layer.module.forward(x)  # it is given both halves
        output.backward(torch.empty_like(output))

    return run
