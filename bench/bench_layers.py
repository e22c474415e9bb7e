"""Every layer of AlexNet, forward and backward, against stock torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from fastalex.tuning.layer_pairs import LayerPair, check, make_call, make_pairs, pair_names

from ._report import Report
from ._timing import clock, take_turns

pytestmark = pytest.mark.benchmark(timer=clock)

BATCH = {"cpu": 16, "cuda": 128}
ROUNDS = {"cpu": 10, "cuda": 50}
ON_A_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="for a GPU")
# Stock torch, eager; our functions on cuDNN and cuBLAS; stock torch under torch.compile, and that
# with Inductor's Triton templates alone.
RIVALS = [
    "stock",
    pytest.param("aten", marks=ON_A_GPU),
    pytest.param("compiled", marks=pytest.mark.compiled),
    pytest.param("templates", marks=[ON_A_GPU, pytest.mark.compiled]),
]
Sizes = Callable[[int, int], tuple[int, int]]


@pytest.fixture(scope="module")
def batch(device: str, sizes: Sizes) -> int:
    return sizes(BATCH[device], 0)[0]


@pytest.fixture(scope="module")
def pairs(batch: int, device: str, dtype: torch.dtype) -> dict[str, LayerPair]:
    return make_pairs(batch, "paper", device, dtype)


@pytest.fixture(scope="module", params=pair_names("paper"))
def checked(
    request: pytest.FixtureRequest, pairs: dict[str, LayerPair], device: str
) -> tuple[LayerPair, dict[str, float]]:
    """A layer, and its errors by direction: nothing wrong is timed."""
    pair = pairs[request.param]
    return pair, check(pair, _backend(device))


@pytest.mark.parametrize("against", RIVALS)
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_layer(
    benchmark: Any,
    report: Report,
    device: str,
    dtype: torch.dtype,
    sizes: Sizes,
    batch: int,
    checked: tuple[LayerPair, dict[str, float]],
    direction: str,
    against: str,
) -> None:
    pair, errors = checked
    ours = make_call(pair, _backend(device), direction)
    theirs = make_call(pair, against, direction)
    times = take_turns(benchmark, ours, theirs, sizes(0, ROUNDS[device])[1])
    report.add(
        benchmark, "layers", times, pair.floors[direction], layer=pair.name,
        direction=direction, against=against, batch=batch,
        dtype=str(dtype).removeprefix("torch."), error=errors[direction],
    )  # fmt: skip


def _backend(device: str) -> str:
    return "triton" if device == "cuda" else "aten"
