"""Gradients applied where they are made: the kernels, in the interpreter."""

from __future__ import annotations

import pytest
import torch

import fastalex_kernels as fk

from .. import _updates as updates
from .._oracle import Case, conv, linear
from ._strict import Strict
from .conftest import RealTiles

PACKED = [c for c in updates.CASES if c.op == "conv2d_relu" and "stride" not in c.arguments]
TILES = [
    conv("whole-tiles", (128, 32, 3, 2), 128, 2),
    conv("stride", (17, 3, 23, 19), 40, 5, stride=2),
    linear("tiles", 130, 136, 200, p=0.3),
    linear("columns-1000", 17, 64, 1000, relu=False, p=0.0),
]


@pytest.mark.parametrize("rule", updates.RULES)
@pytest.mark.parametrize("case", updates.CASES, ids=str)
def test_float32(case: Case, rule: str, strict: Strict) -> None:
    updates.check(case, torch.float32, rule)
    applied = "_linear_bwd_weight_update_kernel" if case.op.startswith("lin") else "_sum_update"
    assert any(name.startswith(applied) for name in strict.launches)
    assert "_sum_partials_kernel" not in strict.launches, "a gradient was written"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("case", PACKED, ids=str)
def test_a_weight_that_lies_as_the_kernels_read_it(case: Case, dtype: torch.dtype) -> None:
    updates.check(case, dtype, "paper", packed=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", updates.CASES, ids=str)
def test_16_bits(case: Case, dtype: torch.dtype) -> None:
    updates.check(case, dtype, "torch")


@pytest.mark.parametrize("target", ["sm_90", "sm_80"])
@pytest.mark.parametrize("case", TILES, ids=str)
def test_real_tiles(case: Case, target: str, real_tiles: RealTiles, strict: Strict) -> None:
    with real_tiles(target):
        updates.check(case, torch.float16, "paper")
    assert strict.programs > 8


@pytest.mark.parametrize("rule", updates.RULES)
@pytest.mark.parametrize("case", [updates.CASES[1], updates.CASES[6]], ids=str)
def test_as_the_optimizer_of_torch(case: Case, rule: str) -> None:
    """The same kernels without the update, and torch's operators: equal to a few roundings."""
    fused, apart = (updates.make(case, torch.float32, rule) for _ in range(2))
    fused.call(case, update=fused.updates).square().sum().backward()
    apart.call(case).square().sum().backward()
    for one, other in zip(fused.updates, apart.updates, strict=True):
        assert one is not None
        assert other is not None
        assert other.parameter.grad is not None
        other.apply(other.parameter.grad)
        pairs = (one.parameter.detach(), other.parameter.detach()), (one.velocity, other.velocity)
        for a, b in pairs:
            # Four operations round; a difference of large terms keeps their error.
            torch.testing.assert_close(a, b, rtol=2.0**-21, atol=2.0**-21 * float(b.abs().max()))


@pytest.mark.parametrize("case", [updates.CASES[0], updates.CASES[6]], ids=str)
def test_only_a_backward_pass_updates(case: Case) -> None:
    made = updates.make(case, torch.float32, "paper")
    before = made.wide()
    with torch.no_grad():
        made.call(case, update=made.updates)
    made.call(case, update=made.updates)
    for (w, v), (w0, v0) in zip(made.wide(), before, strict=True):
        assert torch.equal(w, w0)
        assert torch.equal(v, v0)


@pytest.mark.parametrize("case", [updates.CASES[0], updates.CASES[6]], ids=str)
def test_a_change_from_outside_is_seen(case: Case) -> None:
    made = updates.make(case, torch.float16, "paper")
    made.call(case, update=made.updates).sum().backward()
    with torch.no_grad():
        for parameter in made.parameters:
            parameter.fill_(0.125)
    fresh = [torch.full_like(p, 0.125).half() for p in made.parameters]
    expected = updates.oracle.call(case, fk, [made.input, *fresh])
    assert torch.equal(made.call(case, update=made.updates), expected)


def test_a_pass_whose_weight_was_updated_since_is_refused() -> None:
    case = updates.CASES[6]
    made = updates.make(case, torch.float32, "paper")
    first, second = (made.call(case, update=made.updates).sum() for _ in range(2))
    first.backward()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        second.backward()
