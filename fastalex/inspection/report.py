"""Every launch of a step with its machine code read: the rows of the roofline report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from fastalex.inspection import cost, forecast, offline, sass, ttir
from fastalex.inspection.gpus import GPU
from fastalex.inspection.record import Event, Layer, Step
from fastalex_kernels.common.program import Launch, tensor_of

_WAITING = 8  # instructions of a loop that only waits, at most
_SCHEDULERS = 4  # of a processor, each an instruction a cycle
_WIDE_SHARE = 0.01  # of a launch's bytes: below it, how wide an access is doesn't matter
_UPDATED = {  # of a kernel that applies a gradient
    f"{of}{name}_ptr" for of in ("", "bias_") for name in ("w", "v", "operand")
}


@dataclass
class MainLoop:
    """The loop of a kernel that is most filled with products.

    Attributes:
        product: the tensor instruction.
        instructions: as many.
        issue_ratio: see ``fastalex.inspection.sass``; None where products don't carry their size.
        drains, barriers, fences: waits for all products, BAR.SYNC, and memory barriers.
        register_loads: loads from global memory that go through registers.
        turns: of all programs together.
        turn_flops, turn_bytes: of the products of one turn, and of their operands.
        tensor_cycles: of the products of one turn; 0 where they don't carry their size.
        shared_bytes: that one turn moves to and from shared memory.
        number: of the loop in the intermediate code.
    """

    product: str
    instructions: int
    issue_ratio: float | None
    drains: int
    barriers: int
    fences: int
    register_loads: int
    turns: int | None
    turn_flops: int
    turn_bytes: int
    tensor_cycles: float
    shared_bytes: float
    number: int | None

    @property
    def loaded(self) -> int | None:
        """Bytes that all turns load into shared memory."""
        return None if self.turns is None else self.turns * self.turn_bytes

    @property
    def shared_ratio(self) -> float | None:
        """Cycles of the tensor cores over those of shared memory in a turn."""
        cycles = self.shared_bytes / forecast.SHARED_BYTES
        return self.tensor_cycles / cycles if cycles and self.tensor_cycles else None


class Traffic(NamedTuple):
    """A tensor that a launch reads or writes, once.

    Args:
        name: of the kernel's argument.
        key: what stands for the tensor in every launch of a step.
        size: bytes.
        moved: those of them that no argument before has read or written.
        itemsize: bytes of an element.
        store: whether it is written.
    """

    name: str
    key: tuple[int, int]
    size: int
    moved: int
    itemsize: int
    store: bool


@dataclass
class Row:
    """One launch, or one operator of torch's; None where a figure doesn't apply.

    Attributes:
        layer, phase, name: as in ``Event``.
        role: ``"forward"``, ``"input"``, ``"weight"`` or ``"backward"`` where it does that pass.
        grid: programs along the axes.
        warps, registers, shared, spills: of a program, of a thread, bytes of a program, and
            instructions that move registers to or from local memory.
        loads, stores: widths in bytes of the accesses to what carries a share of the bytes,
            ``"TMA"`` for the tensor memory accelerator.
        narrow: how many times narrower than it could be the narrowest of them is.
        tile: rows and columns of the result that a program holds.
        loop: the loop with the products.
        useful: operations on real data over those done.
        waves: of the tensor cores' time until the last program ends, over the share of taps that
            are not skipped.
        instructions: of all threads, for each element of the layer's input.
        issue_cycles: until the last program has issued its instructions.
        read, written: bytes, every tensor once.
        updated: of them, those of weights and velocities where a launch applies a gradient.
        flops: done, padding included.
        floor, floor_size, floor_flops: of the pass, seconds, bytes and operations.
        estimate: its seconds; None on a GPU for which nothing is assumed.
    """

    layer: str
    phase: str
    name: str
    role: str | None = None
    grid: tuple[int, ...] | None = None
    warps: int | None = None
    registers: int | None = None
    shared: int | None = None
    spills: int | None = None
    loads: list[str] = field(default_factory=list)
    stores: list[str] = field(default_factory=list)
    narrow: float = 1.0
    tile: tuple[int, int] | None = None
    loop: MainLoop | None = None
    useful: float | None = None
    waves: float | None = None
    instructions: float | None = None
    issue_cycles: float | None = None
    read: int = 0
    written: int = 0
    updated: int = 0
    flops: float = 0.0
    floor: float | None = None
    floor_size: float | None = None
    floor_flops: float | None = None
    estimate: forecast.Estimate | None = None


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
            found = read_launch(event, event.launch, step.layers.get(event.layer), gpu)
            row = found.row
            terms = [
                _terms(found, gpu, rates, cache, dtype)
                for rates, cache in zip(assumed, caches, strict=True)
            ]
        if assumed:
            row.estimate = forecast.estimate(assumed, terms)
        rows.append(row)
    train = any(event.phase == "backward" for event in step.events)
    floors = cost.floors(step.layers, 4 if dtype == "fp32" else 2, train)
    for (name, role), floor in floors.items():
        made_by = [row for row in rows if (row.layer, row.role) == (name, role)]
        total = sum(row.flops for row in made_by)
        # One launch makes a pass, unless its product is made in pieces.
        for row in [row for row in made_by if row.flops] if total else made_by[:1]:
            share = row.flops / total if total else 1.0
            row.floor_size, row.floor_flops = share * floor.size, share * floor.flops
            row.floor = gpu.seconds(row.floor_flops, row.floor_size, _rounded(row, dtype))
            row.useful = share * floor.useful / row.flops if row.flops else None
            if row.waves is not None:
                row.waves /= cost.tap_share(step.layers[name])
    return rows


class Found(NamedTuple):
    """A launch as it was read.

    Args:
        row: of the report.
        traffic: the tensors that it reads and writes.
        work: of each program; None where it depends on values in memory.
        slots: programs that a processor holds at once.
    """

    row: Row
    traffic: list[Traffic]
    work: list[ttir.Work] | None
    slots: int


def _terms(
    found: Found, gpu: GPU, rates: forecast.Rates, cache: forecast.L2, dtype: str
) -> dict[str, float]:
    """What limits a launch, with ``cache`` as the launches before left it."""
    row, loop = found.row, found.row.loop
    memory = float(row.written)
    for x in sorted(found.traffic, key=lambda x: x.store):
        if x.moved and not cache.touch(x.key, x.size) and not x.store:
            memory += x.moved
    if loop is None or found.work is None or loop.number is None or not loop.tensor_cycles:
        terms = forecast.stream(
            rates, float(row.read + row.written), memory, row.issue_cycles or 0.0
        )
        if row.flops:  # without tensor cores
            terms["flops"] = row.flops / gpu.flops(dtype)
        return terms
    issue = loop.instructions * (row.warps or 0) / _SCHEDULERS
    turn = forecast.Turn(
        loop.tensor_cycles, loop.shared_bytes, issue, loop.turn_bytes, bool(loop.drains)
    )
    turns = [w.turns[loop.number] for w in found.work]
    return forecast.product(gpu, rates, turn, turns, found.slots, memory)


def read_launch(event: Event, launch: Launch, layer: Layer | None, gpu: GPU) -> Found:
    """One launch, as far as its machine code and its arguments tell."""
    compiled = offline.compile_launch(launch, gpu.target)
    code, ir = offline.read(compiled), ttir.read(compiled.asm["ttir"])
    warps = int(compiled.metadata.num_warps)
    assert launch.grid is not None
    row = Row(
        event.layer, event.phase, event.name, _role(event, launch, ir, layer), launch.grid,
        warps, code.registers, code.shared, code.spills, tile=ir.tile(),
    )  # fmt: skip
    traffic = _traffic(launch.named, ir)
    row.read = sum(x.moved for x in traffic if not x.store)
    row.written = sum(x.moved for x in traffic if x.store)
    if "rate_ptr" in launch.named:
        row.updated = sum(x.moved for x in traffic if x.name in _UPDATED)
    _add_widths(row, sass.accesses(code.instructions), ir, traffic)
    loops = sass.loops(code.instructions)
    work = ir.work(launch.grid, launch.named)
    slots = cost.resident(gpu, code.registers, code.shared, warps)
    bodies = [code.instructions[loop.start : loop.stop] for loop in loops]
    row.loop = _main_loop(bodies, ir, work, warps, gpu)
    if work is None:
        return Found(row, traffic, work, slots)
    row.flops = float(sum(w.flops for w in work))
    if layer is None or gpu.target.startswith("gfx"):
        return Found(row, traffic, work, slots)
    if row.loop is not None:
        cycles = [w.flops / gpu.tensor_flops for w in work]
        row.waves = sum(cycles) / gpu.processors / cost.schedule(gpu, cycles, slots)
    executed = _executed(len(code.instructions), loops, work)
    if executed is not None:
        row.instructions = 32 * warps * sum(executed) / torch.Size(layer.input).numel()
        issued = [warps * each / _SCHEDULERS for each in executed]
        row.issue_cycles = cost.schedule(gpu, issued, slots)
    return Found(row, traffic, work, slots)


def _rounded(row: Row, dtype: str) -> str:
    """What the products of a launch are computed in, in a step of ``dtype``."""
    return "tf32" if row.loop is not None and "TF32" in row.loop.product else dtype


def _executed(total: int, loops: Sequence[range], work: Sequence[ttir.Work]) -> list[float] | None:
    """Instructions that one warp of each program runs; None where loops are not the IR's.

    Both sides of a branch count.
    """
    real = [loop for loop in loops if len(loop) > _WAITING]
    if not real and all(max(w.turns, default=0) <= 1 for w in work):
        return [total] * len(work)
    if len(real) != len(work[0].turns):
        return None
    straight, *own = sass.lengths(total, real)
    return [straight + sum(map(int.__mul__, own, w.turns)) for w in work]


def _traffic(arguments: dict[str, Any], ir: ttir.Code) -> list[Traffic]:
    """The tensors that are read and those that are written, by each argument.

    Two descriptors of one tensor, in blocks of two sizes, share its bytes: only the first has them.
    """
    found: list[Traffic] = []
    seen: set[tuple[tuple[int, int], bool]] = set()
    accesses = [(name, False) for name in sorted(ir.reads)]
    for name, store in [*accesses, *((name, True) for name in sorted(ir.writes))]:
        tensor = tensor_of(arguments.get(name))
        if tensor is not None:
            key = tensor.untyped_storage()._cdata, int(tensor.storage_offset())
            moved = 0 if (key, store) in seen else tensor.nbytes
            found.append(Traffic(name, key, tensor.nbytes, moved, tensor.element_size(), store))
            seen.add((key, store))
    return found


def _add_widths(
    row: Row, accesses: Sequence[sass.Access], ir: ttir.Code, traffic: Sequence[Traffic]
) -> None:
    """The widths of accesses to what carries a share of the bytes, or to what is not known."""
    sizes = {x.name: (x.size, x.itemsize) for x in traffic}
    least = _WIDE_SHARE * sum(size for size, _ in sizes.values())
    found: dict[tuple[bool, str], set[str]] = {}
    for access in accesses:
        for name in ir.at(access.line, access.store) & set(sizes) or {"?"}:
            if name == "?" or sizes[name][0] >= least:
                found.setdefault((access.store, name), set()).add(access.label)
    for (_, name), labels in found.items():
        widest = min(8 * sizes.get(name, (0, 2))[1], 16)
        widths = [int(label) for label in labels if label != "TMA"]
        if row.layer.startswith("pool") and name == "x_ptr" and max(widths) == 16:
            widths = [w for w in widths if w != 4]  # the neighbouring channels of a chunk
        row.narrow = max([row.narrow, *(widest / w for w in widths)])
    row.loads, row.stores = (
        sorted(
            set().union(*(labels for (store, _), labels in found.items() if store == stores)),
            key=lambda label: (label.isdigit(), int(label) if label.isdigit() else 0),
        )
        for stores in (False, True)
    )


def _main_loop(
    loops: Sequence[list[sass.Instruction]],
    ir: ttir.Code,
    work: Sequence[ttir.Work] | None,
    warps: int,
    gpu: GPU,
) -> MainLoop | None:
    filled = [(sum(i.product for i in loop) / len(loop), loop) for loop in loops]
    share, main = max(filled, key=lambda pair: pair[0], default=(0.0, []))
    if not ir.dots or not share:
        return None
    number = max(ir.dots, key=lambda dot: ir.turn(dot.loop)[0]).loop
    turn_flops, turn_bytes = ir.turn(number)
    product = next(i.name for i in main if i.product)
    cycles = sass.tensor_cycles(main, warps, gpu.tensor_flops)
    if product.startswith("UTC"):
        cycles = turn_flops / gpu.tensor_flops
    accesses = sass.accesses(main)
    loaded = sass.shared_bytes(main, warps) + turn_bytes
    return MainLoop(
        product,
        len(main),
        len(main) * warps / _SCHEDULERS / cycles if cycles else None,
        sass.drains(main),
        sass.count(main, r"BAR\.SYNC|s_barrier"),
        sass.count(main, "MEMBAR"),
        sum(a.how == "register" and not a.store for a in accesses),
        None if work is None or number is None else sum(w.turns[number] for w in work),
        turn_flops,
        turn_bytes,
        cycles,
        loaded,
        number,
    )


def _role(event: Event, launch: Launch, ir: ttir.Code, layer: Layer | None) -> str | None:
    """Which pass through its layer a launch makes; None for one that only prepares or finishes."""
    if layer is None:
        return None
    if layer.weight is None:
        return event.phase
    if not ir.dots:
        return None
    if event.phase == "forward":
        return "forward"
    if "weight" in launch.name:
        return "weight"
    weight = torch.Size(layer.weight).numel()

    def holds(names: set[str]) -> bool:
        tensors = [tensor_of(launch.named.get(name)) for name in names]
        return any(t is not None and t.numel() == weight for t in tensors)

    return "input" if holds(ir.reads) and not holds(ir.writes) else "weight"
