"""Every launch of a step with its machine code read: the rows of the roofline report."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from fastalex.inspection import cost, offline, sass, ttir
from fastalex.inspection.gpus import GPU
from fastalex.inspection.record import Event, Layer, Step, tensor_of
from fastalex_kernels.common.program import Launch

_WAITING = 8  # instructions of a loop that only waits, at most
_WIDE_SHARE = 0.01  # of a launch's bytes: below it, how wide an access is doesn't matter
_UPDATED = {  # of a kernel that applies a gradient
    f"{of}{name}_ptr" for of in ("", "bias_") for name in ("w", "v", "operand")
}


@dataclass
class Row:
    """One launch, or one operator of torch's; None where a figure doesn't apply.

    Attributes:
        layer, phase, name: as in ``Event``.
        role: ``"forward"``, ``"input"``, ``"weight"`` or ``"backward"`` where it does that pass.
        grid: programs along the axes.
        registers, shared, spills, stack, warps: of a thread, bytes of a program, instructions,
            bytes of a thread, of a program.
        mma: the tensor instruction of the main loop.
        loads, stores: widths in bytes, ``"TMA"`` for the tensor memory accelerator, by argument.
        sizes, itemsizes: bytes of an argument and of an element of it.
        loop: instructions of the main loop, the one with the products.
        mma_loops: loops that hold products.
        issue_ratio: see ``fastalex.inspection.sass``.
        drains, barriers: in the main loop, waits for all products and memory barriers.
        register_operands: loads in the main loop that go through registers.
        tile: rows and columns of the result that a program holds.
        useful: operations on real data over those done.
        waves: of the tensor cores' time, over the share of taps that are not skipped.
        instructions: of all threads, for each element of the layer's input.
        issue_seconds: until the last program has issued its instructions, for a launch without
            products.
        read, written: bytes.
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
    registers: int | None = None
    shared: int | None = None
    spills: int | None = None
    stack: int | None = None
    warps: int | None = None
    mma: str | None = None
    loads: dict[str, list[str]] = field(default_factory=dict)
    stores: dict[str, list[str]] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    itemsizes: dict[str, int] = field(default_factory=dict)
    loop: int | None = None
    mma_loops: int | None = None
    issue_ratio: float | None = None
    drains: int | None = None
    barriers: int | None = None
    register_operands: int | None = None
    tile: tuple[int, int] | None = None
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

    def carriers(self) -> set[str]:
        """Arguments that carry a share of the bytes, and what isn't known to be another one's."""
        least = _WIDE_SHARE * sum(self.sizes.values())
        return {name for name, size in self.sizes.items() if size >= least} | {"?"}

    def widths(self, store: bool) -> list[str]:
        """Widths of the accesses to the arguments that carry a share of the bytes."""
        found = self.stores if store else self.loads
        widths = {width for name in self.carriers() for width in found.get(name, [])}
        return sorted(widths, key=lambda w: (w.isdigit(), int(w) if w.isdigit() else 0))


Progress = Callable[[int, int, str], None]  # kernels done, of how many, and the last one's name
_to_compile: tuple[list[Launch], str] = ([], "")  # what a forked process inherits


def _compile(i: int) -> int:
    launches, target = _to_compile
    offline.compile_launch(launches[i], target)
    return i


def compile_all(launches: list[Launch], target: str, progress: Progress) -> list[Any]:
    """Triton's compiled kernel for every launch, made by as many processes as there are cores.

    They leave what they compile in Triton's cache, from where it is read here.
    """
    global _to_compile
    workers = min(len(os.sched_getaffinity(0)), len(launches))
    if workers > 1:
        _to_compile = (launches, target)
        # The longest first, and what repeats only once.
        order = sorted(_distinct(launches), key=lambda i: "lrn" not in launches[i].name)
        context = multiprocessing.get_context("fork")
        with context.Pool(workers, signal.signal, (signal.SIGINT, signal.SIG_IGN)) as pool:
            for done, i in enumerate(pool.imap_unordered(_compile, order), 1):
                progress(done, len(order), launches[i].name)
    compiled = [offline.compile_launch(launch, target) for launch in launches]
    with ThreadPoolExecutor(workers) as threads:  # the disassembler is a program of its own
        list(threads.map(lambda kernel: offline.read(kernel).assembly, dict.fromkeys(compiled)))
    return compiled


