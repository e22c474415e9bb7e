"""The layers alone, in float64 against loops written from the printed formulas."""

from __future__ import annotations

import itertools
from collections import Counter
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastalex.model.alexnet import AlexNet
from fastalex.model.layers import (
    AdaptiveAvgPool2d,
    Conv2dReLU,
    Dropout,
    Linear,
    LinearReLUDropout,
    LRNMaxPool2d,
    MaxPool2d,
    SpatialResponseNorm,
    average,
)

# float64: a few dozen operations an element, so a thousand roundings of 1e-16 leave a wide margin.
EXACT = {"rtol": 1e-12, "atol": 1e-13}


def _draw(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=torch.float64, generator=generator)


def _printed_norm(
    a: torch.Tensor, k: float, alpha: float, beta: float, n: int, towers: int
) -> torch.Tensor:
    """The paper's b = a / (k + alpha * sum of a^2 over n adjacent maps)^beta, map by map."""
    b = torch.empty_like(a)
    maps = a.shape[1] // towers  # a tower has maps of its own
    for i in range(a.shape[1]):
        first = i // maps * maps
        low, high = max(first, i - n // 2), min(first + maps - 1, i + n // 2)
        squares = sum(a[:, j] ** 2 for j in range(low, high + 1))
        b[:, i] = a[:, i] / (k + alpha * squares) ** beta
    return b


def _without_pooling(layer: nn.Module) -> nn.Module:
    """A normalisation layer of a net, its pooling and ReLU taken off."""
    assert isinstance(layer, LRNMaxPool2d)
    return LRNMaxPool2d(
        layer.size, layer.alpha, layer.beta, layer.k, layer.groups, kernel_size=1, stride=1
    )


def _norm_of(variant: str) -> nn.Module:
    with torch.device("meta"):
        model = AlexNet(variant=variant)
    return _without_pooling(model.features[2])


def test_the_paper_normalises_by_the_formula_as_printed() -> None:
    a = 20 * _draw(2, 96, 3, 3)  # large, so that alpha matters
    torch.testing.assert_close(
        _norm_of("paper")(a), _printed_norm(a, 2.0, 1e-4, 0.75, 5, towers=2), **EXACT
    )


@pytest.mark.parametrize(("variant", "k", "towers"), [("source2012", 2.0, 2), ("caffe", 1.0, 1)])
def test_the_programs_divide_alpha_by_the_window(variant: str, k: float, towers: int) -> None:
    a = 20 * _draw(2, 96, 3, 3)
    printed = _printed_norm(a, k, 1e-4 / 5, 0.75, 5, towers)
    torch.testing.assert_close(_norm_of(variant)(a), printed, **EXACT)


@pytest.mark.parametrize(("variant", "crosses"), [("paper", False), ("caffe", True)])
def test_only_caffe_normalises_across_the_border_of_the_groups(variant: str, crosses: bool) -> None:
    a = 20 * _draw(1, 96, 2, 2)
    louder = a.clone()
    louder[:, 48] *= 10  # the second group's first map
    before, after = _norm_of(variant)(a), _norm_of(variant)(louder)
    changed = [i for i in range(48) if not torch.equal(before[:, i], after[:, i])]
    assert changed == ([46, 47] if crosses else [])


def test_the_norm_is_pooled_and_rectified_in_the_order_of_net_145() -> None:
    a = 20 * _draw(2, 8, 9, 9) - 20  # some windows hold no positive value
    layer = LRNMaxPool2d(5, 1e-4, 0.75, 2.0, groups=2, ceil_mode=True, relu=True)
    printed = _printed_norm(a, 2.0, 1e-4 / 5, 0.75, 5, towers=2)
    expected = F.relu(F.max_pool2d(printed, 3, 2, ceil_mode=True))
    assert (expected == 0).any()  # else the ReLU would not show
    torch.testing.assert_close(layer(a), expected, **EXACT)


def test_the_spatial_norm_sums_squares_over_a_window_of_its_own_map() -> None:
    x = 30 * _draw(2, 3, 6, 8)
    size, alpha, beta, k = 5, 1e-3, 0.75, 1.0
    expected = torch.empty_like(x)
    for i, j in itertools.product(range(6), range(8)):
        window = x[:, :, max(0, i - 2) : i + 3, max(0, j - 2) : j + 3]
        squares = window.square().sum((2, 3))
        expected[:, :, i, j] = x[:, :, i, j] / (k + alpha / size**2 * squares) ** beta
    layer = SpatialResponseNorm(size, alpha, beta, k)
    torch.testing.assert_close(layer(x), expected, **EXACT)
    assert layer(x.bfloat16()).dtype == torch.bfloat16


def test_the_spatial_norm_s_gradient_is_that_of_its_formula() -> None:
    x = 30 * _draw(1, 2, 4, 5).requires_grad_()
    assert torch.autograd.gradcheck(SpatialResponseNorm(), (x,))


@pytest.mark.parametrize("size", range(11, 25))
def test_ceil_equals_zeros_at_the_bottom_and_right(size: int) -> None:
    layer = Conv2dReLU(3, 4, 11, stride=4, ceil_mode=True).double()
    x = _draw(1, 3, size, size + 1)
    missing = [-(s - 11) % 4 for s in x.shape[2:]]
    padded = torch.zeros(1, 3, *(s + m for s, m in zip(x.shape[2:], missing, strict=True)))
    padded = padded.double()
    padded[:, :, :size, : size + 1] = x
    expected = F.relu(F.conv2d(padded, layer.weight, layer.bias, stride=4))
    outputs = tuple(1 + -(-(s - 11) // 4) for s in x.shape[2:])  # 1 + ceil((size - 11) / 4)
    assert expected.shape[2:] == outputs
    assert tuple(map(layer.output_size, x.shape[2:])) == outputs
    torch.testing.assert_close(layer(x), expected, **EXACT)


def test_224_pixels_take_three_zeros() -> None:
    layer = Conv2dReLU(3, 1, 11, stride=4, ceil_mode=True).double()
    x = _draw(1, 3, 224, 224)
    expected = F.conv2d(F.pad(x, (0, 3, 0, 3)), layer.weight, layer.bias, stride=4).relu()
    assert expected.shape == (1, 1, 55, 55)
    torch.testing.assert_close(layer(x), expected, **EXACT)


def test_floor_drops_the_pixels_that_fill_no_window() -> None:
    layer = Conv2dReLU(3, 4, 11, stride=4).double()
    x = _draw(1, 3, 18, 18)
    torch.testing.assert_close(layer(x), layer(x[:, :, :15, :15]), **EXACT)
    assert layer.output_size(18) == 2


def test_a_convolution_without_relu_lets_negatives_through() -> None:
    layer = Conv2dReLU(2, 4, 3, padding=1, groups=2, relu=False).double()
    x = _draw(2, 2, 5, 5)
    expected = F.conv2d(x, layer.weight, layer.bias, padding=1, groups=2)
    assert (expected < 0).any()
    torch.testing.assert_close(layer(x), expected, **EXACT)


@pytest.mark.parametrize("ceil_mode", [False, True])
@pytest.mark.parametrize("size", range(3, 9))
def test_pooling_is_torch_s_of_the_size_it_announces(size: int, ceil_mode: bool) -> None:
    layer = MaxPool2d(ceil_mode=ceil_mode)
    x = _draw(1, 2, size, size)
    expected = nn.MaxPool2d(3, 2, ceil_mode=ceil_mode)(x)
    assert torch.equal(layer(x), expected)
    assert layer.output_size(size) == expected.shape[2]


def test_the_last_layer_has_neither_relu_nor_dropout() -> None:
    layer = Linear(7, 5).double()
    x = _draw(3, 7)
    expected = x @ layer.weight.T + layer.bias
    assert (expected < 0).any()
    torch.testing.assert_close(layer(x), expected, **EXACT)


def test_fused_dropout_keeps_and_scales_the_rectified_units() -> None:
    layer = LinearReLUDropout(7, 400, p=0.25).double()
    layer.set_mask(rng=torch.tensor([3, 4]))
    x = _draw(5, 7)
    rectified = (x @ layer.weight.T + layer.bias).clamp(min=0)
    dropped = (layer(x) == 0) & (rectified > 0)
    # 1,000 or more positive units: six deviations around a quarter of them.
    positive = int((rectified > 0).sum())
    assert abs(int(dropped.sum()) - positive / 4) < 6 * (positive * 3 / 16) ** 0.5
    expected = torch.where(dropped, 0.0, rectified / 0.75)
    torch.testing.assert_close(layer(x), expected, **EXACT)
    torch.testing.assert_close(layer.eval()(x), rectified, **EXACT)


def test_dropout_of_a_part_is_a_part_of_the_dropout() -> None:
    ones = torch.ones(6, 32)
    layer = Dropout(0.5)
    layer.set_mask(rng=torch.tensor([1, 2]))
    whole = layer(ones)
    layer.set_mask(row_offset=4, feature_offset=16)
    assert torch.equal(layer(ones[4:, 16:]), whole[4:, 16:])
    assert not torch.equal(whole[:2, :16], whole[4:, 16:])


def test_averaging_to_the_size_that_is_there_copies_nothing() -> None:
    layer = AdaptiveAvgPool2d((6, 6))
    x = _draw(1, 2, 6, 6)
    assert layer(x) is x
    larger = _draw(1, 2, 12, 12)
    torch.testing.assert_close(layer(larger), F.avg_pool2d(larger, 2), **EXACT)


def test_fused_layers_are_the_torch_layers_whose_parameters_they_hold() -> None:
    for fused, stock in (
        (Conv2dReLU(4, 6, 3, groups=2), nn.Conv2d(4, 6, 3, groups=2)),
        (LinearReLUDropout(4, 6), nn.Linear(4, 6)),
        (Linear(4, 6), nn.Linear(4, 6)),
    ):
        assert isinstance(fused, type(stock))
        fused.load_state_dict(stock.state_dict(), strict=True)


def test_a_printed_net_says_what_its_layers_do() -> None:
    with torch.device("meta"):
        text = repr(AlexNet(variant="source2012"))
    assert "Conv2dReLU(3, 96, kernel_size=(11, 11), stride=(4, 4), ceil_mode=True, relu=False)" in (
        text
    )
    assert "size=5, alpha=0.0001, beta=0.75, k=2.0, groups=2, relu=True, kernel_size=3" in text
    assert "SpatialResponseNorm(size=5, alpha=0.001, beta=0.75, k=1.0)" in text
    assert "in_features=9216, out_features=4096, bias=True, relu=True, p=0.5" in text


class _Operators(TorchDispatchMode):
    """Counts the operators that run inside it."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        self.counts[function._overloadpacket.__name__] += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(("groups", "copies"), [(1, False), (2, True)])
def test_one_group_copies_no_gradient(groups: int, copies: bool) -> None:
    layer = LinearReLUDropout(8, 4, p=0.0, groups=groups)
    output = layer(torch.ones(3, 8, requires_grad=True))
    with _Operators() as operators:
        output.sum().backward()
    assert (operators.counts["cat"] > 0) == copies


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (5, 6), (7, 13), (12, 6)])
def test_the_average_as_products_is_torch_s(size: tuple[int, int]) -> None:
    x = torch.randn(2, 3, *size, requires_grad=True)
    y, expected = average(x, (6, 6)), torch.nn.functional.adaptive_avg_pool2d(x, (6, 6))
    torch.testing.assert_close(y, expected)
    gradient = torch.randn_like(expected)
    ours, theirs = (torch.autograd.grad(o, x, gradient)[0] for o in (y, expected))
    torch.testing.assert_close(ours, theirs)
