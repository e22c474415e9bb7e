"""``augment`` on torch's own operators, what holds on every backend, and its machine code."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

import fastalex_kernels as fk
from fastalex.inspection import offline
from fastalex_kernels.conv2d.arguments import space_to_depth_weight

from . import _augment as augments
from ._augment import Case, check, make
from ._cases import sampled
from ._oracle import relative_error


@pytest.mark.parametrize("case", augments.CASES, ids=str)
def test_float32(case: Case) -> None:
    check(case, torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", augments.CASES[::3], ids=str)
def test_16_bits(case: Case, dtype: torch.dtype) -> None:
    check(case, dtype)


def test_float64_runs_on_aten() -> None:
    arguments = make(augments.CASES[0])
    with fk.backend("triton"):
        output = fk.augment(**arguments, dtype=torch.float64)
    assert relative_error(output, fk.reference.augment(**arguments)) < 1e-14


def test_the_formula_value_by_value() -> None:
    """Without torch: the oracle's own oracle."""
    H, W, size, top, left, pad = 15, 14, 12, 2, 1, 2
    image = torch.randint(0, 256, (1, H, W, 3)).to(torch.uint8)
    colors, mean = torch.tensor([[4.0, -8.0, 16.0]]), torch.randint(0, 256, (H, W, 3)).float()
    scale = torch.tensor([0.5, 2.0, 0.25])
    crop = (torch.tensor([top]), torch.tensor([left]), torch.tensor([True]))
    arguments = (image, *crop, colors, mean, scale, size, pad, 4)
    outputs = [f(*arguments, dtype=torch.float32) for f in (fk.augment, fk.reference.augment)]
    assert outputs[0].shape == (1, 48, 4, 4)
    for p, q, i, j, c in itertools.product(range(4), range(4), range(4), range(4), range(3)):
        h, w = 4 * p + i - pad, 4 * q + j - pad
        value = 0.0
        if 0 <= h < size and 0 <= w < size:
            source = (top + h, left + size - 1 - w, c)
            value = (int(image[0][source]) + float(colors[0, c]) - float(mean[source])) * scale[c]
        for output in outputs:
            assert float(output[0, (i * 4 + j) * 3 + c, p, q]) == value


@settings(max_examples=60)
@given(st.integers(0, 2**16), st.sampled_from(augments.CASES))
def test_mirrored_twice(seed: int, case: Case) -> None:
    """Mirroring the images, their crops and the flag changes nothing, to the bit.

    A mean image goes with the images, its centre alone does not.
    """
    arguments = make(replace(case, seed=seed))
    images, mean, lefts = (arguments[k] for k in ("images", "mean", "lefts"))
    spare = images.shape[2] - case.size
    follows = case.mean in ("bytes", "floats")
    other = arguments | {
        "images": images.flip(2),
        "lefts": spare - lefts.clamp(0, spare),
        "mirrors": ~arguments["mirrors"],
        "mean": mean.flip(1) if follows else mean,
    }
    assert torch.equal(fk.augment(**arguments), fk.augment(**other))


@pytest.mark.parametrize("far", [2**40, -(2**40)])
def test_a_crop_far_outside_is_moved_inside(far: int) -> None:
    arguments = make(augments.CASES[0])
    there = torch.full_like(arguments["tops"], far)
    edge = torch.full_like(there, 8 if far > 0 else 0)
    output = fk.augment(**arguments | {"tops": there, "lefts": there})
    assert torch.equal(output, fk.augment(**arguments | {"tops": edge, "lefts": edge}))


def test_it_has_no_gradient() -> None:
    arguments = make(augments.CASES[0])
    arguments["colors"].requires_grad_()
    assert not fk.augment(**arguments).requires_grad


