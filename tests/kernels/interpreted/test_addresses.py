"""Addresses of launches beyond 2^31 elements, which no test machine has the memory to run."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import triton
import triton.language as tl

import fastalex_kernels as fk
from fastalex.inspection.offline import record
from fastalex.inspection.record import record_step
from fastalex_kernels.common.launch import MOST_COUNTED
from fastalex_kernels.common.program import Launch
from fastalex_kernels.cross_entropy import cross_entropy_forward

from .._alexnet import NAMES
from .._cases import sampled
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
    x = torch.empty(n, device="meta")
    return Launch("", "", kernel, (n // 1024,), [x, n, 1024], {})


def test_an_index_that_wraps_is_found() -> None:
    assert run_corners(_fill(_fill_kernel, 2**31 - 1024)) == {"y_ptr": 2**33 - 4096}
    with pytest.raises(AssertionError, match="int32 overflow"):
        run_corners(_fill(_fill_kernel, 2**32))
    assert run_corners(_fill(_fill_far_kernel, 2**32)) == {"y_ptr": 2**34}


@pytest.mark.parametrize("layer", sampled(["augment", *NAMES], 12, first=8))
def test_no_address_leaves_its_tensor(layer: str) -> None:
    far = 0
    launches = [event.launch for event in record_step("sm_90", BATCH).events]
    for launch in launches:
        if launch is None or launch.layer != layer:
            continue
        # The kernels of pooling loop over rows that they count from the start: three will do.
        reached = run_corners(launch, longest_loop=3 if layer.startswith("pool") else 80)
        assert reached, f"{launch.name} touched nothing"
        far = max(far, *reached.values())
    assert far > 2**27
    if layer[-1] in "12":
        assert far > 2 * 2**31, "the layer does not pass 2^31 elements"


def _backward(y: torch.Tensor) -> None:
    y.backward(torch.empty_like(y))


def _leaf(*shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.float16, requires_grad=True)


def _convolution(beyond: int) -> None:
    """3 x 3 on 4 x 4 pixels: 5 lines of 4 and one pixel are counted, padding included."""
    images = MOST_COUNTED // 21 // 128 * 128 + beyond
    _backward(fk.conv2d_relu(_leaf(images, 8, 4, 4), _leaf(8, 8, 3, 3), _leaf(8), padding=1))


def _normalisation(images: int, channels: int) -> None:
    _backward(fk.lrn_max_pool2d(_leaf(images, channels, 3, 3)))


def _linear(rows: int) -> None:
    _backward(fk.linear_relu_dropout(_leaf(rows, 64), _leaf(64, 64), _leaf(64), relu=False))


def _augment() -> None:
    """Images of almost 1 GiB."""
    images = torch.empty(3, 18_000, 19_000, 3, dtype=torch.uint8)
    first, mirrors = torch.empty(3, dtype=torch.int64), torch.empty(3, dtype=torch.bool)
    fk.augment(images, fk.Crops(first, first, mirrors), size=18_000)


def _loss(rows: int, classes: int) -> None:
    """Its gradient made with it, and alone."""
    target = torch.empty(rows, dtype=torch.int64)
    cross_entropy_forward(_leaf(rows, classes).detach(), target, torch.empty(()))
    fk.cross_entropy(_leaf(rows, classes), target).backward(torch.empty(()))


LARGEST: dict[str, Callable[[], None]] = {
    "convolution": lambda: _convolution(0),
    "convolution, masked": lambda: _convolution(-1),
    "LRN in chunks": lambda: _normalisation(MOST_COUNTED // 16, 16),
    "LRN past the chunks": lambda: _normalisation(2**27 + 8, 16),
    "LRN": lambda: _normalisation(MOST_COUNTED // 9, 12),
    "linear": lambda: _linear(65535 * 128),
    "augment": _augment,
    "loss of many rows": lambda: _loss(MOST_COUNTED, 8),
    "loss of many classes": lambda: _loss(8, MOST_COUNTED),
}


@pytest.mark.parametrize("name", sampled(LARGEST, 6, first=5))
def test_the_largest_sizes_that_are_accepted(name: str) -> None:
    for launch in record("sm_90", LARGEST[name]):
        assert run_corners(launch, longest_loop=3), f"{launch.name} touched nothing"
