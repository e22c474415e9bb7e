"""Gradients applied where they are made: the kernels, in the interpreter."""

from __future__ import annotations

import pytest
import torch

import fastalex_kernels as kernels
from fastalex_kernels.common.backend import record_launches
from fastalex_kernels.linear import backward
from fastalex_kernels.momentum import MomentumUpdate, round_stochastically

from .. import _updates as updates
from .._cases import sampled
from .._oracle import Case, conv, linear
from .conftest import RealTiles

PACKED = [c for c in updates.CASES if c.op == "conv2d_relu" and "stride" not in c.arguments]
TILES = [
    conv("whole-tiles", (128, 32, 3, 2), 128, 2),
    conv("stride", (17, 3, 23, 19), 40, 5, stride=2),
    linear("tiles", 130, 136, 200, p=0.3),
    linear("columns-1000", 17, 64, 1000, p=0.0),
]


@pytest.mark.parametrize("rule", updates.RULES)
@pytest.mark.parametrize("case", sampled(updates.CASES, 4))
def test_float32(case: Case, rule: str) -> None:
    updates.check(case, torch.float32, rule)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("case", PACKED, ids=str)
def test_weight_in_the_order_its_kernels_read(case: Case, dtype: torch.dtype) -> None:
    updates.check(case, dtype, "paper", packed=True)


@pytest.mark.parametrize("case", sampled(updates.CASES, 7, first=1))
def test_float16(case: Case) -> None:
    updates.check(case, torch.float16, "torch")


@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("case", updates.ONE_PASS, ids=str)
def test_one_pass(case: Case, dtype: torch.dtype, narrow: bool, real_tiles: RealTiles) -> None:
    updates.check(case, dtype, "torch", one_pass=True, narrow=narrow)
    with real_tiles("sm_90"):
        updates.check(case, dtype, "paper", one_pass=True, narrow=narrow)


@pytest.mark.parametrize("rule", updates.RULES)
@pytest.mark.parametrize(
    "case",
    [
        linear("odd", 1, 19, 23),  # each element draws
        linear("eights", 1, 24, 50),
        pytest.param(linear("tiles", 1, 136, 200), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_narrow_buffer_has_the_bits_of_torchs_operators(
    case: Case, rule: str, real_tiles: RealTiles
) -> None:
    """Of one image, whose gradient is exact."""
    kernel, torchs = (updates.make(case, torch.float32, rule, narrow=True) for _ in range(2))
    dz = kernel.gradient(0)
    kernel.apply(dz, 0.0)
    torchs.updates[0].apply_product(dz, torchs.input)
    for name in ("parameter", "buffer"):
        mine, theirs = (getattr(made.updates[0], name) for made in (kernel, torchs))
        assert torch.equal(mine, theirs), name
    with real_tiles("sm_90"):
        tiled = updates.make(case, torch.float32, rule, narrow=True)
        tiled.apply(dz, 0.0)
    assert torch.equal(tiled.updates[0].buffer, kernel.updates[0].buffer)


@pytest.mark.parametrize("columns", [20, 24, 1048])
def test_the_kernel_that_only_rounds(columns: int) -> None:
    x = torch.randn(7, columns, generator=torch.Generator().manual_seed(0))
    patterns = torch.tensor([0x7FFFFFFF, 0x7F800001, -1, 0x7F800000], dtype=torch.int32)
    x[0, :4] = patterns.view(torch.float32)  # three of NaN, and infinity
    rng = torch.tensor([2**40 + 1, 2**31, 3, 7, columns])
    found, expected = (torch.empty(7, columns, dtype=torch.bfloat16) for _ in range(2))
    round_stochastically(x, rng, found, first=2)
    with kernels.backend("aten"):
        round_stochastically(x, rng, expected, first=2)
    assert torch.equal(found.view(torch.int16), expected.view(torch.int16))


@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("one_pass", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("case", updates.HALVED, ids=str)
def test_half_after_half(
    case: Case, dtype: torch.dtype, one_pass: bool, narrow: bool, real_tiles: RealTiles
) -> None:
    with real_tiles("sm_90"):
        updates.check(case, dtype, "torch", one_pass=one_pass, halved=True, narrow=narrow)


def test_what_one_pass_takes() -> None:
    """Rows that begin at 16 bytes, of as many images as a program holds; else two launches do."""

    def fits(
        images: int = 4, inputs: int = 64, outputs: int = 40, skip: int = 0, half: int | None = None
    ) -> bool:
        w = torch.zeros(skip + outputs * inputs)[skip:].view(outputs, inputs)
        update = MomentumUpdate(w, torch.zeros_like(w), torch.zeros(3))
        dz, x = torch.zeros(images, outputs), torch.zeros(images, inputs)
        return backward.fits(dz, x if half is None else x[:, : inputs // 2], update, half)

    assert fits()
    assert fits(images=256)
    assert not fits(images=257)
    assert not fits(images=0)
    assert not fits(inputs=62)
    assert not fits(outputs=10)
    assert not fits(skip=1)
    assert fits(half=1)
    assert fits(inputs=60, half=0)
    assert not fits(inputs=60, half=1)  # which begins in the middle of 16 bytes


@pytest.mark.parametrize(
    ("gpu", "images", "inputs", "expected"),
    [
        ("sm_90", 128, 9216, True),
        ("sm_90", 128, 4096, True),
        ("sm_90", 256, 4096, True),
        ("sm_90", 256, 9216, False),  # three strips do not fit on a processor
        ("sm_90", 512, 4096, False),
        ("sm_90", 128, 2048, True),
        ("sm_90", 128, 1024, False),  # strips for a quarter of the processors
        ("sm_80", 128, 9216, False),
    ],
)
def test_where_one_pass_gains(gpu: str, images: int, inputs: int, expected: bool) -> None:
    with record_launches(gpu, lambda *_: None):
        dz, x = (torch.empty(images, n, dtype=torch.bfloat16, device="meta") for n in (8, inputs))
        w = torch.empty(8, inputs, device="meta")
        update = MomentumUpdate(w, torch.empty_like(w), w.new_empty(3))
        assert backward.fits(dz, x, update) == expected


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_90", "sm_80"])
@pytest.mark.parametrize("case", TILES, ids=str)
def test_real_tiles(case: Case, target: str, real_tiles: RealTiles) -> None:
    with real_tiles(target):
        for narrow in {False, case.op == "linear_relu_dropout"}:
            updates.check(case, torch.float16, "paper", narrow=narrow)
