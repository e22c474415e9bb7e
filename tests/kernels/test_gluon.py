"""Kernels in Gluon, which no interpreter runs, in the model: right, and in order.

What the model is to find is planted in the source of the kernel itself.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import fastalex_kernels as fk
from fastalex.common.compile import compile_launch
from fastalex.inspection.record import record_step
from fastalex_kernels import reference
from fastalex_kernels.common.backend import TRITON, record_launches
from fastalex_kernels.common.launch import interpret
from fastalex_kernels.reference import relative_error, tolerance

if TRITON < (3, 9):
    pytest.skip("kernels in Gluon are written in that of Triton 3.9", allow_module_level=True)
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from fastalex_kernels.conv2d import warp_specialized

from ._gluon_model import SCHEDULES, Fault, launch, unsynchronized_arrivals

KERNEL = warp_specialized.conv2d_relu_fwd_warp_specialized_kernel


def _recorder(launched: list[Any]) -> Callable[..., None]:
    """Runs KERNEL in the model, and says so in ``launched``; the others are interpreted."""

    def run(kernel: Any, grid: Any, arguments: Any, constants: Any) -> None:
        if kernel is not KERNEL:
            interpret(kernel, grid, arguments, constants)
            return
        launched.append(kernel)
        named = dict(zip(kernel.arg_names, arguments, strict=False))
        named |= {name: value for name, value in constants.items() if name in kernel.arg_names}
        launch(kernel, grid, named, padded={"x_desc"})

    return run


@pytest.mark.parametrize(
    ("shape", "outputs", "taps", "options", "dtype"),
    [
        ((128, 48, 4, 6), 96, 3, {}, torch.bfloat16),  # conv1 on one GPU, after space-to-depth
        ((128, 48, 4, 7), 48, 3, {}, torch.bfloat16),  # on two
        ((256, 48, 3, 5), 48, 3, {"relu": False}, torch.float16),
        ((128, 48, 3, 5), 128, 5, {"padding": 2}, torch.bfloat16),  # conv2, and its input gradient
        ((128, 96, 2, 2), 256, 5, {"padding": 2, "groups": 2}, torch.float16),
        ((128, 48, 1, 2), 128, 5, {"padding": ((5, 1), (5, 3))}, torch.float16),
    ],
)
def test_agrees_with_float64(
    shape: tuple[int, ...], outputs: int, taps: int, options: dict[str, Any], dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    x = random(*shape).requires_grad_(taps == 5)
    w = random(outputs, shape[1] // options.get("groups", 1), taps, taps)
    b = random(outputs) if options.get("relu", True) else None
    launched: list[Any] = []
    with record_launches("sm_90", _recorder(launched)):
        y = fk.conv2d_relu(x, w, b, **options)
        dy = random(*y.shape)
        if x.requires_grad:
            y.backward(dy)
    assert len(launched) == 1 + x.requires_grad
    exact = x.detach().double().requires_grad_()
    expected = reference.conv2d_relu(
        exact, w.double(), None if b is None else b.double(), **options
    )
    bound = tolerance(dtype, w[0].numel())
    assert relative_error(y, expected) <= bound
    if x.grad is not None:
        expected.backward(dy.double())
        assert exact.grad is not None
        assert relative_error(x.grad, exact.grad) <= bound


def test_a_nan_stays() -> None:
    x = torch.zeros(128, 48, 2, 4, dtype=torch.bfloat16)
    x[5, 7, 0, 2] = torch.nan
    w = torch.ones(48, 48, 3, 3, dtype=torch.bfloat16)
    launched: list[Any] = []
    with record_launches("sm_90", _recorder(launched)):
        y = fk.conv2d_relu(x, w, padding=1)
    assert launched
    expected = torch.zeros(128, 48, 2, 4, dtype=torch.bool)
    expected[5, :, :, 1:] = True
    assert torch.equal(y.isnan(), expected)


def _error(
    kernel: Any, seed: int = 0, schedule: str = "random", reverse: bool = False, stages: int = 3
) -> float:
    """How far a launch of few images and channels is from float64."""
    N, H, W, G, C, K, R, run = 16, 3, 4, 2, 32, 48, 3, 3
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).bfloat16()

    def describe(matrix: torch.Tensor, block: list[int]) -> TensorDescriptor:
        layout = gl.NVMMASharedLayout.get_default_for(block, gl.bfloat16)
        return TensorDescriptor.from_tensor(matrix.view(-1, matrix.shape[-1]), block, layout)

    x, b = random(H, W, N, G * C), random(G * K)
    w = random(R, R, K, G * C) if reverse else random(R, R, C, G * K)
    y = torch.full((H, W, N, G * K), torch.nan, dtype=torch.bfloat16)
    arguments = {
        "x_desc": describe(x, [8, 16]),
        "w_desc": describe(w, [32, 16] if reverse else [16, 32]),
        "w_tail_desc": describe(w, [16, 16]),
        "b_ptr": b, "y_ptr": y, "N": N, "H": H, "W": W, "P": H, "Q": W, "G": G, "C": C, "K": K,
        "R": R, "S": R, "PAD_H": 1, "PAD_W": 1, "REVERSE": reverse, "HAS_BIAS": True,
        "RELU": True, "RUN": run, "STAGES": stages,
    }  # fmt: skip
    grid = (H * -(-W // run) * (N // 8), G)
    launch(kernel, grid, arguments, seed=seed, schedule=schedule, padded={"x_desc"})
    taps = w.permute(2, 3, 0, 1)  # [output, input, R, S]
    if reverse:
        taps = torch.cat(taps.flip(2, 3).chunk(G, 1))
    else:
        taps = taps.transpose(0, 1)
    images = x.permute(2, 3, 0, 1).double()
    expected = reference.conv2d_relu(images, taps.double(), b.double(), padding=1, groups=G)
    return relative_error(y, expected.permute(2, 3, 0, 1))


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("reverse", "stages"), [(False, 2), (True, 3)])
def test_any_order_of_steps(schedule: str, reverse: bool, stages: int) -> None:
    for seed in range(2):
        error = _error(KERNEL, seed, schedule, reverse, stages)
        assert error <= tolerance(torch.bfloat16, 9 * 32)


def _planted(folder: Path, *replaced: str) -> Any:
    """The kernel with parts of its source replaced: old, new, old, ... Each is there once."""
    text = Path(warp_specialized.__file__).read_text()
    for old, new in zip(replaced[::2], replaced[1::2], strict=True):
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    path = folder / "planted.py"
    path.write_text(text)
    spec = importlib.util.spec_from_file_location("fastalex_kernels.conv2d.planted", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, KERNEL.fn.__name__)


_FULL = "            mbarrier.wait(full.index(stage), phase)\n"
_LOOP = "    for r in range(r_lo, r_hi):\n        for c in range(0, C, BLOCK_K):\n"
_FENCE = "            fence_async_shared()\n            mbarrier"
_ARRIVE = "arrive(empty.index(before), pred=(r > r_lo) | (c > 0))"
_BYTES = "X_BYTES + W_BYTES)\n"
_NEXT = """            before = stage
            stage += 1
            if stage == STAGES:
                stage = 0
                phase ^= 1
