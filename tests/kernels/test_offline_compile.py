"""Every launch of AlexNet, forward and backward, compiled for GPUs that are not here."""

from __future__ import annotations

import functools
import re
from typing import Any

import pytest
import torch
import triton

import fastalex_kernels as fk
from fastalex.common.compile import fake_driver
from fastalex.inspection import offline
from fastalex.inspection.record import record_step
from fastalex_kernels.common.backend import interpreted
from fastalex_kernels.common.program import Launch
from fastalex_kernels.momentum import round_stochastically

from ._alexnet import NAMES, call
from ._cases import sampled
from .test_dependent_launch import fault

pytestmark = [
    pytest.mark.compiled,
    pytest.mark.skipif(interpreted(), reason="an interpreted kernel has no machine code"),
]

TENSOR_CORES = {
    "sm_80": r"HMMA\.16816\.F32",
    "sm_90": r"HGMMA\.64x\d+x16\.F32",
    "sm_100": r"UTC\w*MMA",
    "sm_103": r"UTC\w*MMA",
    "gfx942": r"v_mfma_f32_\w+16",
}
TF32_CORES = {"sm_80": r"HMMA\.1688\.F32\.TF32", "sm_90": r"HGMMA\.64x\d+x8\.F32\.TF32"}
# Kernels that hold products: convolutions and fully connected layers.
DOTS = re.compile(r"_?conv2d_(relu_fwd|bwd_weight)|_linear_(relu_dropout_fwd|bwd)")


def _check(target: str, launches: list[Launch], wide: bool = True) -> None:
    """No spills, no more than fits, and what starts early waits first.

    With ``wide``, products are of operands 16 bytes at a time.
    """
    assert launches
    for launch in launches:
        code = offline.read(offline.compile_launch(launch, target))
        where = f"{launch.layer} {launch.name}{launch.grid} on {target}"
        assert launch.grid is not None
        x, y, z = (*launch.grid, 1, 1)[:3]
        assert x <= 2**31 - 1, where
        assert max(y, z) <= 65535, where
        assert code.shared <= offline.TARGETS[target].shared_limit, f"{where}: {code.shared} bytes"
        assert code.spills == 0, f"{where}: {code.registers} registers"
        assert target == "gfx942" or code.stack == 0, where
        assert fault(code.instructions, launch.starts_early) is None, where
        if launch.named.get("PRECISION") == "tf32":
            assert code.count(TF32_CORES[target]), where
        if wide and DOTS.match(launch.name):
            assert code.count(TENSOR_CORES.get(target, TENSOR_CORES["sm_80"])), where
            if target == "gfx942":
                assert code.count(r"(global|buffer)_load_dwordx4"), where
            else:
                assert code.count(r"LDGSTS\.E.*\.128|UTMALDG"), where


@functools.cache
def _step(target: str, dtype: str, towers: int) -> list[Launch]:
    events = record_step(target, 128, dtype, towers=towers).events
    return [event.launch for event in events if event.launch is not None]


STEPS = [
    *((target, "bf16", 1) for target in offline.TARGETS),
    *((target, "bf16", 2) for target in ("sm_80", "sm_90", "gfx942")),
    *((target, "fp32", 1) for target in ("sm_80", "sm_90", "gfx942")),
]


# One layer of each family of kernels in the quick suite.
QUICK = [("sm_90", "bf16", 1, layer) for layer in ("augment", "conv4", "pool5", "fc8", "loss")]
QUICK += [("sm_90", "fp32", 1, "conv4")]


@pytest.mark.parametrize(
    ("target", "dtype", "towers", "layer"),
    [
        pytest.param(*step, layer, marks=() if (*step, layer) in QUICK else pytest.mark.slow)
        for step in STEPS
        for layer in ("augment", *NAMES, "loss")
    ],
)
def test_a_step(target: str, dtype: str, towers: int, layer: str) -> None:
    launches = [launch for launch in _step(target, dtype, towers) if launch.layer == layer]
    _check(target, launches, wide=dtype == "bf16")
    tf32 = {x.named["PRECISION"] == "tf32" for x in launches if "PRECISION" in x.named}
    # As torch's settings are: convolutions round to TF32 where there is cuDNN, products do not.
    if tf32:
        rounds = dtype == "fp32" and layer.startswith("conv") and target.startswith("sm_")
        assert tf32 == {rounds}


