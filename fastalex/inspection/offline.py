"""Record launches for GPUs that are not here, and read the machine code that comes out.

    for launch in record("sm_90", step):                # every launch of step(), none made
        code = read(compile_launch(launch, "sm_90"))    # on a machine without a GPU
        print(launch.name, launch.grid, code.registers, code.shared, code.spills)

NVIDIA's code is read with the disassemblers in Triton's wheel, AMD's from its assembly. Import the
kernels without ``TRITON_INTERPRET``: an interpreted kernel has no machine code.
"""

from __future__ import annotations

import functools
import hashlib
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton.runtime.cache import get_cache_manager

from fastalex.common.compile import TARGETS, compile_launch, record
from fastalex.inspection import sass
from fastalex_kernels.common.program import Launch

__all__ = ["TARGETS", "Launch", "MachineCode", "compile_launch", "read", "record"]


class MachineCode:
    """What a compiler made of one kernel.

    Attributes:
        registers: 32-bit registers a thread holds.
        stack: bytes of local memory a thread holds, 0 where nothing is spilled.
        spills: instructions that move registers to or from local memory.
        shared: bytes of shared memory a program holds.
        assembly: the instructions as text.
        instructions: the same, one by one.
    """

    def __init__(self, compiled: Any) -> None:
        self.shared = int(compiled.metadata.shared)
        if "amdgcn" in compiled.asm:
            self.assembly = str(compiled.asm["amdgcn"])
            self.registers, self.stack, self.spills = (
                int(re.findall(rf"\.{field}:\s+(\d+)", self.assembly)[0])
                for field in ("vgpr_count", "private_segment_fixed_size", "vgpr_spill_count")
            )
            self.instructions = sass.parse(self.assembly)
            return
        usage = _read_cubin(compiled, triton.knobs.nvidia.cuobjdump, "--dump-resource-usage")
        self.registers, self.stack = (
            int(re.findall(rf"\b{field}:(\d+)", usage)[0]) for field in ("REG", "STACK")
        )
        self.assembly = _read_cubin(compiled, triton.knobs.nvidia.nvdisasm, "-g", "-c", "-ndf")
        self.instructions = sass.parse(self.assembly)
        self.spills = self.count(r"(LDL|STL)\b")

    def count(self, pattern: str) -> int:
        """How many instructions begin with a match of the regular expression ``pattern``."""
        return sass.count(self.instructions, pattern)


def _read_cubin(compiled: Any, tool: Any, *options: str) -> str:
    """What one of NVIDIA's tools prints about a kernel; kept in Triton's cache beside it."""
    cubin: bytes = compiled.asm["cubin"]
    command = " ".join((tool.version, Path(tool.path).name, *options)).encode()
    cache = get_cache_manager(hashlib.sha256(command + cubin).hexdigest())
    known = cache.get_file("listing")
    if known is None:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(cubin)
            file.flush()
            listing = subprocess.check_output([tool.path, *options, file.name])
        known = cache.put(listing, "listing")
    return Path(known).read_text()


@functools.cache
def read(compiled: Any) -> MachineCode:
    """Registers, memory and instructions of a compiled kernel."""
    return MachineCode(compiled)
