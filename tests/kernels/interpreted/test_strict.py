"""The strict rules themselves: each catches the kernel that breaks it, and no other."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from ._observe import Interpreted, observe
from ._strict import Strict, StrictError


@Interpreted
@triton.jit
def _copy(x_ptr, y_ptr, n, STEP: tl.constexpr, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * STEP + tl.arange(0, BLOCK)
    tl.store(y_ptr + offs, tl.load(x_ptr + offs, mask=offs < n), mask=offs < n)


@Interpreted
@triton.jit
def _copy_without_mask(x_ptr, y_ptr, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + offs, tl.load(x_ptr + offs))


@Interpreted
@triton.jit
def _copy_every_second(x_ptr, y_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    tl.store(y_ptr + offs, tl.load(x_ptr + 2 * offs))


@Interpreted
@triton.jit
def _shift_in_place(x_ptr, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(x_ptr + offs, tl.load(x_ptr + BLOCK + offs))


@Interpreted
@triton.jit
def _store_on_one_element(y_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    tl.store(y_ptr + offs // 2, offs.to(tl.float32))


@Interpreted
@triton.jit
def _copy_words(x_ptr, y_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    words = tl.load(x_ptr.to(tl.pointer_type(tl.int32), bitcast=True) + offs)
    tl.store(y_ptr + offs, words)


@Interpreted
@triton.jit
def _add_atomically(y_ptr, BLOCK: tl.constexpr):
    tl.atomic_add(y_ptr + tl.arange(0, BLOCK), 1.0)


def test_right_kernels_pass(strict: Strict) -> None:
    x, y = torch.randn(10), torch.empty(10)
    assert y.isnan().all()
    _copy[(3,)](x, y, 10, STEP=4, BLOCK=4)
    assert torch.equal(x, y)
    _copy_every_second[(1,)](x[:8:2], y, BLOCK=4)
    assert torch.equal(x[:8:2], y[:4])
    assert (strict.launches, strict.programs) == (["_copy", "_copy_every_second"], 4)


def test_a_view_is_held_to_its_own_extent() -> None:
    buffer = torch.zeros(32)
    with pytest.raises(StrictError, match="a store outside of every argument, past y_ptr"):
        _copy[(3,)](torch.ones(12), buffer[8:18], 12, STEP=4, BLOCK=4)
    with pytest.raises(StrictError, match="a load outside of every argument, past x_ptr"):
        _copy_without_mask[(3,)](buffer[8:18], torch.ones(12), BLOCK=4)
    with pytest.raises(StrictError, match="outside of every argument, past the first"):
        _copy_without_mask[(1,)](torch.ones(4).as_strided((0,), (1,)), torch.ones(4), BLOCK=4)


def test_a_gap_of_a_strided_view_is_outside() -> None:
    with pytest.raises(StrictError, match="a load between the elements of x_ptr"):
        _copy[(1,)](torch.zeros(16)[::2], torch.zeros(8), 8, STEP=8, BLOCK=8)


def test_two_programs_on_one_element() -> None:
    with pytest.raises(StrictError, match="what another program stores in y_ptr: a race"):
        _copy[(3,)](torch.ones(10), torch.zeros(10), 10, STEP=3, BLOCK=4)


@pytest.mark.parametrize("seed", [None, 0, 1])
def test_a_store_where_another_program_loads(seed: int | None) -> None:
    with observe(Strict(seed)), pytest.raises(StrictError, match="in x_ptr: a race"):
        _shift_in_place[(3,)](torch.zeros(16), BLOCK=4)


def test_two_lanes_on_one_element() -> None:
    with pytest.raises(StrictError, match="two lanes on one element of y_ptr"):
        _store_on_one_element[(1,)](torch.zeros(8), BLOCK=8)


def test_an_address_its_size_does_not_divide() -> None:
    x, y = torch.zeros(18, dtype=torch.bfloat16), torch.zeros(8, dtype=torch.int32)
    _copy_words[(1,)](x[2:], y, BLOCK=8)
    with pytest.raises(StrictError, match="a load of 4 bytes at an address that 4 does not"):
        _copy_words[(1,)](x[1:17], y, BLOCK=8)


def test_an_atomic() -> None:
    with pytest.raises(AssertionError, match="depends on the order of the programs"):
        _add_atomically[(1,)](torch.zeros(8), BLOCK=8)


def test_two_arguments_on_the_same_memory() -> None:
    x = torch.randn(12)
    with pytest.raises(StrictError, match="in x_ptr/y_ptr: a race"):
        _copy[(2,)](x[:8], x[2:10], 8, STEP=4, BLOCK=4)
    y = torch.empty(8)
    _copy[(2,)](x[:8], y, 8, STEP=4, BLOCK=4)
    _copy[(2,)](y, y, 8, STEP=4, BLOCK=4)  # each program reads and writes its own
    assert torch.equal(x[:8], y)


def test_programs_run_in_another_order() -> None:
    seen = {}
    for seed in (None, 0, 1):
        observer = Strict(seed)
        order = observer.begin("kernel", {}, (5, 3, 2))
        assert sorted(order) == [(x, y, z) for x in range(5) for y in range(3) for z in range(2)]
        seen[seed] = tuple(order)
    assert len(set(seen.values())) == 3


def test_the_interpreter_is_itself_again_afterwards() -> None:
    builder = triton.runtime.interpreter.interpreter_builder
    inner = vars(builder)["create_masked_load"]
    with observe(Strict()):
        assert vars(builder)["create_masked_load"] is not inner
    _copy[(1,)](torch.zeros(4), torch.zeros(4), 4, STEP=4, BLOCK=4)
