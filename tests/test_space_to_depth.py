"""A net that is fed the blocks of images, beside one that is fed the images."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import fastalex_kernels as kernels
from fastalex import AlexNet, nvtx_ranges, parallel
from fastalex.data import Normalization
from fastalex.data.augment import Augment
from fastalex.fused_update import fuse_updates, lay_out
from fastalex.layers import BLOCK, Conv2dReLU, SpaceToDepth
from fastalex.optim import build_optimizer
from fastalex.variants import VARIANTS
from fastalex_kernels._launch import record_launches
from fastalex_kernels.reference import relative_error, tolerance

from ._nets import narrow

CPU = torch.device("cpu")
NORMAL = Normalization((120.0, 115.0, 100.0), (60.0, 61.0, 62.0))


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def _net(variant: str) -> AlexNet:
    net = AlexNet(10, variant=narrow(variant))
    net.init_parameters("he", torch.Generator().manual_seed(0))
    return net


def _pixels(images: int, side: int, device: str = "cpu") -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    draw = lambda high, *shape: torch.randint(high, shape, generator=generator)  # noqa: E731
    given = [draw(256, images, side, side, 3).byte(), draw(9, images).int(), draw(9, images).int()]
    given += [draw(2, images).bool(), 20 * torch.randn(images, 3, generator=generator)]
    return [x.to(device) for x in given]


def _blocks(layer: Conv2dReLU, size: int, pixels: list[torch.Tensor]) -> SpaceToDepth:
    """The blocks of ``Augment(NORMAL, size)`` on torch's own operators."""
    padding = layer.block_padding(size)
    assert padding is not None
    images, tops, lefts, mirrors, colors = pixels
    mean, std = (torch.tensor(x) for x in (NORMAL.mean, NORMAL.std))
    made = kernels.augment(
        images, tops, lefts, mirrors, colors, mean, 1 / (std * 1.1), size, padding, BLOCK,
        layer.kernel_size[0], torch.float32,
    )  # fmt: skip
    return SpaceToDepth(made, torch.Size((len(images), 3, size, size)), 11, padding)


def _step(net: AlexNet, images: torch.Tensor | SpaceToDepth) -> list[torch.Tensor]:
    """Logits and gradients."""
    net.zero_grad()
    net.seed_dropout(3, 1)
    logits = net(images)
    F.cross_entropy(logits.float(), torch.arange(len(logits), device=logits.device)).backward()
    return [logits.detach(), *(p.grad for p in net.parameters() if p.grad is not None)]


# All that 4 can leave: with "paper" the padding completes the last window.
@pytest.mark.parametrize("size", [64, 65, 66, 67])
@pytest.mark.parametrize("variant", list(VARIANTS))
def test_a_net_of_blocks_is_the_net_of_images(variant: str, size: int) -> None:
    net, pixels = _net(variant), _pixels(3, size + 8)
    images = Augment(NORMAL, size, CPU, colored=True)(*pixels)
    blocks = _blocks(net.features[0], size, pixels)
    assert blocks.shape == images.shape
    expected = _step(net, images)
    found = _step(net, blocks)
    assert len(found) == 17
    for a, b in zip(found, expected, strict=True):
        # Another order of the first layer's sums, through eight layers of at most 9216 products.
        assert relative_error(a, b) <= 8 * tolerance(torch.float32, 9216)


def test_updates_in_backward_take_blocks() -> None:
    pixels = _pixels(3, 75)
    images = Augment(NORMAL, 67, CPU, colored=True)(*pixels)
    weights = []
    for blocks in (False, True):
        net = _net("paper")
        lay_out(net)
        fuse_updates(net, build_optimizer(net, 0.01))
        given = _blocks(net.features[0], 67, pixels) if blocks else images
        before = net.features[0].weight.detach().clone()
        assert len(_step(net, given)) == 1, "a gradient was handed out"
        assert not torch.equal(net.features[0].weight, before)
        weights.append([p.detach() for p in net.parameters()])
    for a, b in zip(*weights, strict=True):
        assert relative_error(a, b) <= 8 * tolerance(torch.float32, 9216)


@pytest.mark.parametrize(
    ("layer", "size", "padding"),
    [
        (Conv2dReLU(3, 96, 11, 4), 227, ((0, 0), (0, 0))),
        (Conv2dReLU(3, 96, 11, 4, ceil_mode=True), 224, ((0, 3), (0, 3))),
        (Conv2dReLU(3, 64, 11, 4, 2), 224, ((2, 2), (2, 2))),
        (Conv2dReLU(3, 64, 7, 4), 7, ((0, 0), (0, 0))),
        (Conv2dReLU(3, 96, 11, 4), 10, None),  # no window fits
        (Conv2dReLU(3, 96, 11, 2), 227, None),
        (Conv2dReLU(3, 96, 11), 227, None),
        (Conv2dReLU(6, 96, 11, 4), 227, None),
        (Conv2dReLU(3, 96, 11, 4, groups=3), 227, None),
    ],
    ids=str,
)
def test_which_layers_are_given_blocks(layer: Conv2dReLU, size: int, padding: object) -> None:
    assert layer.block_padding(size) == padding
    with FakeTensorMode(allow_non_fake_inputs=True), record_launches("sm_90", lambda *_: None):
        pixels = _pixels(2, size + 8)
        given = Augment(NORMAL, size, CPU).for_layer(layer, *pixels)
        assert isinstance(given, SpaceToDepth) == (padding is not None)
        assert given.shape == (2, 3, size, size)
        if padding is not None:
            assert layer(given).shape[2:] == (layer.output_size(size),) * 2


