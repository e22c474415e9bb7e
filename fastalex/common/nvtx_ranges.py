"""Named ranges on a profiler's time line (NVTX): layers, exchanges, optimizer, data.

Without a profiler a range costs a fifth of a microsecond, and layers get no hooks at all: nvtx
knows from the start of the process whether anybody listens.
"""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager
from typing import Any

import nvtx
import torch
from torch import nn

DOMAIN = "fastalex"


@functools.cache
def nvtx_range(name: str) -> AbstractContextManager[Any]:
    """Show the ``with`` block as ``name`` on a profiler's time line.

    One object per name is enough: it keeps nothing between entering and leaving, so that it can be
    entered again while it is open.
    """
    context: AbstractContextManager[Any] = nvtx.annotate(name, domain=DOMAIN)
    return context


def listening() -> bool:
    """Whether a profiler takes the ranges; releases of nvtx that can't tell are taken to listen."""
    get_domain = getattr(nvtx, "get_domain", None)
    return get_domain is None or hasattr(get_domain(DOMAIN), "handle")


class _BackwardRanges:
    """The range of the layer whose gradients are being computed; the next one ends it.

    Hooks on tensors, because full backward hooks copy a layer's inputs and forbid changing them
    in place. Start and end may come from different threads, so these ranges are not nested ones.
    """

    def __init__(self) -> None:
        self._open: Any = None

    def start(self, name: str) -> None:
        self.end()
        self._open = nvtx.start_range(f"{name} backward", domain=DOMAIN)

    def end(self) -> None:
        if self._open is not None:
            nvtx.end_range(self._open)
            self._open = None

    def watch(self, name: str, inputs: tuple[Any, ...], output: Any) -> None:
        """Start ``name`` when the gradient of ``output`` is known, end it at that of the inputs."""
        if not (isinstance(output, torch.Tensor) and output.requires_grad):
            return
        output.register_hook(lambda _: self.start(name))  # type: ignore[no-untyped-call]
        for x in inputs:
            if isinstance(x, torch.Tensor) and x.requires_grad and x is not output:
                x.register_hook(lambda _: self.end())  # type: ignore[no-untyped-call]


def annotate_layers(model: nn.Module) -> None:
    """Show every layer of ``model`` on the time line, forward and backward, if anybody listens.

    Ranges are called by the layer's name and class, as in ``features.0 Conv2dReLU``. Call it on the
    model as it will run: layers and parameters put in later get no range.
    """
    if not listening():
        return
    ranges = _BackwardRanges()
    for path, layer in model.named_modules():
        if isinstance(layer, nn.Identity) or next(layer.children(), None) is not None:
            continue
        _annotate_layer(layer, f"{path} {type(layer).__name__}", ranges)
    parameters = list(model.parameters())
    if parameters:
        # The first layer's weights are the last to get their gradient.
        parameters[0].register_post_accumulate_grad_hook(  # type: ignore[no-untyped-call]
            lambda _: ranges.end()
        )


def _annotate_layer(layer: nn.Module, name: str, ranges: _BackwardRanges) -> None:
    context = nvtx_range(name)

    def enter(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        context.__enter__()

    def leave(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        context.__exit__(None, None, None)
        ranges.watch(name, inputs, output)

    layer.register_forward_pre_hook(enter)
    layer.register_forward_hook(leave, always_call=True)
