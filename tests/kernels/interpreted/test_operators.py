"""The operators that a compiled graph holds, against the functions they stand for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

import fastalex_kernels as fk

from .. import _cases as cases
from .._cases import sampled
from .._oracle import Case, call, conv, linear, lrn, make_gradient, make_inputs, pool
from ._strict import Strict

CASES = [
    *cases.CONV[::9],
    *cases.CONV_LAYOUTS[:2],
    *cases.CONV_FROZEN[:7:3],
    *cases.LRN[:20:9],
    *cases.LRN_LAYOUTS[:1],
    *cases.POOL[::7],
    *cases.LINEAR[::6],
    *cases.LINEAR_FROZEN[:12:4],
    conv("empty", (0, 4, 5, 5), 6, 3, padding=1),
]


def _run(case: Case, compiled: bool) -> list[torch.Tensor]:
    torch._dynamo.reset()
    tensors = make_inputs(case, torch.float32)

    def function(*given: torch.Tensor) -> torch.Tensor:
        return call(case, fk, list(given))

    if compiled:
        function = torch.compile(function, backend="aot_eager", fullgraph=True)
    output = function(*tensors)
    wanted = [t for t in tensors if t.requires_grad]
    gradient = make_gradient(case, tensors, output)
    found = torch.autograd.grad(output, wanted, gradient) if wanted else ()
    return [output.detach(), *found]


@pytest.mark.parametrize("case", sampled(CASES, 11, first=1))
def test_compiled_as_eager(case: Case, strict: Strict) -> None:
    expected = _run(case, compiled=False)
    strict.launches.clear()
    found = _run(case, compiled=True)
    assert strict.launches or "empty" in str(case), "no kernel ran"
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)
        assert a.stride() == b.stride()


def _arguments() -> dict[str, tuple[Any, ...]]:
    x, w, b = make_inputs(conv("", (2, 4, 5, 6), 6, 3), torch.float32)
    (y,) = make_inputs(lrn("", (2, 8, 5, 5)), torch.float32)
    (z,) = make_inputs(pool("", (2, 8, 5, 5)), torch.float32)
    rows, weight, bias = make_inputs(linear("", 3, 7, 9), torch.float32)
    rng, last = torch.tensor([3, 4]), y.detach().contiguous(memory_format=torch.channels_last)
    norm = [5.0, 0.2, 0.75, 2.0, 1.0]
    return {
        "conv2d_relu": (x, w, b, [0, 1, 1, 0], 1, True),
        "lrn_max_pool2d": (y, norm, 2, [3, 2], [2, 2], True),
        "max_pool2d": (z, [], 1, [3, 2], [2, 2], True),
        "dropout": (rows, 0.5, rng, 1, 2),
        "linear_relu_dropout": (rows, weight, bias, 0.5, True, rng, 1, 2),
        "without_relu": (rows, weight, None, 0.5, False, rng, 1, 2),
        "aten_lrn_max_pool2d": (last.requires_grad_(), norm, 2, [3, 2], False, [2, 2], True),
    }


OPERATORS = {"max_pool2d": "lrn_max_pool2d", "without_relu": "linear_relu_dropout"}


class _BesideFakes(TorchDispatchMode):
    """Calls the fake version of every operator of ours too, and compares what comes out."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        if func.namespace == "fastalex":
            self.seen.append(func.name())
            with FakeTensorMode() as mode:
                fakes = func(*tree_map_only(torch.Tensor, mode.from_tensor, args), **(kwargs or {}))
            for a, b in zip(tree_leaves(results), tree_leaves(fakes), strict=True):
                described = [(x.shape, x.stride(), x.dtype, x.device) for x in (a, b)]
                assert described[0] == described[1], func.name()
        return results


@pytest.mark.parametrize("name", list(_arguments()))
def test_a_fake_lies_as_what_it_stands_for(name: str) -> None:
    operator, arguments = OPERATORS.get(name, name), _arguments()[name]
    leaves = [t for t in arguments if isinstance(t, torch.Tensor) and t.requires_grad]
    with _BesideFakes() as mode:
        output = tree_leaves(getattr(torch.ops.fastalex, operator)(*arguments))[0]
        torch.autograd.grad(output.sum(), leaves)
    backward = operator if operator == "dropout" else f"{operator}_backward"
    assert mode.seen == [f"fastalex::{operator}", f"fastalex::{backward}"]


@pytest.mark.slow
@pytest.mark.parametrize("name", list(_arguments()))
def test_torch_finds_nothing_wrong(name: str) -> None:
    """Schema, fake version and autograd formula, by torch's own check."""
    operator = getattr(torch.ops.fastalex, OPERATORS.get(name, name)).default
    checked = torch.library.opcheck(operator, _arguments()[name])
    assert set(checked.values()) == {"SUCCESS"}