@pytest.mark.parametrize("block", [1, 4])
@pytest.mark.parametrize("mean", augments.MEANS)
def test_the_host_reads_no_value(mean: str | None, block: int) -> None:
    """A fake tensor has none to give."""
    case = Case("fake", (4, 32, 32), 24, augments.PAPER, block, mean)
    with FakeTensorMode():
        assert fk.augment(**make(case)).shape[0] == 4


@pytest.mark.parametrize("size", [24, 25, 26, 27])
@pytest.mark.parametrize("padding", [0, 2, augments.PAPER])
def test_blocks_are_what_the_strided_convolution_reads(size: int, padding: Any) -> None:
    arguments = make(Case("conv1", (2, 30, 32), size, padding, mean="floats"))
    weight, bias = torch.randn(4, 3, 11, 11) / 19, torch.randn(4)
    blocks = fk.augment(**arguments, dtype=torch.float32)
    plain = fk.augment(**arguments | {"padding": 0, "space_to_depth": 1}, dtype=torch.float32)
    expected = fk.reference.conv2d_relu(
        plain.double(), weight.double(), bias.double(), stride=4, padding=padding
    )
    found = fk.conv2d_relu(blocks, space_to_depth_weight(weight, (4, 4)), bias)
    assert relative_error(found, expected) < 1e-6


# name: (case, dtype). Padding between blocks and inside one, images whose lines 4 does not divide,
# every kind of mean, and lines of 16 pixels instead of blocks.
PUBLISHED = [
    (Case("paper", (128, 256, 256), 224, augments.PAPER), torch.bfloat16),
    (Case("paper-mean-image", (128, 256, 256), 224, augments.PAPER, mean="floats"), torch.bfloat16),
    (Case("paper-mean-bytes", (128, 256, 256), 224, augments.PAPER, mean="bytes"), torch.bfloat16),
    (Case("paper-centre", (128, 256, 256), 224, augments.PAPER, mean="centre"), torch.bfloat16),
    (Case("caffe", (128, 256, 256), 227), torch.float16),
    (Case("owt", (128, 256, 256), 224, 2), torch.float32),
    (Case("batch1", (1, 256, 256), 224, 2), torch.bfloat16),
    (Case("odd", (128, 255, 253), 225, 2), torch.bfloat16),
    (Case("plain", (128, 256, 256), 224, space_to_depth=1), torch.bfloat16),
]
# Computed: at batch 128 the paper's case moves 59 MB. In the time that takes at 3.0 TB/s (H100) and
# at 1.7 TB/s (A100), every lane can issue some 28 and 34 instructions for each value.
MOST_INSTRUCTIONS = 20


CODE = [(*case, target) for case in PUBLISHED for target in ("sm_80", "sm_90")] + [
    (*case, target) for case in PUBLISHED[:2] for target in ("sm_100", "sm_120", "gfx942")
]


@pytest.mark.compiled
@pytest.mark.parametrize("call", sampled(CODE, 100))
def test_machine_code(call: tuple[Case, torch.dtype, str]) -> None:
    case, dtype, target = call
    (launch,) = offline.record(target, lambda: fk.augment(**make(case), dtype=dtype))
    code = offline.read(offline.compile_launch(launch, target))
    assert (code.stack, code.spills) == (0, 0), f"{code.registers} registers"
    amd = target == "gfx942"
    values = 48 * launch.named["ITEMS"] // (4 * (64 if amd else 32))  # of a thread
    if amd:
        stores, wide = r"(global|buffer)_store", r"(global|buffer)_store_dwordx4"
        pairs = r"(global|buffer)_load_dwordx2"
    else:
        stores, wide, pairs = r"STG", r"STG\.E\.128", r"LDG\.E\.64"
        instructions = len(code.instructions) - code.count("NOP")
        assert instructions <= MOST_INSTRUCTIONS * values
    assert code.count(wide) == code.count(stores) == values * dtype.itemsize // 16
    # Of the third pair of a run 4 bytes are used at most, and the compiler may load those alone.
    assert code.count(pairs) >= values // 6, "bytes are not loaded 8 at a time"
