"""What ttsem is trusted to find, planted: this is why its silence on our kernels means something.

Collected under ``ttsem.sanitize`` alone, as a real GPU would run these kernels.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import triton
import triton.language as tl


@triton.jit
def _copy(x_ptr, y_ptr, n, LOAD_MASKED: tl.constexpr, STORE_MASKED: tl.constexpr, B: tl.constexpr):
    offs = tl.program_id(0) * B + tl.arange(0, B)
    mask = offs < n
    x = tl.load(x_ptr + offs, mask=mask, other=0.0) if LOAD_MASKED else tl.load(x_ptr + offs)
    if STORE_MASKED:
        tl.store(y_ptr + offs, x, mask=mask)
    else:
        tl.store(y_ptr + offs, x)


@triton.jit
def _shift_in_place(x_ptr, n, B: tl.constexpr):
    """Each program reads one element of what the next one writes."""
    offs = tl.program_id(0) * B + tl.arange(0, B)
    x = tl.load(x_ptr + offs + 1, mask=offs + 1 < n, other=0.0)
    tl.store(x_ptr + offs, x, mask=offs < n)


@triton.jit
def _two_writers(y_ptr, B: tl.constexpr):
    """Neighbours' blocks share an element."""
    offs = tl.program_id(0) * (B - 1) + tl.arange(0, B)
    tl.store(y_ptr + offs, tl.program_id(0).to(tl.float32) + tl.zeros((B,), tl.float32))


@triton.jit
def _add_up(y_ptr, B: tl.constexpr):
    """What one program stores the others read: a sum that depends on who comes first."""
    tl.store(y_ptr, tl.load(y_ptr) + tl.program_id(0))


def _tensors(n: int) -> tuple[torch.Tensor, torch.Tensor]:
    # Not all the same: to store what is there already counts as no race.
    return torch.arange(n, device="cuda", dtype=torch.float32), torch.zeros(n, device="cuda")


PLANTED: dict[str, tuple[str, Callable[[], object]]] = {
    "read-past-the-end": ("oob_read", lambda: _copy[(2,)](*_tensors(100), 100, False, True, 64)),
    "write-past-the-end": ("oob_write", lambda: _copy[(2,)](*_tensors(100), 100, True, False, 64)),
    "shift-in-place": ("race", lambda: _shift_in_place[(2,)](_tensors(128)[0], 128, 64)),
    "two-writers": ("race", lambda: _two_writers[(2,)](_tensors(127)[1], 64)),
    "sum-without-atomics": ("race", lambda: _add_up[(2,)](_tensors(1)[1], 1)),
}


@pytest.mark.parametrize("name", list(PLANTED))
def test_what_is_wrong_is_found(name: str) -> None:
    kind, launch = PLANTED[name]
    with pytest.raises(Exception) as caught:
        launch()
    assert type(caught.value).__name__ == "KernelFault"  # of __main__, so not to be imported
    assert caught.value.fault.kind == kind


@pytest.mark.parametrize("n", [64, 100, 128])
def test_what_is_right_is_let_through(n: int) -> None:
    x, y = _tensors(n)
    _copy[(2,)](x, y, n, True, True, 64)
    assert torch.equal(x, y)
