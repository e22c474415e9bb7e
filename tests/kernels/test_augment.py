"""``augment`` on torch's own operators, what holds on every backend, and its machine code."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

import fastalex_kernels as fk
from fastalex.inspection import offline

from . import _augment as augments
from ._augment import Case, check, make
from ._cases import sampled
from ._oracle import relative_error


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", augments.PLAIN, ids=str)
def test_against_float64(case: Case, dtype: torch.dtype) -> None:
    check(case, dtype)


def test_float64_runs_on_aten() -> None:
    arguments = make(augments.PLAIN[0])
    with fk.backend("triton"):
        output = fk.augment(**arguments, dtype=torch.float64)
    assert relative_error(output, fk.reference.augment(**arguments)) < 1e-14


def test_the_formula_value_by_value() -> None:
    """Without torch: the oracle's own oracle."""
    H, W, size, top, left = 15, 14, 12, 2, 1
    image = torch.randint(0, 256, (1, H, W, 3)).to(torch.uint8)
    colors, mean = torch.tensor([[4.0, -8.0, 16.0]]), torch.randint(0, 256, (H, W, 3)).float()
    scale = torch.tensor([0.5, 2.0, 0.25])
    crops = fk.Crops(torch.tensor([top]), torch.tensor([left]), torch.tensor([True]))
    arguments = (image, crops, colors, fk.PixelNorm(mean, scale), size)
    outputs = [fk.augment(*arguments, dtype=torch.float32), fk.reference.augment(*arguments)]
    assert outputs[0].shape == (1, 3, size, size)
    for h, w, c in itertools.product(range(size), range(size), range(3)):
        source = (top + h, left + size - 1 - w, c)
        value = (int(image[0][source]) + float(colors[0, c]) - float(mean[source])) * scale[c]
        for output in outputs:
            assert float(output[0, c, h, w]) == value


@settings(max_examples=60)
@given(st.integers(0, 2**16), st.sampled_from(augments.PLAIN))
def test_mirrored_twice(seed: int, case: Case) -> None:
    """Mirroring the images, their crops and the flag changes nothing, to the bit.

    A mean image goes with the images, its centre alone does not.
    """
    arguments = make(replace(case, seed=seed))
    images, (tops, lefts, mirrors), norm = (arguments[k] for k in ("images", "crops", "norm"))
    spare = images.shape[2] - case.size
    if case.mean in ("bytes", "floats"):
        norm = norm._replace(mean=norm.mean.flip(1))
    other = arguments | {
        "images": images.flip(2),
        "crops": fk.Crops(tops, spare - lefts.clamp(0, spare), ~mirrors),
        "norm": norm,
    }
    assert torch.equal(fk.augment(**arguments), fk.augment(**other))


@pytest.mark.parametrize("far", [2**40, -(2**40)])
def test_a_crop_far_outside_is_moved_inside(far: int) -> None:
    arguments = make(augments.PLAIN[0])
    crops = arguments["crops"]
    there = torch.full_like(crops.tops, far)
    edge = torch.full_like(there, 4 if far > 0 else 0)
    far_off, inside = (crops._replace(tops=x, lefts=x) for x in (there, edge))
    output = fk.augment(**arguments | {"crops": far_off})
    assert torch.equal(output, fk.augment(**arguments | {"crops": inside}))


def test_it_has_no_gradient() -> None:
    arguments = make(augments.PLAIN[0])
    arguments["colors"].requires_grad_()
    assert not fk.augment(**arguments).requires_grad


@pytest.mark.parametrize("mean", augments.MEANS)
def test_the_host_reads_no_value(mean: str | None) -> None:
    """A fake tensor has none to give."""
    with FakeTensorMode():
        assert fk.augment(**make(Case("fake", (4, 32, 32), 24, mean=mean))).shape[0] == 4


# name: (case, dtype). Padding between blocks and inside one, images whose lines 4 does not divide,
# every kind of mean, and lines of 16 pixels instead of blocks.
PUBLISHED = [
    (Case("paper", (128, 256, 256), 224, augments.PAPER), torch.bfloat16),
    (Case("paper-mean-image", (128, 256, 256), 224, augments.PAPER, mean="floats"), torch.bfloat16),
    (Case("paper-mean-bytes", (128, 256, 256), 224, augments.PAPER, mean="bytes"), torch.bfloat16),
    (Case("paper-centre", (128, 256, 256), 224, augments.PAPER, mean="centre"), torch.bfloat16),
    (Case("caffe", (128, 256, 256), 227, 0), torch.float16),
    (Case("owt", (128, 256, 256), 224, 2), torch.float32),
    (Case("batch1", (1, 256, 256), 224, 2), torch.bfloat16),
    (Case("odd", (128, 255, 253), 225, 2), torch.bfloat16),
    (Case("plain", (128, 256, 256), 224), torch.bfloat16),
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
    arguments = make(case)

    def run() -> torch.Tensor:
        if case.padding is None:
            return fk.augment(**arguments, dtype=dtype)
        return augments.blocks(arguments, case.padding, dtype)

    (launch,) = offline.record(target, run)
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