def _distinct(launches: list[Launch]) -> list[int]:
    """The first of each set of launches that certainly share their machine code."""
    first: dict[Any, int] = {}
    for i, launch in enumerate(launches):
        arguments = [
            (x.shape, x.stride(), x.dtype, x.storage_offset()) if isinstance(x, torch.Tensor) else x
            for x in launch.arguments
        ]
        first.setdefault((launch.name, repr(arguments), repr(launch.options)), i)
    return list(first.values())


def inspect(step: Step, gpu: GPU, dtype: str, progress: Progress = lambda *_: None) -> list[Row]:
    """Compile every launch of ``step`` for ``gpu`` and read it.

    Args:
        step: recorded for ``gpu.target``.
        gpu: one of ``fastalex.inspection.gpus.GPUS``.
        dtype: of the products, as the step was recorded.
        progress: told about every kernel that was compiled.
    """
    itemsize = 4 if dtype == "fp32" else 2
    train = any(event.phase == "backward" for event in step.events)
    floors = cost.floors(step.layers, itemsize, train)
    launches = [event.launch for event in step.events if event.launch is not None]
    compiled = iter(compile_all(launches, gpu.target, progress))
    rows = []
    for event in step.events:
        if event.launch is None:
            row = Row(event.layer, event.phase, event.name, read=event.read, written=event.written)
        else:
            row = _read(event, event.launch, next(compiled), step.layers.get(event.layer), gpu)
        row.bound = gpu.seconds(row.flops, row.read + row.written, dtype)
        rows.append(row)
    for (name, role), floor in floors.items():
        made_by = [row for row in rows if (row.layer, row.role) == (name, role)]
        for row, share in _shares(made_by):
            _hold_against(row, floor, share, gpu, dtype, step.layers[name])
    return rows


def _shares(rows: list[Row]) -> list[tuple[Row, float]]:
    """The launches that make a pass, and the share of it that each makes.

    One does all of it, unless its product is made in pieces.
    """
    total = sum(row.flops for row in rows)
    if not total:
        return [(row, 1.0) for row in rows[:1]]
    return [(row, row.flops / total) for row in rows if row.flops]


def _hold_against(
    row: Row, floor: cost.Floor, share: float, gpu: GPU, dtype: str, layer: Layer
) -> None:
    row.floor_size, row.floor_flops = share * floor.size, share * floor.flops
    row.floor = gpu.seconds(row.floor_flops, row.floor_size, dtype)
    if row.flops:
        row.useful = share * floor.useful / row.flops
    if row.waves is not None and layer.weight is not None and len(layer.weight) == 4:
        row.waves /= cost.tap_share(layer)


def _read(event: Event, launch: Launch, compiled: Any, layer: Layer | None, gpu: GPU) -> Row:
    code, text = offline.read(compiled), ttir.read(compiled.asm["ttir"])
    row = Row(event.layer, event.phase, event.name, grid=launch.grid)
    row.registers, row.shared, row.spills, row.stack = (
        code.registers, code.shared, code.spills, code.stack,
    )  # fmt: skip
    row.warps, row.tile = int(compiled.metadata.num_warps), text.tile()
    assert launch.grid is not None
    arguments = launch.named
    row.role = _role(event, launch, text, layer)
    _add_traffic(row, arguments, text)
    amd = gpu.target.startswith("gfx")
    instructions, labels = (sass.parse_amd if amd else sass.parse)(code.assembly)
    _add_widths(row, sass.accesses(instructions), text)
    loops = sass.loops(instructions, labels)
    _add_loops(row, loops, text, gpu)
    try:
        work = text.work(launch.grid, arguments)
    except ttir.UnreadableCode:
        return row
    row.flops = float(work.flops.sum())
    if row.mma and not amd:
        slots = cost.resident(gpu, code.registers, code.shared, row.warps)
        row.waves = cost.wave_efficiency(gpu, work.flops, slots)
    if layer is not None and not amd:
        executed = _executed(len(instructions), loops, work)
        if executed is not None:
            total = 32 * row.warps * float(executed.sum())
            row.instructions = total / torch.Size(layer.input).numel()
            if not text.dots:
                slots = cost.resident(gpu, code.registers, code.shared, row.warps)
                row.issue_seconds = cost.issue_seconds(gpu, row.warps * executed, slots)
    return row


