"""Addresses of launches beyond 2^31 elements, which no test machine has the memory to run."""

from __future__ import annotations

import sys

import pytest
import torch
import triton
import triton.language as tl

from fastalex.offline import Launch, record

from .._alexnet import layers
from ._phantom import run_corners

BATCH = 32768  # conv1's output has 9.5e9 elements; rows and images still count in 32 bits


@triton.jit
def _fill_kernel(y_ptr, n, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + offs, 0.0, mask=offs < n)


@triton.jit
def _fill_far_kernel(y_ptr, n, BLOCK: tl.constexpr):
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + offs, 0.0, mask=offs < n)


def _fill(kernel: object, n: int) -> Launch:
    return Launch(kernel, (n // 1024,), (torch.empty(n, device="meta"), n), {"BLOCK": 1024})


def test_an_index_that_wraps_is_found() -> None:
    assert run_corners(_fill(_fill_kernel, 2**31 - 1024)) == {"y_ptr": 2**33 - 4096}
    with pytest.raises(AssertionError, match="int32 overflow"):
        run_corners(_fill(_fill_kernel, 2**32))
    assert run_corners(_fill(_fill_far_kernel, 2**32)) == {"y_ptr": 2**34}


@pytest.fixture
def not_interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the launchers choose blocks and splits as on a GPU."""
    for name, module in list(sys.modules.items()):
        if name.startswith("fastalex_kernels.") and hasattr(module, "interpreted"):
            monkeypatch.setattr(module, "interpreted", lambda: False)


@pytest.mark.usefixtures("not_interpreted")
@pytest.mark.parametrize("layer", list(layers(1, torch.float16)))
def test_no_address_leaves_its_tensor(layer: str) -> None:
    far = 0
    for launch in record("sm_90", layers(BATCH, torch.float16)[layer]):
        # The kernels of pooling loop over rows that they count from the start: three will do.
        reached = run_corners(launch, longest_loop=3 if layer.startswith("pool") else 80)
        assert reached, f"{launch.name} touched nothing"
        far = max(far, *reached.values())
    assert far > 2**27
    if layer[-1] in "12":
        assert far > 2 * 2**31, "the layer does not pass 2^31 elements"
