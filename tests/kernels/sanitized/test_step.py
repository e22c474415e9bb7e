"""Training steps of the whole net in bfloat16: no race, nothing out of bounds, right results."""

from __future__ import annotations

from dataclasses import replace

import torch
from fastalex.fused_update import fuse_updates, lay_out

import fastalex
import fastalex_kernels as kernels
from fastalex.data import Normalization
from fastalex.data.augment import Augment
from fastalex.layers import SpaceToDepth
from fastalex.optim import build_optimizer
from tests._nets import narrow

# Rounding moves a maximum or a sign here and there, a wrong kernel all of its gradient.
GRADIENT_BOUND = 0.25
NORMAL = Normalization((127.0,) * 3, (74.0,) * 3)
LOGITS_BOUND = 4 * 8e-3  # 16 roundings to bfloat16 that add up as a random walk


def _model() -> fastalex.AlexNet:
    variant = narrow("paper")
    # Two norms of one size: their kernel takes long to compile, and is compiled once.
    convolutions = [replace(c, channels=32) if c.norm else c for c in variant.convolutions]
    model = fastalex.AlexNet(10, variant=replace(variant, convolutions=tuple(convolutions)))
    model.init_parameters("he", torch.Generator().manual_seed(0))
    return model


def _batch() -> tuple[list[torch.Tensor], torch.Tensor]:
    """Bytes with their crops and colours, and labels."""
    generator = torch.Generator().manual_seed(1)
    images, places, mirrors = (
        torch.randint(high, shape, generator=generator)
        for high, shape in ((256, (4, 76, 76, 3)), (10, (2, 4)), (2, (4,)))
    )
    colors = 20 * torch.randn(4, 3, generator=generator)
    return [images.byte(), *places.int(), mirrors.bool(), colors], torch.arange(4)


def _step(model: fastalex.AlexNet, device: str, dtype: torch.dtype) -> torch.Tensor:
    """The logits; the gradients are left in the model, or applied by it."""
    model.to(device)
    model.seed_dropout(3, 1)
    pixels, labels = _batch()
    augment = Augment(NORMAL, 67, torch.device(device), colored=True)
    exact = dtype == torch.float32  # by torch's operators: ttsem runs our kernels on any device
    with kernels.backend("aten" if exact else "triton"):
        with torch.autocast(device, dtype=dtype, enabled=not exact):
            images = augment.for_layer(model.features[0], *(x.to(device) for x in pixels))
            assert isinstance(images, torch.Tensor if exact else SpaceToDepth)
            logits = model(images)
        g = torch.ones((), device=device)
        kernels.cross_entropy(logits, labels.to(device), g).backward(g)
    return logits.detach().float().cpu()


def _error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.float().cpu() - expected).norm() / expected.norm())


def test_forward_and_backward() -> None:
    exact = _model()
    expected = _step(exact, "cpu", torch.float32)
    model = _model()
    assert _error(_step(model, "cuda", torch.bfloat16), expected) <= LOGITS_BOUND
    wanted = dict(exact.named_parameters())
    errors = {n: _error(p.grad, wanted[n].grad) for n, p in model.named_parameters()}
    assert max(errors.values()) <= GRADIENT_BOUND, errors


def test_updates_in_backward() -> None:
    exact = _model()
    before = [p.detach().clone() for p in exact.parameters()]
    optimizer = build_optimizer(exact, lr=0.01)
    _step(exact, "cpu", torch.float32)
    optimizer.step()
    model = _model().cuda()
    lay_out(model)
    optimizer = build_optimizer(model, lr=0.01)
    fused = fuse_updates(model, optimizer, torch.bfloat16)
    assert len(fused) == len(before)
    _step(model, "cuda", torch.bfloat16)
    assert all(p.grad is None for p in model.parameters())
    triples = zip(model.parameters(), exact.parameters(), before, strict=True)
    changes = [(p.detach().cpu() - w, q.detach() - w) for p, q, w in triples]
    assert max(_error(*change) for change in changes) <= GRADIENT_BOUND
