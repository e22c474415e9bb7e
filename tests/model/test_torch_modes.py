"""What holds under autocast, no_grad and inference_mode, and for channels-last memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import fastalex
import fastalex_kernels as fk
from fastalex_kernels.common.backend import record_launches
from tests._nets import narrow

NARROW = [torch.bfloat16, torch.float16]
ROUNDING = {torch.bfloat16: 8e-3, torch.float16: 1e-3}  # of one result, as everywhere in the tests


def _x(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _model() -> fastalex.AlexNet:
    model = fastalex.AlexNet(10, dropout=0.0, variant=narrow("paper"))
    model.init_parameters("he", torch.Generator().manual_seed(0))
    return model


PRODUCTS: dict[str, tuple[Callable[..., torch.Tensor], Callable[..., torch.Tensor], Any]] = {
    "conv2d_relu": (
        lambda x, w, b: fk.conv2d_relu(x, w, b, padding=1, relu=False),
        lambda x, w, b: F.conv2d(x, w, b, padding=1),
        (_x(2, 3, 6, 5), _x(4, 3, 3, 3, seed=1), _x(4, seed=2)),
    ),
    "linear_relu_dropout": (
        lambda x, w, b: fk.linear_relu_dropout(x, w, b, p=0.0, relu=False),
        F.linear,
        (_x(3, 7), _x(4, 7, seed=1), _x(4, seed=2)),
    ),
}
OTHERS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "lrn_max_pool2d": fk.lrn_max_pool2d,
    "max_pool2d": fk.max_pool2d,
    "dropout": lambda x: fk.dropout(x.flatten(1), rng=torch.tensor([1, 2])),
}


@pytest.mark.parametrize("given", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("narrow", NARROW)
@pytest.mark.parametrize("name", list(PRODUCTS))
def test_autocast_casts_a_product_as_it_casts_torch_s(
    name: str, narrow: torch.dtype, given: torch.dtype
) -> None:
    ours, torch_s, tensors = PRODUCTS[name]
    results = []
    for function in (ours, torch_s):
        leaves = [t.detach().clone().to(given).requires_grad_() for t in tensors]
        with torch.autocast("cpu", dtype=narrow):
            output = function(*leaves)
        output.sum().backward()
        results.append((output, *(t.grad for t in leaves)))
    dtypes = [[t.dtype for t in found] for found in results]
    assert dtypes[0] == dtypes[1]
    assert dtypes[0] == [given if given == torch.float64 else narrow] + [given] * 3
    for a, b in zip(*results, strict=True):
        assert (a - b).norm() <= ROUNDING[narrow] * b.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", list(OTHERS))
def test_autocast_leaves_what_is_no_product_alone(name: str, dtype: torch.dtype) -> None:
    x = _x(2, 8, 5, 5).to(dtype)
    expected = OTHERS[name](x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = OTHERS[name](x)
    assert found.dtype == dtype
    assert torch.equal(found, expected)


@pytest.mark.parametrize("narrow", NARROW)
def test_autocast_of_the_net(narrow: torch.dtype) -> None:
    model, images = _model(), _x(2, 3, 67, 67)
    exact = model.double()(images.double())
    model.float()
    with torch.autocast("cpu", dtype=narrow):
        logits = model(images)
    logits.float().square().sum().backward()
    assert logits.dtype == narrow
    assert {p.grad.dtype for p in model.parameters()} == {torch.float32}
    # Eight layers round their operands and results: 16 roundings, which add up as a random walk.
    assert (logits - exact).norm() <= 4 * ROUNDING[narrow] * exact.norm()


@pytest.mark.parametrize("weights", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("images", [torch.contiguous_format, torch.channels_last])
def test_channels_last_changes_no_bit(
    weights: torch.memory_format, images: torch.memory_format
) -> None:
    results = []
    for w, x in ((torch.contiguous_format, torch.contiguous_format), (weights, images)):
        model = _model().to(memory_format=w)  # type: ignore[call-overload]
        assert model.features[3].weight.is_contiguous(memory_format=w)
        inputs = _x(2, 3, 67, 67).contiguous(memory_format=x).requires_grad_()
        logits = model(inputs)
        logits.square().sum().backward()
        results.append([logits, inputs.grad, *(p.grad for p in model.parameters())])
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_the_values_are_the_same(mode: Callable[[], Any]) -> None:
    model, images = _model().eval(), _x(2, 3, 67, 67)
    expected = model(images)
    with mode():
        logits = model(images)
    assert not logits.requires_grad
    assert logits.is_inference() == (mode is torch.inference_mode)
    assert torch.equal(logits, expected)
    expected.sum().backward()  # nothing that backward needs was left by the other pass
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_a_gpu_saves_no_maxima(mode: Callable[[], Any]) -> None:
    saves: list[bool] = []

    def record(kernel: Any, grid: Any, args: Any, kwargs: Any) -> None:
        assert "bwd" not in kernel.fn.__name__
        if "SAVE" in kwargs:
            saves.append(kwargs["SAVE"])

    model, images = _model(), _x(2, 3, 67, 67)
    with record_launches("sm_90", record):
        with mode():
            model(images)
        assert saves == [False] * 3
        model(images)
    assert saves[3:] == [True] * 3
