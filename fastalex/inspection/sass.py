"""Instructions, loops and memory accesses in machine code.

The issue ratio of a loop is the time it takes to hand its instructions to the hardware, over the
time the tensor cores need for its products. A processor has four schedulers, each of which issues
an instruction of one warp in a cycle, so a loop of I instructions in W warps takes I * W / 4
cycles. Under 1 the tensor cores can be kept busy; the less, the more room there is for waiting.

The cycles of the products, of all warps of a program together, F being the operations that a
processor's tensor cores do in a cycle (``fastalex.inspection.gpus``):

* HGMMA.64xNxK, one for four warps: 2 * 64 * N * K operations, so N / 2 cycles at K = 16 and
  F = 4096, times W / 4; TF32 at half the rate.
* HMMA.16816, one for each warp: 2 * 16 * 8 * 16 operations, so 2 cycles at F = 2048, times W;
  HMMA.1688 (TF32) half the operations at half the rate. On sm_90 these old instructions reach
  about half of what HGMMA does, and are counted so.
* UTC*MMA (sm_100) does not carry its size; the products of the intermediate code count, and what
  they read.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

_NVIDIA = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?(U?P\w+)\s+)?([A-Z][\w.]*)\s*([^;]*)")
_AMD = re.compile(r"\s+()((?:v|s|ds|global|buffer|flat|scratch)_\w+)\s*(.*)")
_MMA = re.compile(r"[HIQ]G?MMA|UTC\w*MMA|DMMA|v_mfma|v_wmma")
_NVIDIA_ACCESS = re.compile(r"(LDG|STG|LDGSTS|UTMALDG|UTMASTG|UTMAREDG|UBLKCP|ATOMG|RED|REDG)\b")
_AMD_ACCESS = re.compile(r"(?:global|buffer)_(load|store|atomic)_(\w+)")
_AMD_WIDTHS = {"ubyte": 1, "sbyte": 1, "byte": 1, "short": 2, "ushort": 2, "sshort": 2}


class Instruction(NamedTuple):
    """One instruction: its name with modifiers, and its operands."""

    name: str
    operands: str
    guarded: bool
    labels: tuple[str, ...]  # that stand before it

    @property
    def product(self) -> bool:
        """Whether it multiplies on tensor cores."""
        return bool(_MMA.match(self.name))


class Access(NamedTuple):
    """An instruction that moves data between global memory and the processor."""

    store: bool
    how: str  # register, async (cp.async, straight to shared memory) or TMA
    width: int  # bytes of a thread, 0 for TMA, which moves whole blocks

    @property
    def label(self) -> str:
        return self.how if self.how == "TMA" else str(self.width)


def parse(assembly: str) -> list[Instruction]:
    """The instructions of nvdisasm's listing, or of AMD's assembly."""
    instructions: list[Instruction] = []
    labels: tuple[str, ...] = ()
    for text in assembly.splitlines():
        if label := re.match(r"(\.L\w+):", text):
            labels = *labels, label[1]
        elif found := _NVIDIA.search(text) or _AMD.match(text):
            guard, name, operands = found.groups()
            # A uniform branch may have its condition among its operands.
            guarded = guard or name.startswith("s_cbranch") or re.match(r"!?U?P\w", operands)
            instructions.append(Instruction(name, operands.strip(), bool(guarded), labels))
            labels = ()
    return instructions


def loops(instructions: Sequence[Instruction]) -> list[range]:
    """The places of each loop, an outer one first: from a label to the last jump back to it.

    What NVIDIA's compiler moved behind the end, such as the slow way through a wait, jumps back
    too, but with an end between.
    """
    places = {label: number for number, i in enumerate(instructions) for label in i.labels}
    ends: dict[int, int] = {}
    for number, instruction in enumerate(instructions):
        target = re.search(r"\.L\w+", instruction.operands)
        jump = re.match(r"U?BRA\b|s_c?branch", instruction.name)
        start = places.get(target[0], number + 1) if jump and target else number + 1
        body = instructions[start : number + 1]
        if start <= number and not any(i.name == "EXIT" and not i.guarded for i in body):
            ends[start] = number
    return [range(start, end + 1) for start, end in sorted(ends.items())]


def lengths(total: int, loops: Sequence[range]) -> list[int]:
    """Of ``total`` instructions, those outside every loop, and of each loop its own.

    What a loop shares with one inside it belongs to the inner one.
    """
    inner = [0] * total
    for number, loop in enumerate(loops, 1):
        inner[loop.start : loop.stop] = [number] * len(loop)
    return [inner.count(number) for number in range(len(loops) + 1)]


def count(instructions: Sequence[Instruction], pattern: str) -> int:
    """How many begin with a match of the regular expression ``pattern``."""
    return sum(bool(re.match(pattern, i.name)) for i in instructions)


def drains(loop: Sequence[Instruction]) -> int:
    """Waits for every product under way, HGMMA's ``gsb0, 0x0``, while the loop goes on."""
    waits = [i for i in loop if re.match("HGMMA|WARPGROUP", i.name)]
    return sum("gsb0, 0x0" in i.operands for i in waits)


