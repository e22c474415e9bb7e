"""GPUs as data: what a kernel is held against when no GPU is there.

Peaks are the makers' figures for dense products; the rates are what a well-written kernel is
assumed to reach of them, the same shares for every GPU whose rates nobody has reported to us.

Makers print some figures otherwise than they stand here. NVIDIA's sheets for HGX B200 and GeForce
give products with 2:4 sparsity, twice the dense ones, and for GeForce with float16 sums, twice
those with the float32 sums of these kernels: 838 TFLOP/s of an RTX 5090 become 209.5. NVIDIA's
first sheets for B200 said 8 TB/s, the present one says 7.7; 148 processors stand in others'
listings of it, not in the sheet. Each peak is processors x operations a cycle at the clock its
maker prints (B200, for which none is printed: 1.86 GHz).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class GPU:
    """One GPU."""

    name: str  # as its maker calls it
    target: str  # of ``fastalex.common.compile.TARGETS``, what its kernels are compiled for
    processors: int  # streaming multiprocessors, or compute units
    tensor_flops: int  # dense operations in 16 bits of a processor in a cycle, 2 a multiply-add
    peak_tflops: dict[str, float]  # dense, by element type, float32 without TF32
    peak_bandwidth: float  # of its memory, TB/s
    tflops: float  # in 16 bits, assumed to be reached
    bandwidth: float  # TB/s, assumed to be reached
    shared: int  # bytes of shared memory (LDS) of a processor
    threads: int  # resident threads of a processor
    source: str  # where the maker's figures stand

    @property
    def clock(self) -> float:
        """Cycles a second, at which the processors reach the peak."""
        return 1e12 * self.peak_tflops["bf16"] / (self.processors * self.tensor_flops)

    def flops(self, dtype: str) -> float:
        """Operations a second assumed to be reached on ``dtype``."""
        share = self.tflops / self.peak_tflops["bf16"]
        return 1e12 * share * self.peak_tflops[dtype]

    def seconds(self, flops: float, size: float, dtype: str) -> float:
        """The longer of computing ``flops`` and moving ``size`` bytes."""
        return max(flops / self.flops(dtype), size / (1e12 * self.bandwidth))


def _peaks(half: float, single: float) -> dict[str, float]:
    return {"bf16": half, "fp16": half, "tf32": half / 2, "fp32": single}


GPUS = {
    "h100": GPU(
        "NVIDIA H100 SXM", "sm_90", 132, 4096, _peaks(989.4, 66.9), 3.35, 800.0, 3.0,
        228 << 10, 2048, "NVIDIA H100 Tensor Core GPU Architecture white paper, table 2",
    ),
    "a100": GPU(
        "NVIDIA A100 SXM 80 GB", "sm_80", 108, 2048, _peaks(312.0, 19.5), 2.039, 270.0, 1.7,
        164 << 10, 2048, "NVIDIA A100 80GB data sheet; Ampere architecture white paper, table 4",
    ),
    "b200": GPU(
        "NVIDIA B200", "sm_100", 148, 8192, _peaks(2250.0, 75.0), 7.7, 1800.0, 6.9,
        228 << 10, 2048, "NVIDIA HGX platform data sheet, HGX B200; CUDA Blackwell tuning guide",
    ),
    "rtx3090": GPU(
        "NVIDIA GeForce RTX 3090", "sm_86", 82, 512, _peaks(71.2, 35.6), 0.936, 57.0, 0.84,
        100 << 10, 1536, "NVIDIA Ampere GA102 GPU Architecture white paper, table of the RTX 3090",
    ),
    "rtx4090": GPU(
        "NVIDIA GeForce RTX 4090", "sm_89", 128, 512, _peaks(165.2, 82.6), 1.008, 132.0, 0.9,
        100 << 10, 1536, "NVIDIA Ada GPU Architecture white paper, appendix A",
    ),
    "rtx5090": GPU(
        "NVIDIA GeForce RTX 5090", "sm_120", 170, 512, _peaks(209.5, 104.8), 1.792, 168.0, 1.6,
        100 << 10, 1536, "NVIDIA RTX Blackwell GPU Architecture white paper, appendix A",
    ),
    "mi300x": GPU(
        "AMD Instinct MI300X", "gfx942", 304, 2048, _peaks(1307.4, 163.4), 5.3, 1050.0, 4.7,
        64 << 10, 2048, "AMD Instinct MI300X data sheet; ROCm docs, MI300 microarchitecture",
    ),
}  # fmt: skip