"""
_INIT = "mbarrier.init(full.index(i), count=1)"
_UNORDERED = r"is loaded with no wait after product .*warpgroup_mma\("

# What is replaced in the kernel's source and by what, and what the model says then.
_FAULTS: dict[str, tuple[str, ...]] = {
    "no wait for loads": (
        _FULL, "",
        r"xs\[0\] is read, and was never loaded|xs\[.\] is read with no wait after load",
    ),
    "no wait for an empty stage": (
        "            mbarrier.wait(empty.index(stage), phase)\n", "",
        r"is loaded with no wait after load|more arrivals than full\[0\]",
    ),
    "arrival before the products ended": (
        f"{_FENCE}.{_ARRIVE}\n", "", _FULL, f"{_FULL}{_FENCE}.{_ARRIVE}\n", _UNORDERED,
    ),
    "a product too many in flight": (
        "constexpr = 2 * (min", "constexpr = 1 + 2 * (min", _UNORDERED,
    ),
    "no fence": (
        _FENCE, "            mbarrier", r"no wait or fence_async_shared after read .*\.load\(X_L",
    ),
    "consumer starts in the wrong phase": (
        "    phase = 0\n", "    phase = 1\n", r"never loaded|is read with no wait after load",
    ),
    "producer starts in the wrong phase": (
        "    phase = 1 ", "    phase = 0 ", r"deadlock: .* waits for empty\[0\] \(phase 0, 1 of 1",
    ),
    "phase that does not turn": (
        _NEXT, _NEXT.replace("phase ^= 1", "pass"), "is read with no wait after load|deadlock",
    ),
    "a block of x too far": (
        "xs.index(stage * (S + RUN - 1) + j)", "xs.index(stage * (S + RUN - 1) + j + 1)",
        "never loaded|is read with no wait after load",
    ),
    "a slot past the last": (
        "tail = w_tails.index(stage * S + s)", "tail = w_tails.index(stage * S + s + 1)",
        r"w_tails\[0\] is read, and was never loaded|index 9 of 9",
    ),
    "more bytes expected": (
        _BYTES, f"16 + {_BYTES}", r"deadlock: .* full\[0\] \(phase 0, 0 of 1 arrivals and 16 bytes",
    ),
    "fewer bytes expected": (
        _BYTES, "X_BYTES)\n",
        r"full\[0\] expects fewer bytes than are loaded|ws\[0\] is read, and was never loaded",
    ),
    "no wait for the last products": (
        "_wait(accs, tails, 0, RUN)", "accs, tails", "sums are read before warpgroup_mma_wait",
    ),
    "sums not among deps": (
        "deps=accs + tails)\n    return ended[:RUN], ended[RUN:]",
        "deps=accs)\n    return ended, tails",
        "not among deps",
    ),
    "sums used twice": (
        "tail = warpgroup_mma(x, w_tail, tail, is_async=True)",
        "tail = warpgroup_mma(x, w_tail, acc, is_async=True)", "again after they were passed on",
    ),
    "count of a barrier": (
        _INIT, _INIT.replace("count=1", "count=2"),
        r"deadlock: .* waits for full\[0\] \(phase 0, 1 of 2 arrivals and 0 bytes",
    ),
    "no fence after init": (
        "    fence_async_shared()  # before the copies signal a barrier\n", "",
        r"no fence_async_shared since full\[0\] was initialized",
    ),
    "offsets that overflow": ("offs_m.to(gl.int64)[", "offs_m[", "by offsets of 32 bits"),
    "a barrier not initialized": (_INIT, "pass", r"more arrivals than full\[0\]"),
    "an arrival too many": (_ARRIVE, f"{_ARRIVE[:-1]}, count=2)", r"more arrivals than empty\["),
    "no arrival": (f"mbarrier.{_ARRIVE}", "pass", r"deadlock: .* waits for empty\[0\]"),
    "loads that nobody waits for": (
        f"{_LOOP}{_FULL}", f"{_LOOP}{_FULL}".replace("r_hi", "r_hi - 1"),
        r"nobody waits for the load by _fetch:\d+ `tma",
    ),
    "taps past the last": (
        "row = (r * S + s) * C + c", "row = (r * S + s + 1) * C + c",
        r"w_desc\[288, 0\] lies outside",
    ),
    "pixels past the line": (
        "if q + t < Q:", "if True:", "an element of y_ptr is stored twice|elements",
    ),
    "a pixel twice": ("(p * Q + q + t) * N + n\n", "(p * Q + q) * N + n\n", "is stored twice"),
    "a pixel never": ("if q + t < Q:", "if q + t < Q - 1:", "elements of y_ptr are never stored"),
}  # fmt: skip


@pytest.mark.parametrize("schedule", ["random", "late", "early"])
@pytest.mark.parametrize("fault", _FAULTS)
def test_finds_what_is_planted(fault: str, schedule: str, tmp_path: Path) -> None:
    *replaced, message = _FAULTS[fault]
    kernel = _planted(tmp_path, *replaced)
    with pytest.raises(Fault, match=message):
        _error(kernel, schedule=schedule)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("row = (r * S + s) * C + c", "row = (r * S + S - 1 - s) * C + c"),
        ("w = q + j - PAD_W", "w = q + j"),
        ("w = ws.index(stage * S + j - t)", "w = ws.index(stage * S)"),
    ],
)
def test_what_is_in_order_can_be_wrong(old: str, new: str, tmp_path: Path) -> None:
    assert _error(_planted(tmp_path, old, new)) > 0.1


@pytest.mark.slow
@pytest.mark.compiled
def test_threads_meet_before_one_of_them_arrives() -> None:
    """What the model takes for granted of the compiler, for each launch of a step."""
    launches = [event.launch for event in record_step("sm_90", 128, "bf16").events]
    launches = [x for x in launches if x is not None and x.name == KERNEL.fn.__name__]
    assert launches
    for x in launches:
        ptx = compile_launch(x, "sm_90").asm["ptx"]
        assert len(re.findall(r"mbarrier\.arrive\.shared", ptx)) == 1
        assert unsynchronized_arrivals(ptx) == 0
        assert unsynchronized_arrivals(re.sub(r"bar\.sync.*", "", ptx)) == 1
