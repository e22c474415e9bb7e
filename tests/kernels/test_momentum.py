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
    copy, squares = torch.zeros(shape, dtype=torch.bfloat16), torch.zeros(1)
    MomentumUpdate(w, v, rate, rule, copy).apply(g, squares)
    for found, value in zip((w, v), wanted, strict=True):
        assert updates.relative_error(found, value) <= 1e-6
    assert torch.equal(copy, w.bfloat16())
    assert float(squares) == pytest.approx(float(g.double().square().sum()), rel=1e-6)


def test_arguments_are_checked() -> None:
    w, v, rate = torch.zeros(4, 3), torch.zeros(4, 3), torch.zeros(3)
    with pytest.raises(ValueError, match=r"^rule: expected one of paper, torch, got 'adam'$"):
        MomentumUpdate(w, v, rate, "adam")
    with pytest.raises(ValueError, match=r"^buffer: expected shape \(4, 3\) and strides"):
        MomentumUpdate(w, torch.zeros(3, 4).t(), rate)
    with pytest.raises(ValueError, match=r"^buffer: expected float32"):
        MomentumUpdate(w, v.half(), rate)
    with pytest.raises(ValueError, match=r"^rate: expected float32 \[3\]"):
        MomentumUpdate(w, v, torch.zeros(2))


def test_memory_that_a_kernel_would_misread_is_refused() -> None:
    w, b, rate = torch.zeros(3, 4).t(), torch.zeros(8)[::2], torch.zeros(3)
    for parameter in (w, b):
        with pytest.raises(ValueError, match=r"^parameter: expected contiguous memory, got shape"):
            MomentumUpdate(
                parameter, torch.empty_strided(parameter.shape, parameter.stride()), rate
            )
    kernel = torch.zeros(4, 3, 2, 2).to(memory_format=torch.channels_last)
    MomentumUpdate(kernel, torch.zeros_like(kernel), rate)
    b = torch.zeros(4)
    with pytest.raises(ValueError, match=r"^rate: expected contiguous memory"):
        MomentumUpdate(b, b.clone(), torch.zeros(6)[::2])
    with pytest.raises(ValueError, match=r"^operand: expected contiguous memory"):
        MomentumUpdate(b, b.clone(), rate, operand=torch.zeros(8).half()[::2])
    for name in ("buffer", "rate", "operand"):
        arguments = {"buffer": b.clone(), "rate": rate, "operand": b.half()}
        arguments[name] = arguments[name].to("meta")
        with pytest.raises(ValueError, match=rf"^{name}: expected device cpu, got meta$"):
            MomentumUpdate(b, **arguments)
