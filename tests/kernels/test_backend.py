"""Which backend runs, and what ``backend`` promises."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import pytest
import torch

import fastalex_kernels as fk
from fastalex.inspection import offline
from fastalex_kernels.common import launch
from fastalex_kernels.conv2d.weight import _best_split
from fastalex_kernels.lrn_pool.alexnet import _row_split

from ._oracle import call, conv, linear, lrn, make_inputs, pool, run

ONE_OF_EACH = [
    conv("one", (2, 4, 5, 5), 6, 3),
    lrn("one", (2, 8, 5, 5)),
    pool("one", (2, 8, 5, 5)),
    linear("one", 3, 7, 9),
]


def test_names() -> None:
    for name in ("auto", "triton", "aten", "interpreter"):
        with fk.backend(name):
            assert launch._backend.name == name
    with (
        pytest.raises(ValueError, match=r"^backend: expected one of auto, .*, got 'cudnn'$"),
        fk.backend("cudnn"),
    ):
        pass


def test_blocks_nest_and_end() -> None:
    with fk.backend("aten"):
        with fk.backend("auto"), fk.backend("triton"):
            assert launch._backend.name == "triton"
        assert launch._backend.name == "aten"
    assert launch._backend.name == "auto"


def test_an_exception_ends_a_block() -> None:
    with pytest.raises(ZeroDivisionError), fk.backend("aten"):
        raise ZeroDivisionError
    with pytest.raises(ValueError), fk.backend("aten"), fk.backend("nothing"):
        pass
    assert launch._backend.name == "auto"


def test_a_block_is_of_its_thread() -> None:
    seen = []
    with fk.backend("aten"):
        thread = threading.Thread(target=lambda: seen.append(launch._backend.name))
        thread.start()
        thread.join()
    assert seen == ["auto"]


@pytest.mark.skipif(launch.interpreted(), reason="the kernels are interpreted")
@pytest.mark.parametrize("case", ONE_OF_EACH, ids=str)
def test_triton_on_a_cpu_says_what_it_needs(case) -> None:
    tensors = make_inputs(case, torch.float32)
    message = "backend 'triton' needs a GPU tensor or TRITON_INTERPRET=1, got a tensor on cpu"
    with fk.backend("triton"), pytest.raises(ValueError, match=message):
        call(case, fk, tensors)


@pytest.mark.parametrize("case", ONE_OF_EACH, ids=str)
def test_float64_is_not_refused(case) -> None:
    with fk.backend("triton"):
        assert call(case, fk, make_inputs(case, torch.float64)).dtype == torch.float64


def test_the_backward_runs_where_the_forward_ran() -> None:
    x = torch.randn(2, 3, 5, 5, requires_grad=True)
    with fk.backend("aten"):
        y = fk.lrn_max_pool2d(x)
    with fk.backend("auto"):
        y.sum().backward()
    assert x.grad.isfinite().all()


def test_import_asks_no_driver() -> None:
    code = (
        "import torch, triton\n"
        "from triton.runtime.driver import driver\n"
        "def refuse(*a, **k): raise SystemExit('a driver was asked')\n"
        "for name in ('is_available', 'device_count', 'current_device', 'get_device_properties',"
        " '_lazy_init'): setattr(torch.cuda, name, refuse)\n"
        "import fastalex_kernels\n"
        "assert driver._active is None and driver._default is None\n"
        "assert 'fastalex' not in __import__('sys').modules\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.skipif(launch.interpreted(), reason="the interpreter splits nothing")
@pytest.mark.parametrize("search", [_best_split, _row_split])
def test_how_to_split_is_searched_once_for_each_size(search) -> None:
    def step() -> None:
        for case in (conv("once", (128, 64, 9, 9), 64, 3), lrn("once", (128, 64, 9, 9))):
            run(case, make_inputs(case, torch.float16))

    search.cache_clear()
    first = [launch.grid for launch in offline.record("sm_90", step)]
    searched = search.cache_info().misses
    assert searched > 0
    assert [launch.grid for launch in offline.record("sm_90", step)] == first
    assert search.cache_info().misses == searched
    offline.record("sm_80", step)
    assert search.cache_info().misses > searched, "another GPU has other splits"


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