def tensor_cycles(loop: Sequence[Instruction], warps: int, flops_per_cycle: int) -> float:
    """Cycles of the tensor cores for a loop's products; 0 where they don't carry a size."""
    cycles = 0.0
    for instruction in loop:
        wide = re.match(r"HGMMA\.64x(\d+)x(\d+)", instruction.name)
        if wide:
            n, k = map(int, wide.groups())
            half = 2 if "TF32" in instruction.name else 1
            cycles += half * 2 * 64 * n * k / flops_per_cycle * warps / 4
        elif re.match(r"HMMA\.(16816|1688)\b", instruction.name):
            cycles += 2 * 16 * 8 * 16 / min(flops_per_cycle, 2048) * warps
    return cycles


def shared_bytes(loop: Sequence[Instruction], warps: int) -> int:
    """Bytes of shared memory that a loop reads and writes by instructions of all warps.

    HGMMA reads its second operand there, and its first where that is a descriptor. What comes from
    global memory is written there besides.
    """
    size = 0
    for name, operands in ((i.name, i.operands.split(",")) for i in loop):
        if wide := re.match(r"HGMMA\.64x(\d+)x(\d+)", name):
            n, k = map(int, wide.groups())
            first = "gdesc" in "".join(operands[1:2])
            size += (4 if "TF32" in name else 2) * k * (n + 64 * first) * warps // 4
        elif re.match(r"(LDSM|STSM)\b", name):
            blocks = re.search(r"M[T]?88\.(\d)", name)
            size += 128 * int(blocks[1] if blocks else 1) * warps
        elif re.match(r"(LDS|STS)\b", name):
            bits = re.search(r"\.(?:[US]?(8|16)|(64|128))\b", name)
            size += 4 * int((bits[1] or bits[2]) if bits else 32) * warps
    return size


def accesses(instructions: Sequence[Instruction]) -> list[Access]:
    """Every access to global memory, in order."""
    result = []
    for i in instructions:
        found, amd = _NVIDIA_ACCESS.match(i.name), _AMD_ACCESS.match(i.name)
        if found:
            kind = found[1]
            store = kind in ("STG", "UTMASTG", "UTMAREDG", "ATOMG", "RED", "REDG")
            if kind.startswith(("UTMA", "UBLK")):
                result.append(Access(store, "TMA", 0))
                continue
            size = re.search(r"\.(?:[US](8|16)|(64|128|256))\b", i.name)
            width = int(size[1] or size[2]) // 8 if size else 4
            result.append(Access(store, "async" if kind == "LDGSTS" else "register", width))
        elif amd:
            lds = "lds" in i.operands.split()
            wide = re.match(r"dwordx(\d)", amd[2])
            width = 4 * int(wide[1]) if wide else _AMD_WIDTHS.get(amd[2].split("_")[0], 4)
            result.append(Access(amd[1] != "load", "async" if lds else "register", width))
    return result
