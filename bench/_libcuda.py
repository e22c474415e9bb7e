"""A CUDA driver that runs nothing, so that Triton's own launcher works where there is no GPU.

Kernels are really compiled. It belongs into a process of its own: what takes it for the driver
keeps it.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import driver as nvidia
from triton.runtime.driver import driver

_NO_OPS = """
    cuCtxGetDevice cuCtxGetLimit cuCtxSetCurrent cuCtxSetLimit cuDeviceGet cuFuncSetAttribute
    cuDevicePrimaryCtxRetain cuDriverGetVersion cuFuncSetCacheConfig cuGetErrorString
    cuModuleLoadData cuModuleUnload cuOccupancyMaxActiveClusters cuPointerGetAttribute
    cuStreamIsCapturing cuTensorMapEncodeIm2col cuTensorMapEncodeTiled cuInit cuDeviceGetCount
"""
_SOURCE = """
#include <stdint.h>
static int launches, early_launches;
static uint64_t context = 1, function = 16;
int launched(void) { return launches; }
int cuCtxGetCurrent(void **c) { *c = &context; return 0; }
int cuModuleGetFunction(void **f, void *m, const char *name) { *f = &function; return 0; }
int cuFuncGetAttribute(int *value, int what, void *f) { *value = what ? 0 : 1024; return 0; }
int cuDeviceGetAttribute(int *value, int what, int device) { *value = 227 << 10; return 0; }
typedef struct { uint32_t id; char rest[68]; } attribute;
typedef struct { uint32_t sizes[7]; void *stream; attribute *attributes; uint32_t count; } config;
int early(void) { return early_launches; }
int cuLaunchKernelEx(const config *c) {
    launches++;
    for (uint32_t i = 0; i < c->count; i++) early_launches += c->attributes[i].id == 6;
    return 0;
}
"""


class StubDriver(nvidia.CudaDriver):  # type: ignore[misc]
    """Triton's driver for an H100 whose CUDA functions do nothing.

    Args:
        folder: where the library of those functions is built.

    Raises:
        RuntimeError: where there is no C compiler, or another library was loaded before.
    """

    def __init__(self, folder: Path) -> None:
        if shutil.which(os.environ.get("CC", "gcc")) is None:
            raise RuntimeError("needs a C compiler")
        source, library = folder / "cuda.c", folder / "libcuda.so.1"
        no_ops = "".join(f"int {name}(void) {{ return 0; }}\n" for name in _NO_OPS.split())
        source.write_text(_SOURCE + no_ops)
        options = ["-O2", "-w", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1"]
        command = [os.environ.get("CC", "gcc"), *options, "-o", str(library), str(source)]
        subprocess.run(command, check=True)
        self.library: Any = ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
        os.environ["TRITON_LIBCUDA_PATH"] = str(folder)
        super().__init__()
        self.get_current_device, self.get_current_stream = lambda: 0, lambda device: 0
        driver.set_active(self)

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("meta")

    @property
    def launched(self) -> tuple[int, int]:
        """How many kernels were launched, and how many of them may start early."""
        return int(self.library.launched()), int(self.library.early())
