"""Compile kernels for GPUs that are not here, and read the machine code that comes out.

    for launch in record("sm_90", step):                # every launch of step(), none made
        code = read(compile_launch(launch, "sm_90"))    # on a machine without a GPU
        print(launch.name, launch.grid, code.registers, code.shared, code.spills)

A kernel is compiled by Triton's own launcher, warmed up instead of run, so that it specialises as
on a GPU: on pointers and integers divisible by 16 and on integers equal to 1. NVIDIA's code is read
with the disassemblers in Triton's wheel, AMD's from its assembly.

Import the kernels without ``TRITON_INTERPRET``: an interpreted kernel has no machine code.
"""

from __future__ import annotations

import contextlib
import functools
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import triton
from torch._subclasses.fake_tensor import FakeTensorMode
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime.driver import driver
from triton.tools.tensor_descriptor import TensorDescriptor

from fastalex_kernels.common.backend import interpreted, record_launches
from fastalex_kernels.common.program import Launch


@dataclass(frozen=True)
class Target:
    """A GPU to compile for.

    Args:
        gpu: what Triton calls it.
        shared_limit: bytes of shared memory (LDS on AMD) that one program can have.
    """

    gpu: GPUTarget
    shared_limit: int


TARGETS = {
    "sm_80": Target(GPUTarget("cuda", 80, 32), 163 << 10),
    "sm_90": Target(GPUTarget("cuda", 90, 32), 227 << 10),
    "sm_100": Target(GPUTarget("cuda", 100, 32), 227 << 10),
    "sm_120": Target(GPUTarget("cuda", 120, 32), 99 << 10),
    "gfx942": Target(GPUTarget("hip", "gfx942", 64), 64 << 10),
}


@triton.jit  # type: ignore[untyped-decorator]
def _probe() -> None:
    pass


