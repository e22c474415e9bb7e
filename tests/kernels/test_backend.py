"""Which backend runs, what ``backend`` promises, and the interpreter in any process."""

from __future__ import annotations

import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
import triton
from torch._subclasses.fake_tensor import FakeTensorMode

import fastalex_kernels as fk
import fastalex_kernels.common.backend as backend_module
from fastalex.inspection import offline
from fastalex_kernels.common.backend import too_old, use_triton

from . import _augment, _losses
from ._oracle import Case, call, check, conv, linear, lrn, make_gradient, make_inputs, pool, run

ONE_OF_EACH = [
    conv("one", (2, 4, 5, 5), 6, 3),
    lrn("one", (2, 8, 5, 5)),
    pool("one", (2, 8, 5, 5)),
    linear("one", 3, 7, 9),
]


def _needs_a_gpu() -> bool:
    """What ``triton`` alone says on a CPU."""
    try:
        fk.conv2d_relu(torch.zeros(2, 3, 5, 5), torch.zeros(4, 3, 3, 3))
    except ValueError:
        return True
    return False


def test_another_name_is_refused() -> None:
    with (
        pytest.raises(ValueError, match=r"^backend: expected one of auto, .*, got 'cudnn'$"),
        fk.backend("cudnn"),
    ):
        pass


def test_blocks_nest_and_end() -> None:
    with fk.backend("triton"):
        with fk.backend("auto"), fk.backend("aten"):
            assert not _needs_a_gpu()
        assert _needs_a_gpu()
        with pytest.raises(ZeroDivisionError), fk.backend("aten"):
            raise ZeroDivisionError
        with pytest.raises(ValueError), fk.backend("aten"), fk.backend("nothing"):
            pass
        assert _needs_a_gpu()
    assert not _needs_a_gpu()


def test_a_block_is_of_its_thread() -> None:
    with fk.backend("triton"), ThreadPoolExecutor(1) as other:
        assert not other.submit(_needs_a_gpu).result()


@pytest.mark.parametrize("case", ONE_OF_EACH, ids=str)
def test_triton_on_a_cpu_says_what_it_needs(case: Case) -> None:
    tensors = make_inputs(case, torch.float32)
    message = "backend 'triton' needs a GPU tensor or TRITON_INTERPRET=1, got a tensor on cpu"
    with fk.backend("triton"), pytest.raises(ValueError, match=message):
        call(case, fk, tensors)
    with fk.backend("triton"):  # float64 never runs on it
        assert call(case, fk, make_inputs(case, torch.float64)).dtype == torch.float64


@pytest.mark.interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", ONE_OF_EACH, ids=str)
@pytest.mark.parametrize("backend", ["interpreter", "aten"])
def test_the_backward_runs_where_the_forward_ran(
    case: Case, dtype: torch.dtype, backend: str
) -> None:
    tensors = make_inputs(case, dtype)
    with fk.backend(backend):
        expected = run(case, tensors)
        output = call(case, fk, tensors)
    gradients = torch.autograd.grad(output, tensors, make_gradient(case, tensors, output))
    assert torch.equal(output, expected.pop("output"))
    assert all(map(torch.equal, gradients, expected.values()))


@pytest.mark.interpreted
def test_threads_share_the_interpreter() -> None:
    def each(case: Case) -> None:
        with fk.backend("interpreter"):
            check(case, torch.float32)

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(each, 2 * ONE_OF_EACH))


def _compiled(step: Callable[[], object]) -> list[bytes]:
    with triton.knobs.compilation.scope():
        triton.knobs.compilation.always_compile = True
        launches = offline.record("sm_90", step)
        for launch in launches:
            launch.kernel.device_caches.clear()
        return [offline.compile_launch(launch, "sm_90").asm["cubin"] for launch in launches]


@pytest.mark.interpreted
def test_a_process_that_interpreted_compiles_the_same_code() -> None:
    """The interpreter replaces Triton's language while it runs, and it is put back."""

    def loss() -> None:
        fk.cross_entropy(torch.empty(3, 100), torch.zeros(3, dtype=torch.int64))

    before = _compiled(loss)
    with fk.backend("interpreter"):
        _losses.check(_losses.CASES[0], torch.float32)
        _augment.check(_augment.PLAIN[0], torch.float32)
    assert _compiled(loss) == before


def test_autocast_chooses_the_dtype_of_a_product() -> None:
    x, w = torch.randn(2, 3, 6, 6), torch.randn(4, 3, 3, 3, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = fk.conv2d_relu(x, w)
        assert y.dtype == torch.bfloat16
        pooled = fk.lrn_max_pool2d(y, kernel_size=2)
        assert pooled.dtype == torch.bfloat16
        z = fk.linear_relu_dropout(torch.randn(3, 5), torch.randn(4, 5), p=0.0)
        assert z.dtype == torch.bfloat16
    pooled.sum().backward()
    assert w.grad.dtype == torch.float32
    assert fk.conv2d_relu(x, w).dtype == torch.float32


@pytest.mark.parametrize("capability", [(7, 0), (7, 5), (8, 0), (8, 9)])
def test_a_gpu_that_triton_does_not_support_runs_torch_s_operators(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]
) -> None:
    major, minor = capability
    gpu = SimpleNamespace(major=major, minor=minor, name="T4")
    with FakeTensorMode():
        x = torch.empty(2, device="cuda")
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: gpu)
    monkeypatch.setattr(
        backend_module, "_gpu_at", functools.cache(backend_module._gpu_at.__wrapped__)
    )
    assert use_triton(x) is (major >= 8)
    with fk.backend("triton"):  # who asks for it gets it
        assert use_triton(x)
    said = f"T4 has compute capability {major}.{minor}: it runs torch's operators, "
    assert too_old(0) == (None if major >= 8 else said + "Triton's kernels need 8.0")
