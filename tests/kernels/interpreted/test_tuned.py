"""What ``fastalex.tune`` tries beside tiles of products: a table gives it, and it is exact."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fastalex.tuning.candidates import candidates
from fastalex_kernels import reference
from fastalex_kernels.common import launch, tuned
from fastalex_kernels.common.launch import record_launches
from fastalex_kernels.common.parameters import Norm
from fastalex_kernels.linear.forward import HalvedProduct
from fastalex_kernels.lrn_pool import alexnet
from fastalex_kernels.reference import TOLERANCES, relative_error, tolerance

from .._oracle import Case, check, conv, linear, lrn, make_inputs, pool, run
from ._strict import Strict
from .conftest import RealTiles

GPU, TARGET, HALF = "NVIDIA Test GPU", "sm_90", torch.float16
KINDS = {
    "linear parts": linear("parts", 3, 1640, 72, p=0.3),
    "conv2d weight parts": conv("parts", (24, 16, 6, 6), 16, 2),
    "lrn forward": lrn("chunks", (2, 16, 7, 9), alpha=1.0, groups=2),
    "lrn backward": lrn("chunks", (2, 16, 7, 9), alpha=1.0, groups=2),
    "pool forward": pool("rows", (3, 24, 7, 6)),
    "pool backward": pool("rows", (3, 24, 7, 6)),
}


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where the table is read from by launches that are recorded, as by those on a GPU."""
    path = tmp_path / "tiles.json"
    monkeypatch.setenv(tuned.VARIABLE, str(path))
    monkeypatch.setattr(launch, "_device_name", lambda device: GPU)
    tuned._table.cache_clear()
    yield path
    tuned._table.cache_clear()


def _write(path: Path, key: tuned.Key, tile: tuned.Tile) -> None:
    kernel, kind, sizes = key
    entry = {"kernel": kernel, "kind": kind, "sizes": sizes, "tile": tile}
    path.write_text(json.dumps({"timed": True, **tuned.identity(GPU), "tiles": [entry]}))
    tuned._table.cache_clear()


def _launched(case: Case) -> list[Any]:
    """Names, grids, numbers and constants of what forward and backward of a case launch."""
    made = []

    def recorder(kernel: Any, grid: Any, args: Any, kwargs: Any) -> None:
        made.append((kernel.fn.__name__, grid, [a for a in args if type(a) is int], kwargs))

    with record_launches(TARGET, recorder):
        run(case, make_inputs(case, HALF))
    return made


def _problem(case: Case, kernel: str) -> tuple[tuned.Key, tuned.Tile]:
    """The first problem of ``kernel`` that a case poses, and what is taken for it."""
    posed: dict[tuned.Key, tuned.Tile] = {}
    with tuned.choosing(lambda key, own: posed.setdefault(key, own)):
        _launched(case)
    return next((key, own) for key, own in posed.items() if key[0] == kernel)


@pytest.mark.parametrize("kernel", KINDS)
def test_every_candidate_is_launched_and_right(
    kernel: str, real_tiles: RealTiles, table: Path
) -> None:
    case = KINDS[kernel]
    with real_tiles(TARGET):
        key, own = _problem(case, kernel)
        assert len(own) == len(tuned.FIELDS[kernel])
        _write(table, key, own)
        seen = [_launched(case)]
        first, *tried = dict.fromkeys(candidates(key, own, TARGET, 16, 1 << 20))
        assert first == own
        assert tried
        for tile in tried:
            _write(table, key, tile)
            launched = _launched(case)
            assert launched not in seen, f"{tile} changes nothing"
            seen.append(launched)
            check(case, HALF)
        _write(table, (*key[:2], (key[2][0] + 1, *key[2][1:])), tried[0])
        assert _launched(case) == seen[0], "taken for another batch"


def test_parts_of_a_half(real_tiles: RealTiles, table: Path, strict: Strict) -> None:
    """The order of the parts is that of the columns, whichever half comes first."""
    draw = torch.Generator().manual_seed(0)
    x, w, b = (torch.randn(*s, generator=draw).to(HALF) for s in ((3, 3280), (72, 3280), (72,)))
    expected = reference.linear_relu_dropout(x.double(), w.double(), b.double(), p=0.0)
    halves = [half.contiguous() for half in x.chunk(2, 1)]

    def made(first: int) -> torch.Tensor:
        product = HalvedProduct(halves[first], w)
        for half in (first, 1 - first):
            product.add(halves[half], half)
        return product.finish(bias=b, relu=True)

    with real_tiles(TARGET):
        looked_up: dict[tuned.Key, tuned.Tile] = {}
        with tuned.choosing(lambda key, own: looked_up.setdefault(key, own)):
            made(0)
        ((key, own),) = (x for x in looked_up.items() if x[0][0] == "linear half parts")
        first, *tried = dict.fromkeys(candidates(key, own, TARGET, 16, 0))
        assert first == own
        assert tried
        for tile in tried:
            _write(table, key, tile)
            strict.launches.clear()
            y = made(0)
            assert len(strict.launches) == 3  # either half, and the sums of both
            assert relative_error(y, expected) <= tolerance(HALF, x.shape[1])
            assert torch.equal(made(1), y)


@pytest.mark.parametrize("chunks", [64, 256])
def test_sums_of_a_masked_gradient_in_other_chunks(
    chunks: int, real_tiles: RealTiles, table: Path
) -> None:
    """A program sums what it writes over up to 256 images."""
    images, channels, size, pooled = 300, 8, 3, 1
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(size, size, images, channels, generator=draw).relu().to(HALF)
    dy = torch.randn(pooled, pooled, images, channels, generator=draw).to(HALF)
    argmax = torch.randint(9, dy.shape, generator=draw).to(torch.uint8)
    norm = Norm(5, 0.2, 0.75, 1.0)
    made = []
    sizes = (images, size, size, pooled, pooled, channels, 1)
    for tile in ((128, 2), (chunks, 1)):
        _write(table, ("lrn backward", "float16", sizes), tile)
        dx = torch.empty_like(x)
        with real_tiles(TARGET):
            sums = alexnet.backward(x, dy, argmax, dx, norm, groups=1, mask=True)
        assert sums is not None
        assert len(sums) == -(-images // tile[0]) * 2 * (2 // tile[1])
        made.append((dx, sums.sum(0)))
    (expected, total), (dx, sums) = made
    assert torch.equal(dx, expected)
    assert relative_error(sums, total) <= TOLERANCES[torch.float32]
    assert relative_error(sums, dx.double().sum((0, 1, 2))) <= TOLERANCES[HALF]
