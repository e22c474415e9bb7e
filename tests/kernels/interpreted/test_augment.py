"""``augment`` in the interpreter, and the first convolution on what it writes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fastalex_kernels as fk
from fastalex_kernels.common.layout import as_hwnc
from fastalex_kernels.conv2d.arguments import space_to_depth_weight

from .. import _augment as augments
from .._augment import Case, check, make
from .._cases import sampled
from ._strict import Strict
from .conftest import RealTiles


@pytest.mark.parametrize("case", sampled([*augments.BLOCKS, *augments.PLAIN], 3))
def test_float32(case: Case, strict: Strict) -> None:
    check(case, torch.float32)
    assert len(strict.launches) == ("empty" not in case.name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", sampled(augments.BLOCKS[:5], 5))
def test_16_bits(case: Case, dtype: torch.dtype) -> None:
    check(case, dtype)


@pytest.mark.parametrize("case", sampled([*augments.BLOCKS, *augments.PLAIN], 9))
def test_on_real_tiles(case: Case, real_tiles: RealTiles, strict: Strict) -> None:
    with real_tiles("sm_90"):
        check(case, torch.float16)


def test_many_programs_an_image(real_tiles: RealTiles, strict: Strict) -> None:
    case = Case("large", (2, 64, 60), 56, augments.PAPER, mean="floats")
    with real_tiles("sm_90"):
        check(case, torch.float32)
    assert strict.programs > 2
    strict.programs = 0
    with real_tiles("sm_90"):
        check(replace(case, padding=None), torch.float32)
    assert strict.programs > 2


@pytest.mark.slow
@settings(max_examples=15, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_any_call(data: Any) -> None:
    size = data.draw(st.integers(1, 14))
    sides: Any = tuple(data.draw(st.tuples(*[st.integers(0, 5)] * 2)) for _ in range(2))
    if size + min(map(sum, sides)) < 11:
        sides = ((5, 5), (6, 4))
    sides = data.draw(st.sampled_from([None, sides]))
    more = data.draw(st.tuples(*[st.integers(0, 5)] * 2))
    shape = (data.draw(st.integers(1, 4)), size + more[0], size + more[1])
    mean = data.draw(st.sampled_from(augments.MEANS))
    layout = data.draw(st.sampled_from(["contiguous", "unaligned", "strided"]))
    seed = data.draw(st.integers(0, 2**16))
    check(
        Case(
            "any",
            shape,
            size,
            sides,
            mean,
            False,
            layout if sides is None or layout != "strided" else "contiguous",
            seed,
        ),
        torch.float32,
    )


# The four variants' padding at crops of every size modulo 4: 224 with ceil, 227, and 224 with 2.
@pytest.mark.parametrize(
    "place", sampled([(25, ((0, 2), (0, 2))), (24, augments.PAPER), (27, 0), (24, 2), (22, 0)], 5)
)
def test_the_first_convolution_takes_it_as_it_lies(place: tuple[int, Any]) -> None:
    size, padding = place
    arguments = make(Case("conv1", (2, 30, 32), size, padding, mean="floats"))
    x = augments.blocks(arguments, padding, torch.float32)
    assert as_hwnc(x).data_ptr() == x.data_ptr()
    weight = (torch.randn(16, 3, 11, 11) / 19).requires_grad_()
    bias = torch.randn(16, requires_grad=True)
    y = fk.conv2d_relu(x, space_to_depth_weight(weight, (4, 4)), bias)
    gradient = torch.randn(y.shape)
    found = torch.autograd.grad(y, (weight, bias), gradient)

    plain = fk.augment(**arguments, dtype=torch.float32)
    expected = fk.conv2d_relu(plain, weight, bias, stride=4, padding=padding)
    assert torch.equal(y, expected)
    wanted = torch.autograd.grad(expected, (weight, bias), gradient)
    assert found[0].shape == weight.shape
    assert torch.equal(found[0], wanted[0])
    assert torch.equal(found[1], wanted[1])
