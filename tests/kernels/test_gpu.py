"""Every function on a GPU, in every dtype, against float64.

The same tests run on a machine without a GPU where ``ttsem`` stands in for one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch

import fastalex_kernels as fk
from fastalex_kernels.common.backend import has_tma
from fastalex_kernels.momentum import round_stochastically
from fastalex_kernels.reference import TF32_TOLERANCE

from . import _augment as augments
from . import _cases as cases
from . import _halves as halves
from . import _losses as losses
from . import _masks as masks
from . import _updates as updates
from ._oracle import (
    Case,
    check,
    conv,
    linear,
    lrn,
    make_gradient,
    make_inputs,
    measure,
    pool,
    run,
)

pytestmark = pytest.mark.gpu


@contextmanager
def _float32_products(precision: str) -> Iterator[None]:
    settings = (torch.backends.cudnn.conv, torch.backends.cuda.matmul)
    before = [each.fp32_precision for each in settings]
    try:
        for each in settings:
            each.fp32_precision = precision
        yield
    finally:
        for each, value in zip(settings, before, strict=True):
            each.fp32_precision = value


@pytest.fixture(autouse=True)
def exact() -> Iterator[None]:
    """float32 products are float32's; torch lets convolutions round to TF32."""
    with _float32_products("ieee"):
        yield


# Each takes more than one program, and splits the sums that can be split.
TILES = [
    conv("whole-tiles", (128, 32, 3, 2), 128, 2),
    conv("odd", (5, 40, 6, 5), 70, 3, padding=1),
    conv("groups", (64, 32, 3, 3), 48, 3, padding=1, groups=2),
    lrn("groups", (9, 32, 5, 7), alpha=1.0, groups=2),
    lrn("paper-alpha", (5, 16, 6, 5), ceil_mode=True),
    lrn("wide", (3, 72, 5, 5), alpha=1.0, size=3),
    pool("many-channels", (5, 300, 5, 5)),
    linear("split", 3, 1640, 70, p=0.3),
    linear("split-batch1", 1, 1536, 72),
    linear("split-no-relu", 17, 1536, 40, relu=False),
    linear("rows", 130, 70, 72),
]
ALEXNET = [
    conv("conv1", (128, 3, 224, 224), 96, 11, stride=4, padding=((0, 3), (0, 3))),
    conv("conv2", (128, 96, 27, 27), 256, 5, padding=2, groups=2),
    conv("conv3", (128, 256, 13, 13), 384, 3, padding=1),
    conv("conv5", (128, 384, 13, 13), 256, 3, padding=1, groups=2),
    lrn("pool1", (128, 96, 55, 55), groups=2),
    lrn("pool2", (128, 256, 27, 27), groups=2),
    pool("pool5", (128, 256, 13, 13)),
    linear("fc6", 128, 9216, 4096),
    linear("fc8", 128, 4096, 1000, p=0.0, relu=False),
]


@pytest.mark.parametrize("case", [*cases.EVERY, *TILES], ids=str)
def test_float32(case: Case) -> None:
    check(case, torch.float32, "cuda")


@pytest.mark.parametrize("case", [*cases.BASIC, *TILES], ids=str)
def test_float16(case: Case) -> None:
    check(case, torch.float16, "cuda")


@pytest.mark.parametrize("case", [*cases.BASIC, *TILES], ids=str)
def test_bfloat16(case: Case) -> None:
    check(case, torch.bfloat16, "cuda")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", ALEXNET, ids=str)
def test_alexnet(case: Case, dtype: torch.dtype) -> None:
    check(case, dtype, "cuda")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", [*augments.PLAIN, *augments.BLOCKS], ids=str)
def test_augment(case: augments.Case, dtype: torch.dtype) -> None:
    augments.check(case, dtype, "cuda")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", losses.CASES, ids=str)
def test_cross_entropy(case: losses.Case, dtype: torch.dtype) -> None:
    losses.check(case, dtype, "cuda")


