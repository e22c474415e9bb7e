"""Gradients applied where they are made: torch's operators, and what is refused."""

from __future__ import annotations

import pytest
import torch

import fastalex_kernels as fk
from fastalex_kernels.momentum import MomentumUpdate, Updates

from . import _updates as updates
from ._oracle import Case


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rule", updates.RULES)
@pytest.mark.parametrize("case", updates.CASES, ids=str)
def test_on_aten(case: Case, rule: str, dtype: torch.dtype) -> None:
    with fk.backend("aten"):
        updates.check(case, dtype, rule)


def _update(*shape: int, like: torch.Tensor | None = None) -> MomentumUpdate:
    w = torch.zeros(shape) if like is None else like
    return MomentumUpdate(w, torch.zeros_like(w), torch.zeros(3))


def test_arguments_are_checked() -> None:
    w, v, rate = torch.zeros(4, 3), torch.zeros(4, 3), torch.zeros(3)
    with pytest.raises(ValueError, match=r"^rule: expected one of paper, torch, got 'adam'$"):
        MomentumUpdate(w, v, rate, "adam")
    with pytest.raises(ValueError, match=r"^velocity: expected shape \(4, 3\) and strides"):
        MomentumUpdate(w, torch.zeros(3, 4).t(), rate)
    with pytest.raises(ValueError, match=r"^velocity: expected float32"):
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
    for name in ("velocity", "rate", "operand"):
        arguments = {"velocity": b.clone(), "rate": rate, "operand": b.half()}
        arguments[name] = arguments[name].to("meta")
        with pytest.raises(ValueError, match=rf"^{name}: expected device cpu, got meta$"):
            MomentumUpdate(b, **arguments)


def test_an_update_belongs_to_its_parameters() -> None:
    x, w, b = torch.zeros(2, 3), torch.zeros(4, 3), torch.zeros(4)
    right = Updates(_update(like=w), _update(like=b))
    fk.linear_relu_dropout(x, w, b, update=right)
    with pytest.raises(ValueError, match=r"^update: expected the update of this weight"):
        fk.linear_relu_dropout(x, w.clone(), b, update=right)
    with pytest.raises(ValueError, match=r"^update: expected the update of this bias"):
        fk.linear_relu_dropout(x, w, None, update=right)
    with pytest.raises(TypeError, match=r"^update of weight: expected dtype torch.float16"):
        fk.linear_relu_dropout(x.half(), w, b, update=right)
    with pytest.raises(ValueError, match=r"^update: expected the same stride both ways"):
        kernel = torch.zeros(4, 3, 2, 2)
        fk.conv2d_relu(torch.zeros(1, 3, 5, 5), kernel, stride=(1, 2),
                       update=Updates(_update(like=kernel)))  # fmt: skip