def _executed(total: int, loops: list[sass.Loop], work: ttir.Work) -> Any:
    """Instructions that one warp of each program runs; None with several loops.

    Both sides of a branch count.
    """
    real = [loop for loop in loops if len(loop) > _WAITING]
    programs = np.ones(len(work.flops))
    if not real and all(trips.max(initial=0) <= 1 for trips in work.trips):
        return total * programs
    if len(real) != 1 or len(work.trips) != 1:
        return None
    return (total - len(real[0])) * programs + len(real[0]) * work.trips[0]


def _add_traffic(row: Row, arguments: dict[str, Any], text: ttir.Code) -> None:
    """Bytes: every tensor that is read once, every one that is written once."""
    seen: set[tuple[int, int, bool]] = set()
    for names, store in ((text.reads, False), (text.writes, True)):
        for name in sorted(names):
            tensor = tensor_of(arguments.get(name))
            if tensor is None:
                continue
            size = tensor.numel() * tensor.element_size()
            row.sizes[name], row.itemsizes[name] = size, tensor.element_size()
            # Two descriptors of one tensor, in blocks of two sizes, share its bytes.
            same = (tensor.untyped_storage()._cdata, int(tensor.storage_offset()), store)
            if same in seen:
                continue
            seen.add(same)
            if store:
                row.written += size
            else:
                row.read += size
            if "rate_ptr" in arguments and name in _UPDATED:
                row.updated += size


def _add_widths(row: Row, accesses: list[sass.Access], text: ttir.Code) -> None:
    for access in accesses:
        place = row.stores if access.store else row.loads
        for name in text.at(access.line, access.store) & set(row.sizes) or {"?"}:
            widths = place.setdefault(name, [])
            if access.label not in widths:
                widths.append(access.label)


def _add_loops(row: Row, loops: list[sass.Loop], text: ttir.Code, gpu: GPU) -> None:
    """The main loop: of those that hold products, the one most filled with them."""
    products = [loop for loop in loops if loop.products]
    if not text.dots:
        return
    row.mma_loops = len(products)
    if not products:
        return
    main = max(products, key=lambda loop: loop.products / len(loop))
    row.loop = len(main)
    row.mma = next(i.name for i in main.body if sass.is_product(i))
    row.drains = main.drains
    row.barriers = main.count(r"MEMBAR")
    row.register_operands = sum(a.how == "register" and not a.store for a in main.accesses)
    if gpu.target.startswith("gfx"):
        return
    assert row.warps is not None
    cycles = main.tensor_cycles(row.warps, gpu.tensor_flops)
    if not cycles and row.mma.startswith("UTC"):
        cycles = sum(dot.flops for dot in text.dots) / gpu.tensor_flops
    if cycles:
        row.issue_ratio = len(main) * row.warps / 4 / cycles


def _role(event: Event, launch: Launch, text: ttir.Code, layer: Layer | None) -> str | None:
    """Which pass through its layer a launch makes; None for one that only prepares or finishes."""
    if layer is None:
        return None
    if layer.weight is None:
        return event.phase
    if not text.dots:
        return None
    if event.phase == "forward":
        return "forward"
    if "weight" in launch.name:
        return "weight"
    weight = torch.Size(layer.weight).numel()
    arguments = launch.named

    def holds(names: set[str]) -> bool:
        tensors = [tensor_of(arguments.get(name)) for name in names]
        return any(t is not None and t.numel() == weight for t in tensors)

    return "input" if holds(text.reads) and not holds(text.writes) else "weight"
