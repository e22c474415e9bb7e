"""Nets trained from bytes by interpreted kernels: one before the first layer, or images between.

The first convolution reads the same values either way, so everything after it has the same bits.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from fastalex import AlexNet, train
from fastalex.checkpoint import load_weights
from fastalex.data import MeanImage, Normalization, sources
from fastalex.data.augment import Augment
from fastalex.fused_update import fuse_updates, lay_out
from fastalex.layers import Conv2dReLU, SpaceToDepth
from fastalex.optim import build_optimizer
from fastalex.variants import VARIANTS, Variant
from tests._nets import narrow

from ._strict import Strict

CPU = torch.device("cpu")
SIDE = 76


def _pixels(images: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    draw = lambda high, *shape: torch.randint(high, shape, generator=generator)  # noqa: E731
    given = [draw(256, images, SIDE, SIDE, 3).byte(), draw(9, images), draw(9, images)]
    mirrors = torch.tensor([True, False, True])[:images]
    return [*given, mirrors, 20 * torch.randn(images, 3, generator=generator)]


def _normalization(mean: str) -> Normalization:
    generator = torch.Generator().manual_seed(2)
    pixels = 255 * torch.rand(SIDE, SIDE, 3, generator=generator)
    image = None
    if mean != "channels":
        image = MeanImage.of(pixels.numpy(), SIDE, centred=mean == "centre")
    return Normalization((120.0, 115.0, 100.0), (60.0, 61.0, 62.0), image)


def _bare(name: str) -> Variant:
    """A narrow net without response normalisation, which takes the interpreter longest."""
    net = narrow(name)
    return replace(net, convolutions=tuple(replace(c, norm=None) for c in net.convolutions))


def _trained(
    variant: str, size: int, mean: str, dtype: torch.dtype, fused: bool, blocks: bool
) -> list[torch.Tensor]:
    """The loss of a step and the weights after it."""
    net = AlexNet(10, variant=_bare(variant))
    net.init_parameters("he", torch.Generator().manual_seed(0))
    if fused:
        lay_out(net)
    optimizer = build_optimizer(net, 0.01)
    if fused:
        fuse_updates(net, optimizer, dtype)
    augment = Augment(_normalization(mean), size, CPU, colored=True)
    net.seed_dropout(0, 1)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        given = augment.for_layer(net.features[0], *_pixels(3))
        assert isinstance(given, SpaceToDepth)
        logits = net(given if blocks else augment(*_pixels(3)))
    loss = F.cross_entropy(logits.float(), torch.arange(3))
    loss.backward()
    optimizer.step()
    return [loss.detach(), *(p.detach() for p in net.parameters())]


@pytest.mark.parametrize(
    ("variant", "size", "mean", "dtype", "fused"),
    [
        ("paper", 64, "centre", torch.bfloat16, True),
        ("paper", 67, "image", torch.float32, False),
        ("owt", 66, "channels", torch.bfloat16, False),
        ("caffe", 65, "centre", torch.float32, True),
    ],
)
def test_both_ways_train_alike(
    variant: str, size: int, mean: str, dtype: torch.dtype, fused: bool
) -> None:
    arguments = (variant, size, mean, dtype, fused)
    ways = zip(_trained(*arguments, True), _trained(*arguments, False), strict=True)
    assert all(torch.equal(a, b) for a, b in ways)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(VARIANTS, "paper", _bare("paper"))
    monkeypatch.setattr(sources, "TRAIN_COUNT", 4)
    monkeypatch.setattr(sources, "VAL_COUNT", 2)


def _run(folder: Path) -> tuple[dict[str, torch.Tensor], list[object]]:
    options = ["--variant", "paper", "--image-size", "64", "--batch-size", "2", "--epochs", "1"]
    options += ["--augmentation", "full", "--precision", "bf16", "--fused-update"]
    assert train.main([*options, "--output", str(folder)]) == 0
    records = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return load_weights(folder / "model.safetensors")[0], [
        (r["loss"], r.get("val_loss"), r.get("top1")) for r in records
    ]


def test_a_run_is_the_same_both_ways(
    tmp_path: Path, small: None, strict: Strict, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training and validation of the command, which take blocks by themselves."""
    weights, records = _run(tmp_path / "blocks")
    assert strict.launches[0] == "_augment_kernel"
    monkeypatch.setattr(Conv2dReLU, "block_padding", lambda *_: None)
    expected, known = _run(tmp_path / "images")
    assert records == known
    assert all(torch.equal(weight, expected[name]) for name, weight in weights.items())


def test_bytes_to_logits_are_one_compiled_graph() -> None:
    net = AlexNet(10, variant=_bare("owt")).eval()
    augment = Augment(_normalization("centre"), 66, CPU, colored=True)

    def logits(*pixels: torch.Tensor) -> torch.Tensor:
        return net(augment.for_layer(net.features[0], *pixels))

    torch._dynamo.reset()
    compiled = torch.compile(logits, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(*_pixels(2)), logits(*_pixels(2)))
