"""Loops, tensor instructions and memory accesses in machine code.

The issue ratio of a loop is the time it takes to hand its instructions to the hardware, over the
time the tensor cores need for its products. A processor has four schedulers, each of which issues
an instruction of one warp in a cycle, so a loop of I instructions in W warps takes I * W / 4
cycles. Under 1 the tensor cores can be kept busy; the less, the more room there is for waiting.

The cycles of the products, of all warps of a program together, F being the operations that a
processor's tensor cores do in a cycle (``fastalex.inspection.gpus``):

* HGMMA.64xNxK, one for four warps: 2 * 64 * N * K operations, so N / 2 cycles at K = 16 and
  F = 4096, times W / 4.
* HMMA.16816, one for each warp: 2 * 16 * 8 * 16 operations, so 2 cycles at F = 2048, times W;
  HMMA.1688 (TF32) half the operations at half the rate. On sm_90 these old instructions reach
  about half of what HGMMA does, and are counted so.
* UTC*MMA (sm_100) does not carry its size; the products of the intermediate code count.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from fastalex.inspection.ttir import Line

_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?(U?P\w+)\s+)?([A-Z][\w.]*)\s*([^;]*)")
_SOURCE = re.compile(r'//## File "([^"]+)", line (\d+)')
_TARGET = re.compile(r"`\((\.L\w+)\)")
_MMA = re.compile(r"[HIQ]G?MMA|UTC\w*MMA|DMMA|v_mfma|v_wmma")
_NVIDIA_ACCESS = re.compile(r"(LDG|STG|LDGSTS|UTMALDG|UTMASTG|UTMAREDG|UBLKCP|ATOMG|RED|REDG)\b")
_AMD_ACCESS = re.compile(r"(?:global|buffer)_(load|store|atomic)_(\w+)")
_ENDS = ("EXIT", "BRA", "RET", "BRX", "JMP")
_AMD_WIDTHS = {"ubyte": 1, "sbyte": 1, "byte": 1, "short": 2, "ushort": 2, "sshort": 2}


@dataclass(frozen=True)
class Instruction:
    """One instruction: its name with modifiers, its operands, where it was written."""

    name: str
    operands: str
    guard: str | None
    line: Line | None

    @property
    def target(self) -> str | None:
        found = _TARGET.search(self.operands)
        return found[1] if found else None


@dataclass(frozen=True)
class Access:
    """An instruction that moves data between global memory and the processor.

    Args:
        store: whether it writes.
        how: ``"register"``, ``"async"`` (cp.async, straight to shared memory) or ``"TMA"``.
        width: bytes of a thread, 0 for TMA, which moves whole blocks.
        line: where it was written.
    """

    store: bool
    how: str
    width: int
    line: Line | None

    @property
    def label(self) -> str:
        return self.how if self.how == "TMA" else str(self.width)


@dataclass(frozen=True)
class Loop:
    """A loop: its instructions in order."""

    body: tuple[Instruction, ...]

    def __len__(self) -> int:
        return len(self.body)

    def count(self, pattern: str) -> int:
        """How many instructions begin with a match of the regular expression ``pattern``."""
        return sum(bool(re.match(pattern, i.name)) for i in self.body)

    @property
    def products(self) -> int:
        return sum(map(is_product, self.body))

    @property
    def accesses(self) -> list[Access]:
        return accesses(self.body)

    @property
    def drains(self) -> int:
        """Waits for every product under way, HGMMA's ``gsb0, 0x0``, while the loop goes on."""
        return sum(
            bool(re.match("HGMMA|WARPGROUP", i.name) and re.search(r"gsb0, 0x0", i.operands))
            for i in self.body
        )

    def tensor_cycles(self, warps: int, flops_per_cycle: int) -> float:
        """Cycles of the tensor cores for the loop's products; 0 where they don't carry a size."""
        cycles = 0.0
        for instruction in self.body:
            wide = re.match(r"HGMMA\.64x(\d+)x(\d+)", instruction.name)
            if wide:
                n, k = map(int, wide.groups())
                cycles += 2 * 64 * n * k / flops_per_cycle * warps / 4
            elif re.match(r"HMMA\.(16816|1688)\b", instruction.name):
                rate = min(flops_per_cycle, 2048)
                cycles += 2 * 16 * 8 * 16 / rate * warps
        return cycles


def parse(assembly: str) -> tuple[list[Instruction], dict[str, int]]:
    """The instructions of nvdisasm's listing, and where in it each label stands."""
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    line: Line | None = None
    for text in assembly.splitlines():
        source = _SOURCE.search(text)
        if source:
            line = source[1], int(source[2])
            continue
        label = re.match(r"(\.L\w+):", text)
        if label:
            labels[label[1]] = len(instructions)
            continue
        found = _INSTRUCTION.search(text)
        if found:
            guard, name, operands = found.groups()
            instructions.append(Instruction(name, operands.strip(), guard, line))
    return instructions, labels


