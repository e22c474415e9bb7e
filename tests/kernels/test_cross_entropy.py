"""``cross_entropy`` on torch's own operators, what holds on every backend, and its machine code."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import fastalex_kernels as fk
from fastalex.inspection import offline
from fastalex_kernels.common.backend import record_launches
from fastalex_kernels.cross_entropy import cross_entropy_forward

from . import _losses as losses
from ._cases import sampled
from ._losses import Case, check, make, run


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", losses.CASES, ids=str)
def test_against_float64(case: Case, dtype: torch.dtype) -> None:
    check(case, dtype)


@pytest.mark.parametrize("case", losses.CASES, ids=str)
def test_the_reference(case: Case) -> None:
    logits, target = make(case, torch.float64)
    outputs = [f(logits, target) for f in (fk.cross_entropy, fk.reference.cross_entropy)]
    gradients = [torch.autograd.grad(y, logits)[0] for y in outputs]
    assert float((outputs[0] - outputs[1]).detach().abs()) < 1e-12 * max(1.0, case.shift)
    assert float((gradients[0] - gradients[1]).abs().max()) < 1e-12 * max(1.0, case.shift)


@pytest.mark.parametrize("case", losses.CASES[2:7], ids=str)
def test_gradients_by_finite_differences(case: Case) -> None:
    logits, target = make(case, torch.float64)
    assert torch.autograd.gradcheck(lambda x: fk.cross_entropy(x, target), (logits,))


def test_two_rows_by_hand() -> None:
    logits = torch.tensor([[0.0, math.log(3.0)], [math.log(7.0), 0.0]], requires_grad=True)
    loss, found = run(logits, torch.tensor([1, 1]), g=8.0)
    assert float(loss) == pytest.approx((math.log(4 / 3) + math.log(8)) / 2)
    expected = torch.tensor([[1.0, -1.0], [3.5, -3.5]])
    torch.testing.assert_close(found, expected)


def test_a_label_that_is_no_class_is_refused_on_a_cpu() -> None:
    for label in (-100, -1, 5):
        with pytest.raises(IndexError, match="out of bounds"):
            fk.cross_entropy(torch.zeros(1, 5), torch.tensor([label]))


def test_autocast_changes_nothing() -> None:
    logits, target = make(losses.CASES[0], torch.bfloat16)
    expected = run(logits, target)
    with torch.autocast("cpu", torch.bfloat16):
        found = run(logits, target)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_the_host_reads_no_value() -> None:
    """A fake tensor has none to give."""
    with FakeTensorMode(), record_launches("sm_90", lambda *_: None):
        loss, found = run(*make(losses.CASES[0], torch.bfloat16))
    assert (loss.shape, loss.dtype, found.dtype) == ((), torch.float32, torch.bfloat16)


# Shape, dtype, and whether 16 bytes are what every access to logits and gradient can have.
PUBLISHED = [
    ((128, 1000), torch.bfloat16, True),
    ((1024, 1000), torch.float16, True),
    ((128, 1000), torch.float32, True),
    ((128, 4096), torch.bfloat16, True),
    ((1, 1000), torch.bfloat16, False),
    ((128, 10), torch.bfloat16, False),
    ((4096, 1001), torch.bfloat16, False),
]


def _step(shape: tuple[int, int], dtype: torch.dtype) -> None:
    """Loss and gradient together, the loss alone, and the gradient alone."""
    x, labels = torch.empty(shape, dtype=dtype), torch.empty(shape[0], dtype=torch.int64)
    cross_entropy_forward(x, labels, torch.empty(()))
    fk.cross_entropy(x.requires_grad_(), labels).backward(torch.empty(()))


# One GPU of each set of instructions; test_offline_compile has AlexNet's loss on every target.
CODE = itertools.product(PUBLISHED, ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942"))


@pytest.mark.compiled
@pytest.mark.parametrize("call", sampled(CODE, 100, 1))
def test_machine_code(call: tuple[tuple[tuple[int, int], torch.dtype, bool], str]) -> None:
    (shape, dtype, wide), target = call
    launches = [
        x for x in offline.record(target, lambda: _step(shape, dtype)) if "loss_ptr" in x.named
    ]
    made = [offline.read(offline.compile_launch(launch, target)) for launch in launches]
    assert len(made) == 3
    for code in made:
        assert (code.stack, code.spills) == (0, 0), f"{code.registers} registers"
        assert code.shared <= offline.TARGETS[target].shared_limit
    if not wide:
        return
    load, store = r"LDG\.E(\.CONSTANT)?\.128", r"STG\.E\.128"
    if target == "gfx942":
        load, store = (rf"(global|buffer)_{kind}_dwordx4" for kind in ("load", "store"))
    both = made[0]
    threads = 8 * (64 if target == "gfx942" else 32)
    each = 4 * 1024 * dtype.itemsize // 16 // threads  # accesses of a thread to a block
    assert [code.count(load) for code in made] == [2 * each, each, 2 * each]
    assert [code.count(store) for code in made] == [each, 0, each]
    # A program's loss is one number.
    assert both.count(r"STG|(global|buffer)_store") == both.count(store) + 1