@pytest.mark.slow
@pytest.mark.parametrize("towers", [1, 2])
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "sm_120", "gfx942"])
def test_narrow_momentum(target: str, towers: int) -> None:
    events = record_step(target, 128, towers=towers, momentum_dtype="bf16").events
    launches = [e.launch for e in events if e.launch is not None and e.launch.named.get("ROUND")]
    assert {x.layer for x in launches} == {"fc6", "fc7", "fc8"}
    _check(target, launches)

    def round_alone() -> None:  # where replicas store gradients
        x, rng = torch.empty(4096, 9216 // towers), torch.empty(5, dtype=torch.int64)
        round_stochastically(x, rng, torch.empty(x.shape, dtype=torch.bfloat16))

    _check(target, offline.record(target, round_alone))


# Target, dtype and batch of a layer by autograd. At batch 32 tiles hold several pixels, and their
# rows are masked; at batch 1 an integer argument that equals 1 is a constant to Triton.
LAYERS = [
    *(("sm_90", torch.bfloat16, 128, layer) for layer in NAMES),
    *((target, torch.bfloat16, 128, layer) for target in ("sm_80", "gfx942") for layer in NAMES),
    *(("sm_80", torch.float16, 128, layer) for layer in NAMES),
    *((target, torch.float32, 128, layer) for target in ("sm_80", "sm_90") for layer in NAMES),
    *(("sm_80", torch.bfloat16, 32, layer) for layer in ("conv2", "conv4", "fc6")),
    *(("sm_90", torch.bfloat16, 1, layer) for layer in NAMES),
]


@pytest.mark.parametrize("layer", sampled(LAYERS, 1000, first=8))
def test_a_layer_by_autograd(layer: tuple[str, torch.dtype, int, str]) -> None:
    target, dtype, batch, name = layer
    wide = batch == 128 and dtype != torch.float32
    _check(target, offline.record(target, call(name, batch, dtype)), wide)


@pytest.mark.slow
def test_dropout_inside_a_product() -> None:
    """A large batch fills the GPU without a split, and the product draws the mask itself."""
    launches = offline.record("sm_90", call("fc6", 1024, torch.bfloat16))
    _check("sm_90", launches)
    assert any(x.named.get("DROPOUT") and x.named["SPLIT"] == 1 for x in launches)


def _smallest_sizes() -> None:
    """Every integer argument that can be 1 is 1."""
    for dtype in (torch.float32, torch.bfloat16):
        for channels in (1, 8):
            x = torch.empty(1, channels, 1, 1, dtype=dtype, requires_grad=True)
            w = torch.empty(1, channels, 1, 1, dtype=dtype, requires_grad=True)
            b = torch.empty(1, dtype=dtype, requires_grad=True)
            fk.conv2d_relu(x, w, b).sum().backward()
            fk.lrn_max_pool2d(x, kernel_size=1, stride=1).sum().backward()
            fk.lrn_max_pool2d(x.expand(1, channels, 3, 3)).sum().backward()
            fk.max_pool2d(x, kernel_size=1, stride=1).sum().backward()
            for inputs in (1, 4096):
                x, w = (torch.empty(1, inputs, dtype=dtype, requires_grad=True) for _ in range(2))
                rng = torch.empty(2, dtype=torch.int64)
                for relu in (True, False):
                    y = fk.linear_relu_dropout(
                        x, w, b, relu=relu, rng=rng, row_offset=1, feature_offset=1
                    )
                    y.sum().backward()


@pytest.mark.slow
def test_the_smallest_sizes() -> None:
    for launch in offline.record("sm_90", _smallest_sizes):
        offline.compile_launch(launch, "sm_90")


def _lrn_of_size(size: int) -> None:
    x = torch.empty(2, 64, 5, 5, requires_grad=True)
    fk.lrn_max_pool2d(x, size=size).sum().backward()


@pytest.mark.slow
def test_the_code_does_not_grow_with_the_window_of_lrn() -> None:
    lengths = {}
    for size in (21, 64, 10_001):
        launches = offline.record("sm_90", lambda size=size: _lrn_of_size(size))
        made = [offline.read(offline.compile_launch(launch, "sm_90")) for launch in launches]
        lengths[size] = [len(code.instructions) for code in made]
    for size in (64, 10_001):
        assert all(map(int.__le__, lengths[size], lengths[21])), lengths


@triton.jit
def _copy_kernel(x_ptr, y_ptr, n, BLOCK: triton.language.constexpr):
    offs = triton.language.program_id(0) * BLOCK + triton.language.arange(0, BLOCK)
    x = triton.language.load(x_ptr + offs, mask=offs < n)
    triton.language.store(y_ptr + offs, x, mask=offs < n)


def _copy(n: int, offset: int = 0) -> Launch:
    x = torch.empty(n + offset, device="meta")[offset:]
    return Launch("", "", _copy_kernel, (1,), [x, x, n, 512], {})


def test_a_launch_is_specialised_as_on_a_gpu() -> None:
    def loads(launch: Launch) -> Any:
        return offline.read(offline.compile_launch(launch, "sm_80")).count(r"LDG\.E\.128")

    assert loads(_copy(4096)) == 1
    assert loads(_copy(4097)) == 0, "a size that 16 does not divide has narrow loads"
    assert loads(_copy(4096, offset=1)) == 0, "a tensor not at 16 bytes has narrow loads"


def test_launches_of_one_code_share_it() -> None:
    first, second = (offline.compile_launch(_copy(n), "sm_80") for n in (4096, 8192))
    assert first is second
    assert offline.read(first) is offline.read(second)
    assert offline.compile_launch(_copy(4096), "sm_90") is not first


def test_a_driver_is_put_back() -> None:
    driver = triton.runtime.driver
    before = driver._active
    with pytest.raises(ZeroDivisionError), fake_driver("sm_90"):
        assert driver.active.get_current_target().arch == 90
        with fake_driver("gfx942"):
            assert driver.active.get_current_target().backend == "hip"
        assert driver.active.get_current_target().arch == 90
        raise ZeroDivisionError
    assert driver._active is before


@pytest.mark.parametrize(
    "function", [fake_driver("sm_91").__enter__, lambda: offline.record("sm_91", int)]
)
def test_an_unknown_target(function: Any) -> None:
    with pytest.raises(ValueError, match=r"^target: expected one of sm_80, .*, got 'sm_91'$"):
        function()


def test_an_expanded_tensor_is_not_described_to_the_memory_accelerator() -> None:
    def tma(rows: int) -> list[bool]:
        def step() -> None:
            x, w = (torch.empty(n, 64, dtype=torch.bfloat16) for n in (rows, 64))
            fk.linear_relu_dropout(x.expand(128, 64), w, p=0.0)

        return [launch.named["TMA"] for launch in offline.record("sm_90", step)]

    assert tma(rows=128) == [True]
    assert tma(rows=1) == [False]
