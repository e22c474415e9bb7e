"""Every function on the tiles of real GPUs: many programs, split sums, masks and none."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

from fastalex_kernels.conv2d import forward

from .._cases import sampled
from .._oracle import Case, check, conv, linear, lrn, make_inputs, pool, run
from ._observe import observe
from ._strict import Strict
from .conftest import RealTiles

# sm_120 stands for every target without tiles of its own.
TARGETS = ["sm_80", "sm_90", "sm_100", "gfx942", "sm_120"]

# The input gradient holds four neighbouring pixels in a program, or two; the last one fewer.
NEIGHBOURS = [
    conv("four-pixels", (128, 96, 3, 7), 128, 5, padding=2, groups=2),
    conv("two-pixels", (128, 64, 3, 3), 64, (2, 3), padding=((1, 0), (2, 0))),
    conv("two-of-four-pixels", (128, 48, 1, 2), 64, (1, 4), padding=((0, 0), (3, 1))),
]

# Rows, channels and sums are just above, just below or exactly a few tiles.
PRODUCTS = [
    conv("whole-tiles", (128, 32, 3, 2), 128, 2),  # one pixel of 128 images is a tile
    conv("whole-tiles-unaligned", (128, 16, 2, 2), 16, 2, layout="unaligned"),
    conv("tails", (128, 48, 2, 2), 192, 2, padding=((0, 1), (0, 0)), relu=False),
    conv("odd", (9, 70, 5, 4), 130, 3, padding=1),
    conv("rest-of-channels", (64, 40, 3, 3), 24, 3, padding=1, groups=2),
    conv("many-rows", (3, 16, 11, 10), 16, 2, padding=((0, 1), (1, 0))),
    conv("conv1", (2, 3, 39, 39), 16, 11, stride=4, padding=((0, 3), (0, 3))),
    linear("split", 3, 1640, 140, p=0.3),
    linear("split-no-relu", 17, 1536, 64, relu=False),
    linear("rows", 130, 70, 72),
    linear("batch1", 1, 1100, 40),
    linear("unaligned", 20, 64, 136, layout="unaligned"),
    conv("tails-both-ways", (64, 192, 2, 2), 192, 2),
    conv("tail-and-taps", (32, 96, 2, 3), 16, 2, padding=1),
    conv("taps-of-a-line", (64, 96, 3, 7), 64, 5, padding=((2, 1), (2, 1)), groups=2),
]
POOLINGS = [
    lrn("groups", (3, 48, 5, 7), alpha=1.0, groups=2),
    lrn("wide", (3, 200, 5, 5), alpha=1.0),
    lrn("odd-channels", (3, 3, 15, 17), alpha=1.0),
    lrn("paper-alpha", (2, 32, 7, 6), ceil_mode=True),
    lrn("one-chunk", (1, 8, 6, 9), alpha=1.0, k=1.0),
    lrn("no-negatives", (2, 32, 7, 6), groups=2, signed=False),
    lrn("unaligned", (3, 16, 5, 5), "unaligned", alpha=1.0),
    pool("many-channels", (5, 300, 5, 5)),
]
EXTREMES = [
    lrn(f"alpha{alpha:g}", (2, 16, 5, 6), alpha=alpha)
    for alpha in (0.0, -0.1, 1e-300, 1e-30, 1e-10, 1e5, 1e30)
] + [lrn(f"k{k:g}", (2, 16, 5, 6), alpha=1.0, k=k) for k in (1e-30, 1e-10, 1e10, 1e25)]
CASES = [*PRODUCTS, *POOLINGS]


@pytest.mark.parametrize("on", sampled(itertools.product(PRODUCTS, TARGETS), 40, first=16))
def test_float16(on: tuple[Case, str], real_tiles: RealTiles, strict: Strict) -> None:
    case, target = on
    with real_tiles(target):
        check(case, torch.float16)
    assert strict.programs > len(strict.launches), "one program a launch shows nothing"


@pytest.mark.parametrize("case", sampled(POOLINGS, 7))
def test_float16_pooling(case: Case, real_tiles: RealTiles) -> None:
    with real_tiles("sm_90"):
        check(case, torch.float16)


@pytest.mark.slow
@pytest.mark.parametrize("case", POOLINGS, ids=str)
def test_bfloat16_pooling(case: Case, real_tiles: RealTiles) -> None:
    """Where no product is taken the interpreter can do bfloat16, but for one unit of rounding."""
    with real_tiles("sm_90"):
        check(case, torch.bfloat16)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=str)
def test_float32(case: Case, real_tiles: RealTiles) -> None:
    with real_tiles("sm_90"):
        check(case, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", sampled(EXTREMES, 6))
def test_extreme_constants_of_lrn(
    case: Case, dtype: torch.dtype, real_tiles: RealTiles, strict: Strict
) -> None:
    with real_tiles("sm_90"):
        check(case, dtype)
    assert strict.launches


@pytest.mark.parametrize("case", sampled([PRODUCTS[7], PRODUCTS[2], PRODUCTS[5], *POOLINGS[:2]], 5))
def test_same_bits_whatever_runs_first(case: Case, real_tiles: RealTiles) -> None:
    results = []
    for seed in (None, None, 1):
        with observe(Strict(seed)), real_tiles("sm_90"):
            results.append(run(case, make_inputs(case, torch.float16)))
    for name, expected in results[0].items():
        assert torch.equal(results[1][name], expected), f"{name} differs between two runs"
        assert torch.equal(results[2][name], expected), f"{name} differs with the programs' order"


@pytest.mark.parametrize("case", sampled(NEIGHBOURS, 3, first=2))
def test_neighbouring_pixels_share_a_program(
    case: Case, real_tiles: RealTiles, strict: Strict, monkeypatch: pytest.MonkeyPatch
) -> None:
    with real_tiles("sm_90"):
        check(case, torch.float16)
        programs = strict.programs
        monkeypatch.setattr(forward, "pixels_as_columns", lambda *_: 0)
        check(case, torch.float16)
    assert 2 * programs < strict.programs


@pytest.mark.slow
@pytest.mark.parametrize("case", [PRODUCTS[7], PRODUCTS[9]], ids=str)
def test_dropout_is_the_same_on_every_target(case: Case, real_tiles: RealTiles) -> None:
    case = replace(case, arguments={**case.arguments, "p": 0.4, "relu": False})
    tensors = make_inputs(case, torch.float32)
    dropped = run(case, tensors)["output"] == 0
    assert 0.2 < dropped.double().mean() < 0.6
    for target in TARGETS:
        with real_tiles(target):
            assert torch.equal(run(case, tensors)["output"] == 0, dropped), target