@pytest.mark.parametrize("case", updates.CASES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_fused_update(case: Case, dtype: torch.dtype) -> None:
    for rule in updates.RULES:
        updates.check(case, dtype, rule, "cuda", narrow=rule == "paper")


@pytest.mark.parametrize("case", updates.ONE_PASS, ids=str)
def test_one_pass(case: Case) -> None:
    if not has_tma(torch.device("cuda")):
        pytest.skip("one pass needs a GPU with a tensor memory accelerator")
    for rule in updates.RULES:
        for narrow in (False, True):
            updates.check(case, torch.bfloat16, rule, "cuda", one_pass=True, narrow=narrow)
    updates.check_same_bits(case, torch.bfloat16, "cuda", narrow=True)


@pytest.mark.parametrize("columns", [20, 1048])
def test_rounding(columns: int) -> None:
    x, rng = torch.randn(5, columns), torch.tensor([2**40 + 1, 2**31, 3, 7, columns])
    expected = torch.empty(x.shape, dtype=torch.bfloat16)
    found = expected.cuda()
    round_stochastically(x.cuda(), rng.cuda(), found)
    round_stochastically(x, rng, expected)
    assert torch.equal(found.cpu(), expected)


@pytest.mark.parametrize("one_pass", [True, False])
@pytest.mark.parametrize("case", updates.HALVED, ids=str)
def test_half_of_the_columns_after_the_other(case: Case, one_pass: bool) -> None:
    if one_pass and not has_tma(torch.device("cuda")):
        pytest.skip("one pass needs a GPU with a tensor memory accelerator")
    updates.check(case, torch.bfloat16, "paper", "cuda", one_pass=one_pass, halved=True)


@pytest.mark.parametrize("case", [c for c in TILES if len(c.shapes) > 1], ids=str)
def test_masked_gradients(case: Case) -> None:
    """The backward pass of the ReLU below, in the kernel that makes its gradient."""
    masks.check(case, torch.bfloat16, "cuda")


@pytest.mark.parametrize(
    "case",
    [
        conv("whole-tiles", (128, 64, 2, 3), 48, 3, padding=1),
        conv("odd", (9, 70, 3, 4), 130, 2, padding=((0, 1), (1, 0))),
    ],
    ids=str,
)
def test_halves(case: Case) -> None:
    """Of one of two towers, whose channels come in two tensors."""
    halves.check(case, torch.bfloat16, "cuda")


@pytest.mark.parametrize("case", [c for c in TILES if len(c.shapes) > 1], ids=str)
def test_tf32(case: Case) -> None:
    # Without ReLU: rounding an operand can move a sum across zero, and with it a whole gradient.
    case = replace(case, arguments={**case.arguments, "relu": False})
    with _float32_products("tf32"):
        errors, _ = measure(case, torch.float32, "cuda")
    assert max(errors.values()) <= TF32_TOLERANCE
    assert errors["output"] > 1e-5, "the products were not rounded to TF32"


@pytest.mark.parametrize("case", TILES, ids=str)
def test_same_bits_again(case: Case) -> None:
    one, two = (run(case, make_inputs(case, torch.bfloat16, "cuda")) for _ in range(2))
    for name, expected in one.items():
        assert torch.equal(two[name], expected), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_as_on_a_cpu(dtype: torch.dtype) -> None:
    x, w = (torch.rand(130, 33) + 1).to(dtype), (torch.rand(90, 33) + 1).to(dtype)
    rng = torch.tensor([-5, 3 << 40])
    dropped = fk.linear_relu_dropout(x, w, p=0.4, rng=rng) == 0
    on_gpu = fk.linear_relu_dropout(x.cuda(), w.cuda(), p=0.4, rng=rng.cuda()) == 0
    assert torch.equal(on_gpu.cpu(), dropped)
    assert 0.3 < dropped.double().mean() < 0.5


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("case", TILES, ids=str)
def test_on_the_second_gpu_while_the_first_is_current(case: Case) -> None:
    first = run(case, make_inputs(case, torch.bfloat16, "cuda:0"))
    with torch.cuda.device(0):
        second = run(case, make_inputs(case, torch.bfloat16, "cuda:1"))
        assert torch.cuda.current_device() == 0
    for name, expected in first.items():
        assert second[name].device == torch.device("cuda:1")
        assert torch.equal(second[name].cpu(), expected.cpu()), name


def _needs(gigabytes: int) -> None:
    if torch.cuda.mem_get_info()[0] < gigabytes << 30:
        pytest.skip(f"needs {gigabytes} GB of GPU memory")


def test_more_than_2_31_elements() -> None:
    _needs(40)
    images = 8192  # 8192 * 96 * 55 * 55 = 2.4e9 elements
    x = torch.zeros(images, 96, 55, 55, dtype=torch.bfloat16, device="cuda")
    x[-1].normal_()
    x.requires_grad_()
    y = fk.lrn_max_pool2d(x, groups=2)
    gradient = torch.zeros_like(y)
    gradient[-1] = make_gradient(lrn("last", (1,)), y[-1:])[0]
    (dx,) = torch.autograd.grad(y, x, gradient)
    alone = x[-1:].detach().requires_grad_()
    expected = fk.lrn_max_pool2d(alone, groups=2)
    assert torch.equal(y[-1:], expected)
    assert torch.equal(dx[-1:], torch.autograd.grad(expected, alone, gradient[-1:])[0])
    assert not dx[:-1].any()
