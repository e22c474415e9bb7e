"""What ``fastalex.tune`` tries beside tiles of products: every candidate is right."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from fastalex.tuning.candidates import candidates
from fastalex_kernels import reference
from fastalex_kernels.common import tuned
from fastalex_kernels.common.parameters import Norm
from fastalex_kernels.linear.forward import Epilogue, HalvedProduct
from fastalex_kernels.lrn_pool import alexnet
from fastalex_kernels.reference import TOLERANCES, relative_error, tolerance

from .._cases import sampled
from .._oracle import check, conv, linear, lrn, make_inputs, pool, run
from ._strict import Strict
from .conftest import RealTiles

TARGET, HALF = "sm_90", torch.float16
CASES = {
    "linear parts": linear("parts", 3, 1640, 72, p=0.3),
    "conv2d weight parts": conv("parts", (24, 16, 6, 6), 16, 2),
    "lrn forward": lrn("chunks", (2, 16, 7, 9), alpha=1.0, groups=2),
    "lrn backward": lrn("chunks", (2, 16, 7, 9), alpha=1.0, groups=2),
    "pool forward": pool("rows", (3, 24, 7, 6)),
    "pool backward": pool("rows", (3, 24, 7, 6)),
}


def _tried(kernel: str, call: Callable[[], object]) -> tuple[tuned.Key, list[tuned.Tile]]:
    """The first problem of ``kernel`` that a call looks up, and what is tried beside its tile."""
    looked_up: dict[tuned.Key, tuned.Tile] = {}
    with tuned.choosing(lambda key, own: looked_up.setdefault(key, own)):
        call()
    key, own = next((key, own) for key, own in looked_up.items() if key[0] == kernel)
    assert len(own) == len(tuned.FIELDS[kernel])
    first, *tried = dict.fromkeys(candidates(key, own, 16, 1 << 20))
    assert first == own
    assert tried
    return key, tried


@pytest.mark.parametrize("kernel", sampled(CASES, 6))
def test_every_candidate_is_taken_and_right(
    kernel: str, real_tiles: RealTiles, strict: Strict
) -> None:
    case = CASES[kernel]
    with real_tiles(TARGET):
        key, tried = _tried(kernel, lambda: run(case, make_inputs(case, HALF)))
        for tile in tried:
            taken: list[tuned.Tile] = []
            given = {key: tile}
            with tuned.choosing(lambda k, own, g=given, t=taken: t.append(g.get(k, own)) or t[-1]):
                check(case, HALF)
            assert tile in taken


def test_parts_of_a_half(real_tiles: RealTiles, strict: Strict) -> None:
    """The order of the parts is that of the columns, whichever half comes first."""
    draw = torch.Generator().manual_seed(0)
    x, w, b = (torch.randn(*s, generator=draw).to(HALF) for s in ((3, 3280), (72, 3280), (72,)))
    expected = reference.linear_relu_dropout(x.double(), w.double(), b.double(), p=0.0)
    halves = [half.contiguous() for half in x.chunk(2, 1)]

    def made(first: int) -> torch.Tensor:
        product = HalvedProduct(halves[first], w)
        for half in (first, 1 - first):
            product.add(halves[half], half)
        return product.finish(Epilogue(b, relu=True))

    with real_tiles(TARGET):
        key, tried = _tried("linear half parts", lambda: made(0))
        for tile in tried:
            with tuned.choosing(lambda k, own, t=tile: t if k == key else own):
                strict.launches.clear()
                y = made(0)
                assert len(strict.launches) == 3  # either half, and the sums of both
                assert relative_error(y, expected) <= tolerance(HALF, x.shape[1])
                assert torch.equal(made(1), y)


@pytest.mark.slow
@pytest.mark.parametrize("tile", [(128, 2), (64, 1), (256, 1)])
def test_sums_of_a_masked_gradient_in_chunks(tile: tuned.Tile, real_tiles: RealTiles) -> None:
    """A program sums what it writes over up to 256 images."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(3, 3, 300, 8, generator=draw).relu().to(HALF)
    dy = torch.randn(1, 1, 300, 8, generator=draw).to(HALF)
    argmax, dx = torch.randint(9, dy.shape, generator=draw).to(torch.uint8), torch.empty_like(x)
    with real_tiles(TARGET), tuned.choosing(lambda key, own: tile):
        sums = alexnet.backward(x, dy, None, argmax, dx, Norm(5, 0.2, 0.75, 1.0), 1, mask=True)
    assert sums is not None
    assert len(sums) > 1
    assert not dx[x == 0].any()
    assert relative_error(sums.sum(0), dx.double().sum((0, 1, 2))) <= TOLERANCES[HALF]
