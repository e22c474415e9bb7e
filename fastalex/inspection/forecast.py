"""How long a launch may take on a GPU: an estimate from its machine code, never a measurement.

A launch takes the longest of what it asks of the GPU, and then the next one starts:

    seconds = max(memory, L2, processors) + gap - hidden

* memory: bytes that are not in L2 any more, at the rate of HBM. A tensor is taken to be in L2 as
  long as what was touched since fits beside it.
* L2: bytes that loops load into shared memory, in all turns of all programs. The tensor memory
  accelerator does not use L1, so a block that two programs read passes twice; the columns of a
  block that its tensor does not have are zeros, and not read.
* processors: the programs, started in order, each where a place is free first. A turn of the main
  loop takes the longest of its products on the tensor cores, its bytes through shared memory, and
  the issue of its instructions; the programs of a processor share these. A turn that waits for its
  own products takes a latency besides, and one whose blocks come from HBM is no shorter than the
  time until they come over the turns that they are loaded ahead. Only other programs fill that.
* hidden: the part of the gap that a launch which starts early spends beside the one before it.

Each term is computed with three sets of rates, ``ASSUMED``, for a low, a middle and a high
estimate. ``tests/inspection/published.py`` holds the middle one to kernels with published times.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Sequence
from typing import NamedTuple

from fastalex.inspection import cost
from fastalex.inspection.gpus import GPU

SHARED_BYTES = 128  # of shared memory that a processor reads or writes in a cycle
_WAITS = 1.5  # latencies in a turn that waits for its loads, then for its products


class Rates(NamedTuple):
    """What is assumed of a GPU under load."""

    clock: float  # cycles a second of a processor
    memory: float  # bytes a second of the GPU's memory
    l2: float  # bytes a second from L2 to all processors
    l2_size: float  # bytes that L2 keeps for a later launch
    hidden: float  # seconds of the gap that pass beside the launch before, if this one starts early
    gap: float  # seconds between two launches of a CUDA graph that depend on each other
    ramp: float  # seconds in which a kernel without products fills and drains the memory system
    program: float  # cycles of a program before its first product and after its last one
    latency: float  # cycles from a load, or a product, until what waits for it goes on
    memory_latency: float  # of a load from the GPU's memory, which others use, too


# Low, middle, high. "Measured" is what github.com/RRZE-HPC/gpu-benches (commit 1038c5d) has in its
# folders gpu-l2-cache, gpu-stream, gpu-latency and gpu-small-kernels; for the H100 on an H200 or a
# GH200, whose processors and L2 are the same.
# clock: H100 1.83 GHz is the clock of the maker's 989 TFLOP/s; under the load of matrix products
#   the power limit lowers it. A100 1.41 GHz, lowered likewise.
# memory: 93, 86 and 78 % of the maker's bandwidth; A100 measured 88 %, reading and writing.
# l2: H100 9.1 TB/s is what kernel 6 of github.com/pranjalssh/fast.cu (commit a1bb7b2) loads, with
#   tiles of 128 x 256 at 777 TFLOP/s. 8.0: 9.8 measured at 1.98 GHz, reading 16 to 28 MB, are 8.4
#   at the middle clock. 6.0: Chips and Cheese measured 5.5 on an H100 PCIe, of fewer processors at
#   a lower clock (July 2023). A100: measured 5.4, at 1.41 GHz.
# l2_size: 50 and 40 MB, in two halves that may both hold a line. Measured reads become slower from
#   37 and from 28 MB on.
# gap, ramp: our assumptions. A kernel that moves 64 KB took 1.3 us of a CUDA graph, gap included,
#   on both (measured); Hazy Research measured a gap of 1.3 us on an H100 ("Look Ma, No Bubbles!",
#   May 2025).
# hidden: our assumption. Measured were 0.96 us between two empty kernels (issue 569 of github.com/
#   pegainfer-project/pegainfer), and next to nothing of kernels as long as ours: 1.00 x in
#   github.com/openxla/xla 38544, 0.99 to 1.00 x of prompts in github.com/ggml-org/llama.cpp 22522.
# latency, memory_latency: a load alone took 280 cycles (206 on the A100) from the near half of L2,
#   460 (390) from a set larger than that, 690 (552) from memory (measured); under load our
#   assumptions.
# program: our assumption, not sourced.
ASSUMED: dict[str, tuple[Rates, Rates, Rates]] = {
    "NVIDIA H100 SXM": (
        Rates(1.83e9, 3.1e12, 9.1e12, 40e6, 0.7e-6, 0.8e-6, 0.7e-6, 1800, 200, 700),
        Rates(1.70e9, 2.9e12, 8.0e12, 30e6, 0.5e-6, 1.2e-6, 1.0e-6, 2700, 330, 1000),
        Rates(1.50e9, 2.6e12, 6.0e12, 20e6, 0.0, 1.8e-6, 1.5e-6, 4000, 450, 1500),
    ),
    "NVIDIA A100 SXM 80 GB": (
        Rates(1.41e9, 1.90e12, 5.4e12, 32e6, 0.0, 0.8e-6, 0.7e-6, 1800, 200, 600),
        Rates(1.30e9, 1.75e12, 5.0e12, 24e6, 0.0, 1.2e-6, 1.0e-6, 2700, 330, 850),
        Rates(1.20e9, 1.60e12, 4.0e12, 16e6, 0.0, 1.8e-6, 1.5e-6, 4000, 450, 1300),
    ),
}


class Turn(NamedTuple):
    """What one turn of a program's main loop asks of its processor."""

    tensor: float  # cycles of the tensor cores
    shared: float  # bytes read from and written to shared memory
    issue: float  # cycles of the schedulers
    loaded: float  # bytes that come through L2
    drained: bool = False  # whether it waits for its own products
    from_memory: float = 0.0  # of the tensor of which most comes from the GPU's memory, the share
    ahead: int = 0  # turns between a load and the turn that waits for it