class _AbsentGPU(DriverBase):  # type: ignore[misc]
    """Answers what a launcher asks before it compiles; nothing is ever run through it."""

    def __init__(self, name: str) -> None:
        self.name = name

    def get_current_target(self) -> GPUTarget:
        return TARGETS[self.name].gpu

    def get_current_device(self) -> str:
        return f"offline {self.name}"  # the key of a kernel's cache: one for each target

    def set_current_device(self, device: Any) -> None:
        raise RuntimeError("no kernel can run on a GPU that is not here")

    def get_current_stream(self, device: Any = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("meta")

    def get_device_interface(self) -> Any:
        raise RuntimeError("no kernel can run on a GPU that is not here")

    def get_benchmarker(self) -> Any:
        raise RuntimeError("no kernel can be timed on a GPU that is not here")

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    @classmethod
    def is_active(cls) -> bool:
        return True


@contextlib.contextmanager
def fake_driver(target: str) -> Iterator[None]:
    """Make ``target``, one of ``TARGETS``, the current GPU of Triton inside the ``with`` block."""
    if target not in TARGETS:
        raise ValueError(f"target: expected one of {', '.join(TARGETS)}, got {target!r}")
    previous = driver._active  # not driver.active, which looks for a real GPU where there is none
    driver.set_active(_AbsentGPU(target))
    try:
        yield
    finally:
        driver.set_active(previous)


def without_data(launch: Launch) -> Launch:
    """The launch on meta tensors of the same shapes, strides, alignment and shared memory."""
    storages: dict[int, torch.UntypedStorage] = {}

    def bare(x: Any) -> Any:
        if isinstance(x, TensorDescriptor):
            return replace(x, base=bare(x.base))
        if not isinstance(x, torch.Tensor):
            return x
        given = x.untyped_storage()
        empty = torch.empty(given.nbytes(), dtype=torch.uint8, device="meta")
        storage = storages.setdefault(given._cdata, empty.untyped_storage())
        view = torch.empty(0, dtype=x.dtype, device="meta")
        return view.set_(storage, x.storage_offset(), x.shape, x.stride())

    return replace(launch, arguments=list(map(bare, launch.arguments)))


def record(target: str, step: Callable[[], object]) -> list[Launch]:
    """Every launch that ``step()`` would make on ``target``, in order.

    ``step`` runs on fake tensors: those it creates take no memory and hold no values, whatever
    their size, and no kernel runs.

    Args:
        target: one of ``TARGETS``.
        step: creates its tensors on the default device, then calls functions of
            ``fastalex_kernels`` (or a model made of them), backward too.
    """
    if target not in TARGETS:
        raise ValueError(f"target: expected one of {', '.join(TARGETS)}, got {target!r}")
    recorded: list[Launch] = []

    def recorder(*launch: Any) -> None:
        recorded.append(Launch.of("", "", *launch))

    with FakeTensorMode(allow_non_fake_inputs=True), record_launches(target, recorder):
        step()
    return list(map(without_data, recorded))


def check_target(target: str) -> None:
    """Compile an empty kernel.

    Raises:
        ValueError: where the installed Triton can't compile for ``target``, or interprets.
    """
    if interpreted():
        raise ValueError("TRITON_INTERPRET=1 is set: an interpreted kernel has no machine code")
    try:
        compile_launch(Launch.of("", "", _probe, (1,), (), {}), target)
    except Exception as error:  # each version has its own, from a KeyError to ptxas's message
        reason = str(error).strip().splitlines()
        raise ValueError(
            f"triton {triton.__version__} can't compile for {target}: "
            f"{reason[0] if reason else type(error).__name__}"
        ) from error


def compile_launch(launch: Launch, target: str) -> Any:
    """Triton's compiled kernel for ``launch`` on ``target``.

    Launches that run the same machine code get the same object, compiled once.
    """
    if interpreted():
        raise ValueError("offline: the kernels were imported under TRITON_INTERPRET=1, unset it")
    with fake_driver(target):
        return launch.kernel.warmup(*launch.arguments, grid=launch.grid, **launch.options)


class MachineCode:
    """What a compiler made of one kernel.

    Attributes:
        registers: 32-bit registers a thread holds.
        stack: bytes of local memory a thread holds, 0 where nothing is spilled.
        shared: bytes of shared memory a program holds.
        assembly: the instructions as text.
    """

    registers: int
    stack: int
    shared: int

    def __init__(self, compiled: Any) -> None:
        self._asm = compiled.asm
        self.shared = int(compiled.metadata.shared)

    @property
    def assembly(self) -> str:
        raise NotImplementedError

    @functools.cached_property
    def instructions(self) -> Counter[str]:
        """How often each instruction, modifiers included, stands in the assembly."""
        raise NotImplementedError

    @property
    def spills(self) -> int:
        """Instructions that move registers to or from local memory."""
        raise NotImplementedError

    def count(self, pattern: str) -> int:
        """How many instructions begin with a match of the regular expression ``pattern``."""
        return sum(n for name, n in self.instructions.items() if re.match(pattern, name))


class _NvidiaCode(MachineCode):
    def __init__(self, compiled: Any) -> None:
        super().__init__(compiled)
        usage = self._tool(triton.knobs.nvidia.cuobjdump, "--dump-resource-usage")
        self.registers, self.stack = (
            int(re.findall(rf"\b{field}:(\d+)", usage)[0]) for field in ("REG", "STACK")
        )

    def _tool(self, tool: Any, *options: str) -> str:
        with tempfile.TemporaryDirectory() as folder:
            cubin = Path(folder, "kernel.cubin")
            cubin.write_bytes(self._asm["cubin"])
            command = [tool.path, *options, str(cubin)]
            return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    @functools.cached_property
    def assembly(self) -> str:
        return self._tool(triton.knobs.nvidia.nvdisasm, "-g", "-c", "-ndf")

    @functools.cached_property
    def instructions(self) -> Counter[str]:
        guarded = r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)"
        return Counter(re.findall(guarded, self.assembly))

    @property
    def spills(self) -> int:
        return self.count(r"(LDL|STL)\b")


class _AMDCode(MachineCode):
    def __init__(self, compiled: Any) -> None:
        super().__init__(compiled)
        self.registers, self.stack = (
            self._field("vgpr_count"),
            self._field("private_segment_fixed_size"),
        )

    def _field(self, name: str) -> int:
        return int(re.findall(rf"\.{name}:\s+(\d+)", self.assembly)[0])

    @property
    def assembly(self) -> str:
        return str(self._asm["amdgcn"])

    @functools.cached_property
    def instructions(self) -> Counter[str]:
        units = r"(?m)^\s+((?:v|s|ds|global|buffer|flat|scratch)_\w+)"
        return Counter(re.findall(units, self.assembly))

    @property
    def spills(self) -> int:
        return self._field("vgpr_spill_count")


@functools.cache
def read(compiled: Any) -> MachineCode:
    """Registers, memory and instructions of a compiled kernel."""
    return (_AMDCode if "amdgcn" in compiled.asm else _NvidiaCode)(compiled)
