"""Gradients applied where they are made: torch's operators, and what is refused."""

from __future__ import annotations

import pytest
import torch

from fastalex_kernels.momentum import MomentumUpdate

from . import _updates as updates


@pytest.mark.parametrize("rule", updates.RULES)
@pytest.mark.parametrize("shape", [(6, 4), (6, 4, 3, 3)])
def test_update_by_torch(rule: str, shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    w, v, g = (torch.randn(shape, generator=generator) for _ in range(3))
    wanted = updates.by_hand(rule, w.double(), v.double(), g.double())
    rate = torch.tensor([updates.LR, updates.MOMENTUM, updates.DECAY])
    copy = torch.zeros(shape, dtype=torch.bfloat16)
    update = MomentumUpdate(w, v, rate, rule, copy)
    update.apply(g)
    for found, value in zip((w, v), wanted, strict=True):
        assert updates.relative_error(found, value) <= 1e-6
    assert torch.equal(copy, w.bfloat16())
    assert update.squares is not None
    assert float(update.squares) == pytest.approx(float(g.double().square().sum()), rel=1e-6)


@pytest.mark.parametrize("momentum", [0.0, updates.MOMENTUM])
@pytest.mark.parametrize("rule", updates.RULES)
def test_update_by_the_factors_of_a_gradient(rule: str, momentum: float) -> None:
    generator = torch.Generator().manual_seed(0)
    (w, v), dz, x = (
        torch.randn(size, generator=generator) for size in ((2, 300, 7), (5, 300), (5, 7))
    )
    rate = torch.tensor([updates.LR, momentum, updates.DECAY])
    whole, parts = (MomentumUpdate(w.clone(), v.clone(), rate, rule) for _ in range(2))
    for _ in range(2):
        whole.apply(dz.t() @ x)
        parts.apply_product(dz, x)
    assert updates.relative_error(parts.parameter, whole.parameter) <= 1e-6
    assert updates.relative_error(parts.buffer, whole.buffer) <= 1e-6
    assert whole.squares is not None
    assert parts.squares is not None
    assert float(parts.squares.sum()) == pytest.approx(float(whole.squares), rel=1e-6)


def test_a_parameter_that_a_kernel_would_misread_is_refused() -> None:
    rate = torch.zeros(3)
    for parameter in (torch.zeros(3, 4).t(), torch.zeros(8)[::2]):
        buffer = torch.empty_strided(parameter.shape, parameter.stride())
        with pytest.raises(ValueError, match=r"^parameter: expected contiguous memory, got shape"):
            MomentumUpdate(parameter, buffer, rate)
    with pytest.raises(ValueError, match=r"^parameter: expected float32, got torch.float16"):
        MomentumUpdate(torch.zeros(4).half(), torch.zeros(4), rate)
    kernel = torch.zeros(4, 3, 2, 2).to(memory_format=torch.channels_last)
    MomentumUpdate(kernel, torch.zeros_like(kernel), rate)
