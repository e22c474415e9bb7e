"""Kernels whose times on an H100 SXM are published, as the forecast sees them.

Nothing in ``fastalex.inspection.forecast.ASSUMED`` was fitted to them but the low rate of L2, which
is kernel 6's. ``python -m tests.inspection.published`` prints the table.
"""

from __future__ import annotations

from typing import NamedTuple

from fastalex.common.tables import table
from fastalex.inspection import forecast
from fastalex.inspection.forecast import ASSUMED, Rates, Turn
from fastalex.inspection.gpus import GPUS

H100 = GPUS["h100"]
_FAST_CU = "github.com/pranjalssh/fast.cu at a1bb7b2, README"
_TRITON = "github.com/meta-pytorch/tritonbench/pull/894"


class Matmul(NamedTuple):
    """A product of bfloat16 matrices M x K and K x N.

    Args:
        name: as its source calls it.
        shape: M, N, K.
        tile: rows, columns and depth of a program's turn.
        columns: of one wgmma.
        slots: programs that a processor holds.
        loads: turns of loads for each turn that waits for them; 0 where they run ahead.
        cluster: programs that share each block of the second operand by multicast.
        tflops: published.
        source: where.
    """

    name: str
    shape: tuple[int, int, int]
    tile: tuple[int, int, int]
    columns: int
    slots: int
    serial: bool
    cluster: int
    tflops: float
    source: str

    @property
    def flops(self) -> float:
        m, n, k = self.shape
        return 2.0 * m * n * k

    @property
    def published(self) -> float:
        return self.flops / (1e12 * self.tflops)

    def terms(self, rates: Rates) -> dict[str, float]:
        (m, n, k), (rows, columns, depth) = self.shape, self.tile
        products = rows // 64 * columns // self.columns * depth // 16
        read = products * 2 * 16 * (64 + self.columns)
        loaded = 2 * depth * (rows + columns / self.cluster)
        turn = Turn(
            2 * rows * columns * depth / H100.tensor_flops, read + 2 * depth * (rows + columns), 0,
            loaded, self.serial,
        )  # fmt: skip
        programs = -(-m // rows) * -(-n // columns)
        memory = 2.0 * (m * k + k * n + m * n)
        return forecast.product(H100, rates, turn, [k // depth] * programs, self.slots, memory)


class Sum(NamedTuple):
    """A sum of float32 numbers: memory and nothing else."""

    name: str
    elements: int
    rate: float
    source: str

    @property
    def published(self) -> float:
        return 4.0 * self.elements / self.rate

    def terms(self, rates: Rates) -> dict[str, float]:
        return forecast.stream(rates, 4.0 * self.elements, 4.0 * self.elements, 0.0)


_BIG, _MEDIUM = (8192, 8192, 8192), (6144, 6144, 6144)
_SMALL, _WIDE = (128, 128, 64), (128, 256, 64)
KERNELS: list[Matmul | Sum] = [
    Matmul("kernel 2", _BIG, _SMALL, 64, 3, True, 1, 488.5, _FAST_CU),
    Matmul("kernel 2", _MEDIUM, _SMALL, 64, 3, True, 1, 476.6, _FAST_CU),
    Matmul("kernel 4", _BIG, _WIDE, 256, 1, False, 1, 635.4, _FAST_CU),
    Matmul("kernel 4", _MEDIUM, _WIDE, 256, 1, False, 1, 651.2, _FAST_CU),
    Matmul("kernel 6", _BIG, _WIDE, 256, 1, False, 1, 777.5, _FAST_CU),
    Matmul("kernel 7, clusters of 2", _BIG, _WIDE, 256, 1, False, 2, 799.1, _FAST_CU),
    Matmul("cuBLAS, clusters of 2 assumed", _BIG, _WIDE, 256, 1, False, 2, 797.8, _FAST_CU),
    Matmul("cuBLAS, clusters of 2 assumed", _MEDIUM, _WIDE, 256, 1, False, 2, 741.1, _FAST_CU),
    Matmul("Triton, persistent, TMA", (8192, 8192, 4096), _WIDE, 256, 1, False, 1, 665.9, _TRITON),
    Matmul("Triton, persistent, TMA", _BIG, _WIDE, 256, 1, False, 1, 673.6, _TRITON),
    Sum("sum of 2^30 float32", 1 << 30, 3.24e12, "github.com/pranjalssh/fast.cu, README"),
]


def estimates(kernel: Matmul | Sum) -> forecast.Estimate:
    """Without the gap to a next launch, which these were not timed with."""
    rates = [rates._replace(gap=0.0) for rates in ASSUMED[H100.name]]
    return forecast.estimate(rates, [kernel.terms(r) for r in rates])


def rows() -> list[list[str]]:
    """The table, a line for each kernel."""
    lines = [["kernel", "shape", "published us", "low", "middle", "high", "error", "limit"]]
    for kernel in KERNELS:
        made, true = estimates(kernel), kernel.published
        shape = "x".join(map(str, kernel.shape)) if isinstance(kernel, Matmul) else ""
        times = [f"{1e6 * x:.0f}" for x in (true, *made[:3])]
        lines.append([kernel.name, shape, *times, f"{made.middle / true - 1:+.0%}", made.limit])
    return lines


if __name__ == "__main__":
    print("\n".join(table(rows(), right=6)))
