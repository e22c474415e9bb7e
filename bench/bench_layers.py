"""Every layer of AlexNet, forward and backward, against stock torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import fastalex_kernels as kernels

from ._layers import LAYERS, Layer, check, gradient_like, laid_out, make_layers
from ._report import Report
from ._rivals import RIVALS
from ._timing import clock, take_turns

pytestmark = pytest.mark.benchmark(timer=clock)

BATCH = {"cpu": 16, "cuda": 128}
ROUNDS = {"cpu": 10, "cuda": 50}


@pytest.fixture(scope="module")
def layers(device: str, dtype: torch.dtype) -> dict[str, Layer]:
    return make_layers(BATCH[device], device, dtype)


@pytest.fixture(scope="module", params=LAYERS)
def checked(
    request: pytest.FixtureRequest, layers: dict[str, Layer], device: str
) -> tuple[Layer, dict[str, float]]:
    """A layer, and its errors by direction: nothing wrong is timed."""
    layer = layers[request.param]
    return layer, check(layer, _backend(device))


@pytest.mark.parametrize("against", RIVALS)
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_layer(
    benchmark: Any,
    report: Report,
    device: str,
    dtype: torch.dtype,
    checked: tuple[Layer, dict[str, float]],
    direction: str,
    against: str,
) -> None:
    layer, errors = checked
    with torch.no_grad():
        work = layer.work(direction, layer.stock(layer.input))
    ours = _call(layer, _backend(device), direction)
    theirs = _call(layer, against, direction)
    times = take_turns(benchmark, ours, theirs, ROUNDS[device])
    report.add(
        benchmark,
        "layers",
        times,
        work,
        layer=layer.name,
        direction=direction,
        against=against,
        batch=BATCH[device],
        dtype=str(dtype).removeprefix("torch."),
        error=errors[direction],
    )


def _backend(device: str) -> str:
    return "triton" if device == "cuda" else "aten"


def _call(layer: Layer, name: str, direction: str) -> Callable[[], object]:
    """One pass of a layer: of ours under a backend of that name, or of stock torch's."""
    if name in ("stock", "compiled"):
        x = layer.input
        module = torch.compile(layer.stock) if name == "compiled" else layer.stock
        forward = lambda: module(x)  # noqa: E731
    else:
        module, x = layer.ours, laid_out(layer.input, name)

        def forward() -> torch.Tensor:
            with kernels.backend(name):
                return module(x)

    if direction == "forward":
        return forward
    output = forward()
    dy, tensors = gradient_like(output), layer.tensors(x, module)
    return lambda: torch.autograd.grad(output, tensors, dy, retain_graph=True)