class Estimate(NamedTuple):
    """Seconds of a launch, and what the middle estimate is limited by."""

    low: float
    middle: float
    high: float
    limit: str


class L2:
    """Which tensors L2 still holds: those touched last, as far as they fit."""

    def __init__(self, size: float) -> None:
        self._size = size
        self._held: OrderedDict[Hashable, float] = OrderedDict()

    def touch(self, key: Hashable, size: float) -> bool:
        """Read or write a tensor; whether it was held."""
        held = self._held.pop(key, None) is not None
        self._held[key] = size
        while sum(self._held.values()) > self._size:
            self._held.popitem(last=False)
        return held


def product(
    gpu: GPU, rates: Rates, turn: Turn, turns: Sequence[int], slots: int, memory: float
) -> dict[str, float]:
    """Seconds of each thing that may limit a launch with products.

    Args:
        gpu: one of ``fastalex.inspection.gpus.GPUS``.
        rates: of ``ASSUMED``.
        turn: of its main loop.
        turns: of each program.
        slots: programs that a processor holds at once.
        memory: bytes that it moves from and to the GPU's memory.
    """
    slots = cost.taken_slots(gpu, len(turns), slots)
    asked = {
        "tensor": turn.tensor, "shared": turn.shared / SHARED_BYTES, "issue": turn.issue,
    }  # fmt: skip
    limit = max(asked, key=lambda name: asked[name])
    alone = turn.tensor + _WAITS * rates.latency if turn.drained else rates.latency
    wait = turn.from_memory * rates.memory_latency
    alone = max(alone, wait / turn.ahead) if turn.ahead else alone + wait
    shared = asked[limit] * slots
    if alone > shared:
        limit = "latency"
    each = max(shared, alone) / slots  # of a program that had a processor to itself
    end = cost.schedule(gpu, [n * each for n in turns], slots, rates.program)
    return {
        limit: end / rates.clock,
        "L2": sum(turns) * turn.loaded / rates.l2,
        "memory": memory / rates.memory,
    }


def stream(rates: Rates, moved: float, memory: float, issue: float) -> dict[str, float]:
    """Seconds of each thing that may limit a launch without products.

    Args:
        rates: of ``ASSUMED``.
        moved: bytes that it reads and writes.
        memory: those of them that move from and to the GPU's memory.
        issue: cycles until the last program has issued its instructions.
    """
    return {
        "memory": memory / rates.memory + rates.ramp,
        "L2": moved / rates.l2 + rates.ramp,
        "issue": issue / rates.clock + rates.ramp,
    }


def estimate(
    rates: Sequence[Rates], terms: Sequence[dict[str, float]], starts_early: bool = False
) -> Estimate:
    """Of the terms under each of the ``rates``."""
    low, middle, high = (
        max(t.values()) + r.gap - starts_early * r.hidden for r, t in zip(rates, terms, strict=True)
    )
    return Estimate(low, middle, high, max(terms[1], key=lambda name: terms[1][name]))
