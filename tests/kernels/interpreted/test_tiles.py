"""Every function on the tiles of real GPUs: many programs, split sums, masks and none."""

from __future__ import annotations

import contextlib
import itertools
from dataclasses import replace

import pytest
import torch

from fastalex_kernels.common.tuned import Key, Tile, choosing
from fastalex_kernels.conv2d.weight import pack_lines

from .. import _masks as masks
from .._cases import sampled
from .._oracle import Case, check, conv, linear, lrn, make_inputs, pool, run
from ._observe import observe
from ._strict import Strict
from .conftest import RealTiles

# sm_120 stands for every target without tiles of its own.
TARGETS = ["sm_80", "sm_90", "sm_100", "gfx942", "sm_120"]

# The input gradient takes pixels of a line as columns of one product; the last run may be shorter.
RUNS = [
    conv("runs-of-two", (128, 96, 3, 7), 128, 5, padding=2, groups=2),
    conv("whole-runs", (128, 64, 3, 4), 64, (2, 3), padding=((1, 0), (2, 0))),
    conv("runs-of-five", (128, 24, 2, 7), 16, (3, 5), padding=((1, 1), (0, 2))),
    conv("a-short-run", (128, 32, 1, 2), 64, (1, 4), padding=((0, 0), (3, 1))),
]

# Two or three pixels share a program: of one line or of two, and the last program has fewer.
SHARING = [
    conv("lines", (128, 48, 3, 4), 32, 3, padding=1),
    conv("rest", (128, 32, 2, 5), 192, (2, 3), padding=((1, 0), (0, 2)), relu=False),
    conv("below-only", (128, 32, 4, 3), 32, 2, padding=((0, 1), (0, 0)), groups=2),
    conv("inside", (128, 16, 3, 5), 48, 2),
    conv("outside", (128, 16, 1, 2), 16, 1, padding=((2, 1), (1, 3))),  # pixels without a tap
]

# The taps of a line are columns of one product in the weight gradient, from a copy of the input.
LINES = [
    conv("lines-and-groups", (64, 64, 4, 5), 80, (3, 7), padding=((1, 0), (3, 2)), groups=2),
    conv("lines-inside", (128, 24, 4, 7), 24, (3, 5)),
    conv("lines-outside", (64, 16, 3, 2), 16, (3, 8), padding=((1, 2), (9, 9))),
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


def _with(field: int, values: Tile, *kernels: str) -> contextlib.AbstractContextManager[None]:
    """The own tiles, of the named kernels with other values from ``field`` on."""

    def change(key: Key, own: Tile) -> Tile:
        rest = own[field + len(values) :]
        return (*own[:field], *values, *rest) if key[0] in kernels else own

    return choosing(change)


@pytest.mark.parametrize("case", sampled(RUNS, 4, first=3))
def test_neighbouring_pixels_are_columns(case: Case, real_tiles: RealTiles, strict: Strict) -> None:
    programs = []
    for columns in (128, 32):
        strict.programs = 0
        with real_tiles("sm_90"), _with(1, (columns,), "conv2d input"):
            check(case, torch.float16)
        programs.append(strict.programs)
    assert programs[0] < programs[1]


@pytest.mark.parametrize("case", sampled(SHARING, 5))
def test_pixels_share_blocks_of_the_weight(
    case: Case, real_tiles: RealTiles, strict: Strict
) -> None:
    """The sums are those of a pixel alone, bit by bit, also where a ReLU below masks them."""
    programs, results = [], []
    for rows in (128, 256, 384):
        strict.programs = 0
        with real_tiles("sm_90"), _with(0, (rows, 128), "conv2d forward", "conv2d input"):
            results.append(run(case, make_inputs(case, torch.float16)))
            programs.append(strict.programs)
            masks.check(replace(case, arguments={**case.arguments, "relu": False}), torch.float16)
    with real_tiles("sm_90"):
        check(case, torch.float16)
    assert programs[0] > programs[1] > programs[2]
    for name, alone in results[0].items():
        assert torch.equal(results[1][name], alone), name
        assert torch.equal(results[2][name], alone), name


@pytest.mark.parametrize(
    "on", sampled(itertools.product(LINES, ("sm_90", "sm_80", "sm_120")), 9, first=3)
)
def test_taps_of_a_line_are_columns(
    on: tuple[Case, str], real_tiles: RealTiles, strict: Strict
) -> None:
    """In blocks that hold a whole line of taps, and in narrower ones."""
    case, target = on
    programs = []
    for rows in (256, 64):
        strict.programs = 0
        with real_tiles(target), _with(0, (rows,), "conv2d weight"):
            check(case, torch.float16)
        programs.append(strict.programs)
    assert programs[0] < programs[1]


@pytest.mark.parametrize("groups", [1, 2])
def test_lines_are_the_same_values_in_another_order(groups: int, real_tiles: RealTiles) -> None:
    x = torch.randn(5, 7, 64, groups * 24, dtype=torch.float16)
    with real_tiles("sm_90"):
        lines = pack_lines(x, (3, 5), groups)
    assert lines is not None
    assert torch.equal(lines, x.view(5, 7, 64, groups, 24).permute(0, 3, 2, 1, 4))


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