def parse_amd(assembly: str) -> tuple[list[Instruction], dict[str, int]]:
    """The same for AMD's assembly; a branch's operand is turned into NVIDIA's spelling."""
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    files: dict[str, str] = {}
    line: Line | None = None
    for text in map(str.strip, assembly.splitlines()):
        file = re.match(r'\.file\s+(\d+)\s+"([^"]*)"(?:\s+"([^"]*)")?', text)
        if file:
            files[file[1]] = f"{file[2]}/{file[3]}" if file[3] else file[2]
        location = re.match(r"\.loc\s+(\d+)\s+(\d+)", text)
        if location:
            line = files.get(location[1], ""), int(location[2])
        label = re.match(r"(\.L\w+):", text)
        if label:
            labels[label[1]] = len(instructions)
        found = re.match(r"((?:v|s|ds|global|buffer|flat|scratch)_\w+)\s*(.*)", text)
        if found:
            name, operands = found.groups()
            if name.startswith(("s_cbranch", "s_branch")):
                operands = re.sub(r"^(\.L\w+).*", r"`(\1)", operands)
            guard = "P0" if name.startswith("s_cbranch") else None
            instructions.append(Instruction(name, operands, guard, line))
    return instructions, labels


def is_product(instruction: Instruction) -> bool:
    """Whether it multiplies on tensor cores."""
    return bool(_MMA.match(instruction.name))


def _is_branch(instruction: Instruction) -> bool:
    return bool(re.match(r"U?BRA\b|s_c?branch", instruction.name))


def loops(instructions: list[Instruction], labels: dict[str, int]) -> list[Loop]:
    """The natural loops of a kernel: a jump back to a block that every way to the jump crosses.

    What the compiler moved behind the end, such as the slow way through a wait, is left out.
    """
    starts = {0, *labels.values()}
    for i, instruction in enumerate(instructions):
        if _is_branch(instruction) or instruction.name.split(".")[0] in (*_ENDS, "s_endpgm"):
            starts.add(i + 1)
    edges = sorted(s for s in starts if s < len(instructions))
    number = {start: i for i, start in enumerate(edges)}
    ends = [*edges[1:], len(instructions)]
    successors: list[list[int]] = []
    for end in ends:
        last = instructions[end - 1]
        after: list[int] = []
        if _is_branch(last) and last.target in labels:
            target = number.get(labels[last.target])
            after += [] if target is None else [target]
        ended = _is_branch(last) or last.name.split(".")[0] in (*_ENDS, "s_endpgm")
        # A uniform branch may have its condition among its operands instead of a guard.
        conditional = last.guard is not None or re.match(r"!?U?P\w", last.operands)
        if end in number and (not ended or conditional):
            after.append(number[end])
        successors.append(after)
    found: dict[int, set[int]] = defaultdict(set)
    dominators = _dominators(successors)
    for block, after in enumerate(successors):
        for header in after:
            if header in dominators[block]:
                found[header] |= _natural_loop(header, block, successors)
    result = []
    for header, blocks in found.items():
        back = max(b for b in blocks if header in successors[b])
        inside = sorted(b for b in blocks if header <= b <= back)
        body = [i for b in inside for i in instructions[edges[b] : ends[b]]]
        result.append(Loop(tuple(body)))
    return result


def _dominators(successors: list[list[int]]) -> list[set[int]]:
    """For each block, those on every way to it from the first; of blocks not reached, none."""
    predecessors: list[list[int]] = [[] for _ in successors]
    for block, after in enumerate(successors):
        for s in after:
            predecessors[s].append(block)
    everything = set(range(len(successors)))
    dominators = [everything for _ in successors]
    dominators[0] = {0}
    changed = True
    while changed:
        changed = False
        for block in range(1, len(successors)):
            before = [dominators[p] for p in predecessors[block]]
            new = {block} | (set.intersection(*before) if before else everything)
            if new != dominators[block]:
                dominators[block], changed = new, True
    return [d if 0 in d or i == 0 else set() for i, d in enumerate(dominators)]


def _natural_loop(header: int, block: int, successors: list[list[int]]) -> set[int]:
    """``header``, and what reaches ``block`` without crossing it."""
    inside, pending = {header}, [block]
    while pending:
        current = pending.pop()
        if current not in inside:
            inside.add(current)
            pending += [b for b, after in enumerate(successors) if current in after]
    return inside


def accesses(instructions: Sequence[Instruction]) -> list[Access]:
    """Every access to global memory, in order."""
    result = []
    for i in instructions:
        found, amd = _NVIDIA_ACCESS.match(i.name), _AMD_ACCESS.match(i.name)
        if found:
            kind = found[1]
            store = kind in ("STG", "UTMASTG", "UTMAREDG", "ATOMG", "RED", "REDG")
            if kind.startswith(("UTMA", "UBLK")):
                result.append(Access(store, "TMA", 0, i.line))
                continue
            size = re.search(r"\.(?:[US](8|16)|(64|128|256))\b", i.name)
            width = int(size[1] or size[2]) // 8 if size else 4
            result.append(Access(store, "async" if kind == "LDGSTS" else "register", width, i.line))
        elif amd:
            lds = "lds" in i.operands.split()
            wide = re.match(r"dwordx(\d)", amd[2])
            width = 4 * int(wide[1]) if wide else _AMD_WIDTHS.get(amd[2].split("_")[0], 4)
            result.append(Access(amd[1] != "load", "async" if lds else "register", width, i.line))
    return result
