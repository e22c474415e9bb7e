"""A CUDA driver that runs nothing, so that Triton's own launcher works where there is no GPU.

Kernels are really compiled, and what Triton would hand to the driver can be looked at. It belongs
into a process of its own: what takes it for the driver keeps it.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import driver as nvidia
from triton.runtime.driver import driver

_NO_OPS = ["cuCtxGetDevice", "cuCtxGetLimit", "cuCtxSetCurrent", "cuCtxSetLimit", "cuDeviceGet", "cuFuncSetAttribute", "cuDevicePrimaryCtxRetain", "cuDriverGetVersion", "cuFuncSetCacheConfig", "cuGetErrorString", "cuModuleLoadData", "cuModuleUnload", "cuOccupancyMaxActiveClusters", "cuPointerGetAttribute", "cuStreamIsCapturing", "cuTensorMapEncodeIm2col", "cuInit", "cuDeviceGetCount"]
_SOURCE = """
#include <stdint.h>
#include <string.h>
static int launches, count, sizes[256];
static unsigned char seen[1 << 16];
static uint64_t context = 1, grid[3], stream, function = 16;
int launched(void) { return launches; }
void look(int n, const int *of) { count = n; memcpy(sizes, of, n * sizeof(int)); }
unsigned char *arguments(void) { return seen; }
uint64_t where(int i) { return i < 3 ? grid[i] : stream; }
int cuCtxGetCurrent(void **c) { *c = &context; return 0; }
int cuModuleGetFunction(void **f, void *m, const char *name) { *f = &function; return 0; }
int cuFuncGetAttribute(int *value, int what, void *f) { *value = what ? 0 : 1024; return 0; }
int cuDeviceGetAttribute(int *value, int what, int device) { *value = 227 << 10; return 0; }
int cuTensorMapEncodeTiled(
    uint64_t *map, int kind, uint32_t rank, void *address, const uint64_t *sides,
    const uint64_t *strides, const uint32_t *box, const uint32_t *steps, int a, int b, int c, int d)
{
    memset(map, 0, 128);
    map[0] = (uint64_t)address;
    map[2] = kind * 64 + rank * 16 + b;
    for (uint32_t i = 0; i < rank; i++) {
        map[3 + i] = sides[i];
        map[8 + i] = i + 1 < rank ? strides[i] : 0;
        map[11 + i] = box[i];
    }
    return 0;
}
int cuLaunchKernelEx(const uint32_t *config, void *f, void **parameters, void **extra) {
    unsigned char *end = seen;
    launches++;
    for (int i = 0; i < count; i++) {
        memcpy(end, parameters[i], sizes[i]);
        end += sizes[i];
    }
    for (int i = 0; i < 3; i++) grid[i] = config[i];
    memcpy(&stream, config + 8, 8);
    return 0;
}
"""
# By the codes of Triton's driver.c, which packs a kernel's arguments by them.
_SIZES = {1: 8, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 2, 8: 4, 9: 8, 10: 2, 11: 2, 12: 4, 13: 8, 14: 128}


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
        no_ops = "".join(f"int {name}(void) {{ return 0; }}\n" for name in _NO_OPS)
        source.write_text(_SOURCE + no_ops)
        options = ["-O2", "-w", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1"]
        command = [os.environ.get("CC", "gcc"), *options, "-o", str(library), str(source)]
        subprocess.run(command, check=True)
        self.library: Any = ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
        self.library.arguments.restype = ctypes.POINTER(ctypes.c_ubyte)
        self.library.where.restype = ctypes.c_uint64
        os.environ["TRITON_LIBCUDA_PATH"] = str(folder)
        super().__init__()
        self.get_current_device, self.get_current_stream = lambda: 0, lambda device: 0
        driver.set_active(self)

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("meta")

    def look(self, signature: Iterable[int]) -> None:
        """Keep the arguments of what is launched next, of kernels with this signature."""
        sizes = [*(_SIZES[code] for code in signature), 8, 8]  # two pointers to scratch memory
        self._length = sum(sizes)
        self.library.look(len(sizes), (ctypes.c_int * len(sizes))(*sizes))

    @property
    def launched(self) -> int:
        """How many kernels were launched."""
        return int(self.library.launched())

    @property
    def last(self) -> tuple[tuple[int, ...], int, bytes]:
        """Grid, stream and packed arguments of the last launch."""
        place = [int(self.library.where(i)) for i in range(4)]
        return tuple(place[:3]), place[3], bytes(self.library.arguments()[: self._length])
