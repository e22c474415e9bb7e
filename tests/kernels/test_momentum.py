"""Gradients applied where they are made: torch's operators, and what is refused."""

from __future__ import annotations

import pytest
import torch

from fastalex_kernels.momentum import MomentumUpdate, round_stochastically

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


@pytest.mark.parametrize("rule", updates.RULES)
def test_a_narrow_buffer_is_the_wide_one_rounded(rule: str) -> None:
    """Of the factors of a gradient and of a gradient in another memory order, the same bits."""
    generator = torch.Generator().manual_seed(0)
    w, dz, x = (torch.randn(n, generator=generator) for n in ((300, 20), (1, 300), (1, 20)))
    v, rng = torch.randn(300, 20, generator=generator).bfloat16(), torch.tensor([1, 2, 3, 300, 20])
    rate = torch.tensor([updates.LR, updates.MOMENTUM, updates.DECAY])
    g = dz.t() @ x
    wanted_w, wide = updates.by_hand(rule, w.double(), v.double(), g.double())
    wanted_v = torch.empty_like(v)
    round_stochastically(wide.float(), rng, wanted_v)
    for apply in ("factors", "gradient"):
        update = MomentumUpdate(w.clone(), v.clone(), rate, rule, rng=rng)
        if apply == "factors":
            update.apply_product(dz, x)
        else:
            update.apply(g.t().contiguous().t())
        assert updates.relative_error(update.parameter, wanted_w) <= 1e-6
        assert float((update.buffer != wanted_v).double().mean()) < 1e-3  # float64's own rounding


def test_what_bfloat16_holds_stays_and_nan_stays_nan() -> None:
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.bfloat16).view(256, 256)
    out = torch.empty_like(every)
    round_stochastically(every.float(), torch.tensor([1, 2, 3, 0, 0]), out)
    assert torch.equal(out.isnan(), every.isnan())
    finite = ~every.isnan()
    assert torch.equal(out.view(torch.int16)[finite], every.view(torch.int16)[finite])
    patterns = torch.tensor([0x7F800001, 0x7FFFFFFF, -1, -0x7FFFFF], dtype=torch.int32)  # of NaN
    rows = patterns.view(torch.float32).expand(64, 4).contiguous()
    out = torch.zeros(64, 4, dtype=torch.bfloat16)
    round_stochastically(rows, torch.tensor([1, 2, 3, 0, 0]), out)
    assert bool(out.isnan().all())


def test_the_mean_of_many_roundings_is_the_value() -> None:
    """Each is one of two neighbours, and the mean within its own standard error."""
    draws = 4096
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(64, generator=generator) * 10.0 ** torch.linspace(-30, 30, 64)
    out = torch.empty(draws, 64, dtype=torch.bfloat16)
    round_stochastically(values.expand(draws, 64).contiguous(), torch.tensor([1, 2, 3, 0, 0]), out)
    x = values.double()
    below = (values.view(torch.int32) & -(2**16)).view(torch.float32).double()  # towards zero
    above = ((values.view(torch.int32) & -(2**16)) + 2**16).view(torch.float32).double()
    assert bool(((out.double() == below) | (out.double() == above)).all())
    share = (x - below) / (above - below)
    error = (above - below).abs() * (share * (1 - share) / draws).sqrt()
    assert bool(((out.double().mean(0) - x).abs() <= 5 * error).all())
    assert bool((share - 0.5).abs().max() > 0.4)  # to nearest, such a value would never change


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
