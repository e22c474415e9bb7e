"""Every launch of a step with its machine code read: the rows of the roofline report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from fastalex.inspection import cost, offline, sass, ttir
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
        issue_seconds: until the last program has issued its instructions.
        read, written: bytes, every tensor once.
        updated: of them, those of weights and velocities where a launch applies a gradient.
        flops: done, padding included.
        floor, floor_size, floor_flops: of the pass, seconds, bytes and operations.
        bound: seconds that its bytes and operations take at the rates assumed.
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
    issue_seconds: float | None = None
    read: int = 0
    written: int = 0
    updated: int = 0
    flops: float = 0.0
    floor: float | None = None
    floor_size: float | None = None
    floor_flops: float | None = None
    bound: float = 0.0


def inspect(step: Step, gpu: GPU, dtype: str) -> list[Row]:
    """Read the machine code of every launch of ``step`` for ``gpu``.

    Args:
        step: recorded for ``gpu.target``.
        gpu: one of ``fastalex.inspection.gpus.GPUS``.
        dtype: of the products, as the step was recorded.
    """
    rows = []
    for event in step.events:
        if event.launch is None:
            row = Row(event.layer, event.phase, event.name, read=event.read, written=event.written)
        else:
            row = read_launch(event, event.launch, step.layers.get(event.layer), gpu)
        row.bound = gpu.seconds(row.flops, row.read + row.written, dtype)
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
            row.floor = gpu.seconds(row.floor_flops, row.floor_size, dtype)
            row.useful = share * floor.useful / row.flops if row.flops else None
            if row.waves is not None:
                row.waves /= cost.tap_share(step.layers[name])
    return rows


def read_launch(event: Event, launch: Launch, layer: Layer | None, gpu: GPU) -> Row:
    """One launch, as far as its machine code and its arguments tell."""
    compiled = offline.compile_launch(launch, gpu.target)
    code, ir = offline.read(compiled), ttir.read(compiled.asm["ttir"])
    warps = int(compiled.metadata.num_warps)
    assert launch.grid is not None
    row = Row(
        event.layer, event.phase, event.name, _role(event, launch, ir, layer), launch.grid,
        warps, code.registers, code.shared, code.spills, tile=ir.tile(),
    )  # fmt: skip
    sizes = _add_traffic(row, launch.named, ir)
    _add_widths(row, sass.accesses(code.instructions), ir, sizes)
    loops = sass.loops(code.instructions)
    amd = gpu.target.startswith("gfx")
    work = ir.work(launch.grid, launch.named)
    row.loop = _main_loop(loops, ir, work, warps, gpu)
    if work is None:
        return row
    row.flops = float(sum(w.flops for w in work))
    executed = _executed(len(code.instructions), loops, work)
    if layer is None or amd:
        return row
    slots = cost.resident(gpu, code.registers, code.shared, warps)
    if row.loop is not None:
        cycles = [w.flops / gpu.tensor_flops for w in work]
        row.waves = sum(cycles) / gpu.processors / cost.schedule(gpu, cycles, slots)
    if executed is not None:
        row.instructions = 32 * warps * sum(executed) / torch.Size(layer.input).numel()
        issued = [warps * each / _SCHEDULERS for each in executed]
        row.issue_seconds = cost.schedule(gpu, issued, slots) / gpu.clock
    return row


def _executed(
    total: int, loops: Sequence[list[sass.Instruction]], work: Sequence[ttir.Work]
) -> list[float] | None:
    """Instructions that one warp of each program runs; None with several loops.

    Both sides of a branch count.
    """
    real = [len(loop) for loop in loops if len(loop) > _WAITING]
    if not real and all(max(w.turns, default=0) <= 1 for w in work):
        return [total] * len(work)
    if len(real) != 1 or len(work[0].turns) != 1:
        return None
    return [total + real[0] * (w.turns[0] - 1) for w in work]


def _add_traffic(row: Row, arguments: dict[str, Any], ir: ttir.Code) -> dict[str, tuple[int, int]]:
    """Count every tensor that is read once, and every one that is written.

    Returns:
        The bytes of each argument, and of an element of it.
    """
    sizes: dict[str, tuple[int, int]] = {}
    seen: set[tuple[int, int, bool]] = set()
    accesses = [(name, False) for name in sorted(ir.reads)]
    for name, store in [*accesses, *((name, True) for name in sorted(ir.writes))]:
        tensor = tensor_of(arguments.get(name))
        if tensor is None:
            continue
        sizes[name] = tensor.nbytes, tensor.element_size()
        # Two descriptors of one tensor, in blocks of two sizes, share its bytes.
        same = (tensor.untyped_storage()._cdata, int(tensor.storage_offset()), store)
        if same in seen:
            continue
        seen.add(same)
        row.written += tensor.nbytes * store
        row.read += tensor.nbytes * (not store)
        row.updated += tensor.nbytes * ("rate_ptr" in arguments and name in _UPDATED)
    return sizes


def _add_widths(
    row: Row, accesses: Sequence[sass.Access], ir: ttir.Code, sizes: dict[str, tuple[int, int]]
) -> None:
    """The widths of accesses to what carries a share of the bytes, or to what is not known."""
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
