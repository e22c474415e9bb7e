"""Every launch of a step with its machine code read: the rows of the roofline report."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from triton.tools.tensor_descriptor import TensorDescriptor

from fastalex.common.compile import compile_launch
from fastalex.inspection import cost, forecast, offline, sass, ttir
from fastalex.inspection.forecast import Rates
from fastalex.inspection.gpus import GPU
from fastalex.inspection.record import Event, Layer, Step
from fastalex_kernels.common.program import Launch, tensor_of

_WAITING = 8  # instructions of a loop that only waits, at most
_SCHEDULERS = 4  # of a processor, each an instruction a cycle
_UPDATED = {  # of a kernel that applies a gradient
    f"{of}{name}_ptr" for of in ("", "bias_") for name in ("w", "v", "operand")
}


@dataclass
class MainLoop:
    """The loop of a kernel that is most filled with products; a turn runs its body once."""

    product: str  # the tensor instruction
    instructions: int
    issue_ratio: float | None  # see sass.py; None where products don't carry their size
    drains: int  # waits for all products
    barriers: int  # BAR.SYNC
    fences: int  # memory barriers
    register_loads: int  # from global memory, that go through registers
    turns: int | None  # of all programs together
    turn_flops: int  # of a turn's products
    turn_bytes: int  # of the blocks that it loads
    tensor_cycles: float  # of a turn's products; 0 where they don't carry their size
    shared_bytes: float  # that a turn moves to and from shared memory
    loaded: int | None  # bytes that all turns read, of the blocks what lies in their tensors
    shared_ratio: float | None  # cycles of the tensor cores over those of shared memory


@dataclass
class Row:
    """One launch, or one operator of torch's; None where a figure doesn't apply."""

    layer: str
    phase: str
    name: str
    role: str | None = None  # forward, input, weight or backward, where it makes that pass
    grid: tuple[int, ...] | None = None  # programs along the axes
    warps: int | None = None  # of a program
    registers: int | None = None  # of a thread
    shared: int | None = None  # bytes of a program
    spills: int | None = None  # instructions that move registers to or from local memory
    loads: list[str] = field(default_factory=list)  # bytes, or "TMA"; the most frequent first
    stores: list[str] = field(default_factory=list)
    tile: tuple[int, int] | None = None  # rows and columns of a program's result
    loop: MainLoop | None = None
    useful: float | None = None  # operations on real data over those done
    instructions: float | None = None  # of all threads, for an element of the layer's input
    read: int = 0  # bytes, every tensor once
    written: int = 0
    updated: int = 0  # of both, weights and momentum where a gradient is applied
    flops: float = 0.0  # padding included
    floor: float | None = None  # of the pass: seconds, bytes, operations
    floor_size: float | None = None
    floor_flops: float | None = None
    starts_early: bool = False  # while the launch before it still ends
    estimate: forecast.Estimate | None = None  # None on a GPU for which nothing is assumed


def inspect(step: Step, gpu: GPU, dtype: str) -> list[Row]:
    """Read the machine code of every launch of ``step`` for ``gpu``.

    Args:
        step: recorded for ``gpu.target``.
        gpu: one of ``fastalex.inspection.gpus.GPUS``.
        dtype: of the products, as the step was recorded.
    """
    rows = []
    assumed = forecast.ASSUMED.get(gpu.name, ())
    caches = [forecast.L2(rates.l2_size) for rates in assumed]
    for event in step.events:
        if event.launch is None:
            row = Row(event.layer, event.phase, event.name, read=event.read, written=event.written)
            moved = float(event.read + event.written)
            terms = [forecast.stream(rates, moved, moved, 0.0) for rates in assumed]
        else:
            reading = Reading(event.launch, gpu)
            row = reading.row(event, step.layers.get(event.layer))
            pairs = zip(assumed, caches, strict=True)
            terms = [reading.terms(row, rates, cache, dtype) for rates, cache in pairs]
        row.starts_early = event.launch is not None and event.launch.starts_early
        row.estimate = forecast.estimate(assumed, terms, row.starts_early) if assumed else None
        rows.append(row)
    train = any(event.phase == "backward" for event in step.events)
    one_pass = {row.layer for row in rows if row.role == "backward"}
    floors = cost.floors(step.layers, 4 if dtype == "fp32" else 2, train, one_pass)
    for place, floor in floors.items():
        made_by = [row for row in rows if (row.layer, row.role) == place]
        total = sum(row.flops for row in made_by)
        # One launch makes a pass, unless its product is made in pieces.
        for row in [row for row in made_by if row.flops] if total else made_by[:1]:
            share = row.flops / total if total else 1.0
            row.floor_size, row.floor_flops = share * floor.size, share * floor.flops
            tf32 = row.loop is not None and "TF32" in row.loop.product
            row.floor = gpu.seconds(row.floor_flops, row.floor_size, "tf32" if tf32 else dtype)
            row.useful = share * floor.useful / row.flops if row.flops else None
    return rows


class Traffic(NamedTuple):
    """A tensor that a launch reads or writes, once."""

    name: str  # of the kernel's argument
    key: tuple[int, int]  # what stands for the tensor in every launch of a step
    size: int  # bytes
    moved: int  # those of them that no argument before has read or written
    store: bool


class Reading:
    """A launch, as far as its machine code, intermediate code and arguments tell."""

    def __init__(self, launch: Launch, gpu: GPU) -> None:
        compiled = compile_launch(launch, gpu.target)
        assert launch.grid is not None
        self._launch, self._gpu = launch, gpu
        self._warps = int(launch.options.get("num_warps", compiled.metadata.num_warps))
        ir = compiled.asm["ttir" if "ttir" in compiled.asm else "ttgir"]  # of Gluon's kernels
        self._code, self._ir = offline.read(compiled), ttir.read(ir)
        self._loops = sass.loops(self._code.instructions)
        self._work = self._ir.work(launch.grid, launch.named)
        self._traffic = self._find_traffic()
        # With those that only fetch.
        warps = int(compiled.metadata.num_warps)
        self._slots = cost.resident(gpu, self._code.registers, self._code.shared, warps)
        self._main = max(  # loop of the intermediate code
            self._ir.dots, key=lambda dot: self._ir.turn_flops(dot.loop), default=None
        )
        self._issue_cycles = 0.0  # until the last program has issued its instructions

    def row(self, event: Event, layer: Layer | None) -> Row:
        """The row of the launch, without its floor and its estimate."""
        code, traffic = self._code, self._traffic
        row = Row(
            event.layer, event.phase, event.name, self._role(layer), self._launch.grid,
            self._warps, code.registers, code.shared, code.spills, tile=self._ir.tile(),
            loop=self._main_loop(),
        )  # fmt: skip
        row.read = sum(x.moved for x in traffic if not x.store)
        row.written = sum(x.moved for x in traffic if x.store)
        if "rate_ptr" in self._launch.named:
            row.updated = sum(x.moved for x in traffic if x.name in _UPDATED)
        accesses = sass.accesses(code.instructions)
        row.loads, row.stores = (
            [
                label
                for label, _ in Counter(a.label for a in accesses if a.store is store).most_common()
            ]
            for store in (False, True)
        )
        row.flops = float(sum(w.flops for w in self._work or ()))
        executed = self._executed()
        if executed is not None and layer is not None:
            issued = [self._warps * each / _SCHEDULERS for each in executed]
            self._issue_cycles = cost.schedule(self._gpu, issued, self._slots)
            row.instructions = 32 * self._warps * sum(executed) / math.prod(layer.input)
        return row

    def terms(self, row: Row, rates: Rates, cache: forecast.L2, dtype: str) -> dict[str, float]:
        """What limits the launch, with ``cache`` as the launches before left it."""
        missed = {
            x.name: x.moved
            for x in sorted(self._traffic, key=lambda x: x.store)
            if x.moved and not cache.touch(x.key, x.size) and not x.store
        }
        memory = float(row.written + sum(missed.values()))
        loop, turns = row.loop, self._turns()
        if loop is None or turns is None or loop.loaded is None or not loop.tensor_cycles:
            moved = float(row.read + row.written)
            terms = forecast.stream(rates, moved, memory, self._issue_cycles)
            return terms | ({"flops": row.flops / self._gpu.flops(dtype)} if row.flops else {})
        issue = loop.instructions * self._warps / _SCHEDULERS
        # What a pipeline of n stages loads in a turn is waited for n - 2 turns later.
        ahead = 0 if loop.register_loads else max(self._launch.options["num_stages"] - 2, 0)
        turn = forecast.Turn(
            loop.tensor_cycles, loop.shared_bytes, issue, loop.loaded / sum(turns),
            bool(loop.drains), self._from_memory(missed, sum(turns)), ahead,
        )  # fmt: skip
        return forecast.product(self._gpu, rates, turn, turns, self._slots, memory)

    def _from_memory(self, missed: Mapping[str, int], turns: int) -> float:
        """The largest share of what the main loop loads of a tensor that L2 did not hold."""
        assert self._main is not None
        loads = self._ir.loaded_for(self._main.loop, self._work)
        shares = [
            sum(missed.get(n, 0) for n in x.names) / (self._read(x) * times * turns)
            for x, times in loads
        ]
        return min(max(shares, default=0.0), 1.0)

    def _read(self, load: ttir.Load) -> int:
        """Bytes of a block that are read; the tensor memory accelerator adds zeros to a tensor."""
        given = [self._launch.named.get(name) for name in load.names]
        size = load.size
        for x in (x for x in given if isinstance(x, TensorDescriptor)):
            for block, side in zip(x.block_shape, x.shape, strict=True):
                size = size * min(block, side) // block
        return size

    def _turns(self) -> list[int] | None:
        """Of the main loop, by each program."""
        if self._work is None or self._main is None or self._main.loop is None:
            return None
        return [w.turns[self._main.loop] for w in self._work]

    def _find_traffic(self) -> list[Traffic]:
        """The tensors that are read and those that are written, by each argument.

        Two descriptors of one tensor, in blocks of two sizes, share its bytes: only the first has
        them.
        """
        found: list[Traffic] = []
        seen: set[tuple[tuple[int, int], bool]] = set()
        named = self._launch.named
        for store, names in ((False, self._ir.reads), (True, self._ir.writes)):
            for name in sorted(names):
                tensor = tensor_of(named.get(name))
                if tensor is not None:
                    key = tensor.untyped_storage()._cdata, int(tensor.storage_offset())
                    moved = 0 if (key, store) in seen else tensor.nbytes
                    found.append(Traffic(name, key, tensor.nbytes, moved, store))
                    seen.add((key, store))
        return found

    def _executed(self) -> list[float] | None:
        """Instructions that one warp of each program runs; None where loops are not the IR's.

        Both sides of a branch count.
        """
        work, total = self._work, len(self._code.instructions)
        if work is None or self._gpu.target.startswith("gfx"):
            return None
        real = [loop for loop in self._loops if len(loop) > _WAITING]
        if not real and all(max(w.turns, default=0) <= 1 for w in work):
            return [total] * len(work)
        if len(real) != len(work[0].turns):
            return None
        straight, *own = sass.lengths(total, real)
        return [straight + sum(map(int.__mul__, own, w.turns)) for w in work]

    def _main_loop(self) -> MainLoop | None:
        bodies = [self._code.instructions[loop.start : loop.stop] for loop in self._loops]
        body = max(bodies, key=_share_of_products, default=None)
        if self._main is None or body is None or not _share_of_products(body):
            return None
        turn_flops = self._ir.turn_flops(self._main.loop)
        loads = self._ir.loaded_for(self._main.loop, self._work)
        turn_bytes = round(sum(x.size * times for x, times in loads))
        read = round(sum(self._read(x) * times for x, times in loads))
        product = next(i.name for i in body if i.product)
        cycles = sass.tensor_cycles(body, self._warps, self._gpu.tensor_flops)
        shared = sass.shared_bytes(body, self._warps) + turn_bytes
        if product.startswith("UTC"):
            cycles = turn_flops / self._gpu.tensor_flops
            shared += self._ir.operand_bytes(self._main.loop)
        accesses = [a for a in sass.accesses(body) if not a.store]
        turns = self._turns()
        return MainLoop(
            product,
            len(body),
            len(body) * self._warps / _SCHEDULERS / cycles if cycles else None,
            sass.drains(body),
            sass.count(body, r"BAR\.SYNC|s_barrier"),
            sass.count(body, "MEMBAR"),
            sum(a.how == "register" for a in accesses),
            None if turns is None else sum(turns),
            turn_flops,
            turn_bytes,
            cycles,
            shared,
            None if turns is None else sum(turns) * read,
            cycles / (shared / forecast.SHARED_BYTES) if shared and cycles else None,
        )

    def _role(self, layer: Layer | None) -> str | None:
        """The pass of its layer that the launch makes; None if it only prepares or finishes one."""
        launch = self._launch
        if layer is None:
            return None
        if layer.weight is None:
            return launch.phase
        if self._main is None:
            return None
        if launch.phase == "forward":
            return "forward"
        if "weight" in launch.name:
            return "weight"
        weight = math.prod(layer.weight)

        def holds(names: set[str]) -> bool:
            tensors = [tensor_of(launch.named.get(name)) for name in names]
            return any(t is not None and t.numel() == weight for t in tensors)

        if not holds(self._ir.reads):
            return "weight"
        return "backward" if holds(self._ir.writes) else "input"


def _share_of_products(body: Sequence[sass.Instruction]) -> float:
    return sum(i.product for i in body) / len(body)