def test_torchs_operators_and_other_layers_are_given_images() -> None:
    augment, pixels = Augment(NORMAL, 64, CPU, colored=True), _pixels(2, 72)
    images = augment(*pixels)
    for layer in (nn.Identity(), nn.Conv2d(3, 8, 11, 4), Conv2dReLU(3, 8, 11, 4)):
        given = augment.for_layer(layer, *pixels)
        assert isinstance(given, torch.Tensor)
        assert torch.equal(given, images)


def test_blocks_for_another_layer_are_refused() -> None:
    blocks = _blocks(Conv2dReLU(3, 8, 11, 4), 64, _pixels(2, 72))
    for layer in (
        Conv2dReLU(3, 8, 11, 4, 2),
        Conv2dReLU(3, 8, 11, 4, ceil_mode=True),
        Conv2dReLU(3, 8, 10, 4),
        Conv2dReLU(3, 8, 11, 2),
    ):
        with pytest.raises(ValueError, match=r"^input: blocks made for .*; give it the images$"):
            layer(blocks)


def test_a_net_says_that_images_are_too_small_of_blocks_too() -> None:
    net, pixels = _net("caffe"), _pixels(2, 40)
    blocks = _blocks(net.features[0], 32, pixels)
    with pytest.raises(ValueError, match=re.escape("images: 32 x 32 pixels are too few")):
        net(blocks)


def test_a_compiled_net_takes_blocks() -> None:
    net = _net("paper")
    blocks = _blocks(net.features[0], 67, _pixels(2, 75))
    expected = _step(net, blocks)
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    net.zero_grad()
    net.seed_dropout(3, 1)
    logits = compiled(blocks)
    F.cross_entropy(logits, torch.arange(2)).backward()
    assert torch.equal(logits.detach(), expected[0])
    for parameter, gradient in zip(net.parameters(), expected[1:], strict=True):
        assert torch.equal(parameter.grad, gradient)


def test_hooks_see_it_where_images_would_be(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of the profiler's ranges, and any that looks at shapes."""
    net, seen = _net("owt"), []
    monkeypatch.setattr(nvtx_ranges, "listening", lambda: True)
    nvtx_ranges.annotate_layers(net)
    net.features[0].register_forward_hook(
        lambda _, inputs, y: seen.append((inputs[0].shape, inputs[0].requires_grad, y.shape[1:]))
    )
    _step(net, _blocks(net.features[0], 64, _pixels(2, 72)))
    assert seen == [((2, 3, 64, 64), False, (16, 15, 15))]


@dataclass
class _Echo:
    sent: torch.Tensor

    def wait(self) -> torch.Tensor:
        return self.sent


class _Alone:
    """In place of the other tower: it sends back what it is sent."""

    rank = 1

    def start(self, x: torch.Tensor) -> _Echo:
        return _Echo(x)


def test_a_tower_takes_blocks() -> None:
    net, pixels = _net("paper"), _pixels(3, 75)
    parallel.cut_to_tower(net, _Alone())
    expected = _step(net, Augment(NORMAL, 67, CPU, colored=True)(*pixels))
    for a, b in zip(_step(net, _blocks(net.features[0], 67, pixels)), expected, strict=True):
        assert relative_error(a, b) <= 8 * tolerance(torch.float32, 9216)


@pytest.mark.gpu
@pytest.mark.parametrize("variant", list(VARIANTS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_first_layer_on_a_gpu(variant: str, dtype: torch.dtype) -> None:
    """From bytes, against float64: output and weight gradient of both ways."""
    size = VARIANTS[variant].image_size
    layer = AlexNet(variant=variant).features[0].cuda()
    pixels = _pixels(5, size + 32, "cuda")
    augment = Augment(NORMAL, size, torch.device("cuda"), colored=True)
    with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
        given = augment.for_layer(layer, *pixels)
        assert isinstance(given, SpaceToDepth)
        images = augment(*pixels)
        outputs = [layer(given), layer(images)]
    padding = layer.block_padding(size)
    assert padding is not None
    weight = layer.weight.detach().to(dtype).double().requires_grad_()
    bias = layer.bias.detach().to(dtype).double()
    expected = kernels.reference.conv2d_relu(images.double(), weight, bias, 4, padding)
    gradient = torch.randn_like(outputs[0])
    for output in outputs:  # within rounding of zero either gradient is right
        gradient *= (output > 0) == (expected > 0)
    (wanted,) = torch.autograd.grad(expected, weight, gradient.double())
    for output in outputs:
        assert relative_error(output, expected) <= tolerance(dtype, 363)
        (found,) = torch.autograd.grad(output, layer.weight, gradient)
        assert relative_error(found, wanted) <= tolerance(dtype, output.numel() // len(found))
