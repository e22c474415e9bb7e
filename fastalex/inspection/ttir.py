"""Read Triton's IR: what each program of a launch computes, and through which arguments.

Machine code does not tell how often a loop turns, nor which tensor an access belongs to. Both are
decided by integers, the program's place in the grid and the kernel's integer arguments, so the
operations on integers become a Python function, which is called for each program. No formula has
to follow what a kernel does.

A kernel in Gluon has no such IR but Triton's GPU IR (TTGIR), which is read in the same way. Where
warps of their own fetch what others multiply, they are partitions of a program.
"""

from __future__ import annotations

import functools
import itertools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

_VALUE = re.compile(r"%[\w.$-]+(?:#\d+)?")
_OPERATION = re.compile(r'(?:(%[\w.$-]+)(?::(\d+))? = )?"?([a-z_]+)\.([\w.]+)"?(.*)')
_LOOP = re.compile(r" (%\S+) = (\S+) to (\S+) step (\S+)")
_CARRIED = re.compile(r"(%[\w.$-]+) = (%[\w.$#-]+)")
_BLOCK = re.compile(r"tensor<((?:\d+x)+)(?:!tt\.ptr<)?[a-z]+(\d+)")
_DOT = re.compile(r"[rc]<(\d+)x(\d+)x[a-z]+(\d+)[^*]* \* \S*[rc]<\d+x(\d+)x\w+")
_COPY = re.compile(r"memdesc<((?:\d+x)+)[a-z]+(\d+)")
_PARTITION = re.compile(r"partition\d+\((.*)\) num_warps")
_LOAD = re.compile(r"load$|descriptor_(load|gather)$|atomic_|async_tma_copy_global_to_local$")
_STORE = re.compile(r"store$|descriptor_(store|scatter|reduce)$|atomic_")
_ARITHMETIC = {
    "addi": "{} + {}", "subi": "{} - {}", "muli": "{} * {}", "divsi": "div({}, {})",
    "divui": "div({}, {})", "remsi": "rem({}, {})", "remui": "rem({}, {})",
    "minsi": "min({}, {})", "maxsi": "max({}, {})", "minui": "min({}, {})",
    "maxui": "max({}, {})", "andi": "{} & {}", "ori": "{} | {}", "xori": "{} ^ {}",
    "shli": "{} << {}", "shrsi": "{} >> {}", "select": "{1} if {0} else {2}", "extsi": "{}",
    "extui": "{}", "trunci": "{}", "index_cast": "{}",
}  # fmt: skip
_COMPARE = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}


class Dot(NamedTuple):
    """A product of tiles [m, k] and [k, n] with operands ``a`` and ``b``, added to ``to``."""

    m: int
    n: int
    k: int
    bits: int
    a: str
    b: str
    to: str
    result: str
    loop: int | None


class Load(NamedTuple):
    """A block of ``size`` bytes that each turn of a loop reads through some arguments."""

    names: frozenset[str]
    size: int
    loop: int | None
    copied: bool  # to shared memory, by warps that may be others than those that multiply


class Work(NamedTuple):
    """What a program does: operations of its products, and how often each loop's body runs."""

    flops: int
    turns: list[int]


class _Block(NamedTuple):
    """What stands between braces."""

    results: list[str]  # are given values at its end
    loop: int | None  # its number, where it is the body of one
    known: bool  # which programs run it; if not, both sides of a branch count


class Code:
    """A kernel's IR.

    Attributes:
        arguments: names of the kernel's run-time arguments.
        reads, writes: those through which memory is read and written.
        dots: the products.
        loads: the blocks that are read.
        loops: how many loops there are.
    """

    def __init__(self, text: str) -> None:
        head, *body = text[text.index("tt.func") :].splitlines()
        self.arguments: list[str] = re.findall(r"[(,] ?%([\w.$-]+): ", head)
        self.reads: set[str] = set()
        self.writes: set[str] = set()
        self.dots: list[Dot] = []
        self.loads: list[Load] = []
        self.loops = 0
        self._roots = {f"%{name}": {name} for name in self.arguments}  # of a value, arguments
        self._known = set(self._roots)  # values that the function below computes
        self._alias: dict[str, str] = {}  # what a loop carries is one variable, its result
        self._blocks: list[_Block] = []
        self._captured: list[str] = []  # by partitions
        self._body: list[str] = []  # of the function
        for line in map(str.strip, body):
            self._read(line)

    def _read(self, line: str) -> None:
        if line.startswith("}") and self._blocks:
            block = self._blocks.pop()
            if line.endswith("{"):
                self._begin(block, "else:" if block.known else "if True:")
        found = _OPERATION.match(line)
        if found is None:
            if partition := _PARTITION.match(line):
                inside = _VALUE.findall(partition[1])
                self._alias |= zip(inside, self._captured, strict=True)
            if line.endswith("{") and not line.startswith("}"):
                self._begin(_Block([], None, True), "if True:")
            return
        result, count, dialect, kind, rest = found.groups()
        operands = _VALUE.findall(rest)
        if result and dialect != "scf" and not _LOAD.match(kind):
            self._roots[result] = self._of(operands)
        if (dialect, kind) == ("scf", "yield"):
            self._yield(operands)
        elif kind == "warp_specialize":
            self._captured = [self._alias.get(value, value) for value in operands]
        elif kind == "warp_group_dot_wait":
            several = [f"{result}#{i}" for i in range(int(count or 0))] or [result]
            values = [self._alias.get(value, value) for value in operands]
            self._alias |= zip(several, values, strict=True)
        elif dialect in ("tt", "ttng"):
            self._triton(kind, result, rest, operands)
        elif dialect == "arith" and "tensor<" not in rest:
            self._integer(kind, result, rest, operands)
        if line.endswith("{"):
            several = [f"{result}#{i}" for i in range(int(count or 0))]
            self._branch(kind, several or [result] * bool(result), rest, operands)

    def _of(self, values: Sequence[str]) -> set[str]:
        return set().union(*(self._roots.get(self._alias.get(v, v), set()) for v in values))

    def _triton(self, kind: str, result: str, rest: str, operands: list[str]) -> None:
        for pattern, names in ((_LOAD, self.reads), (_STORE, self.writes)):
            if pattern.match(kind):
                names |= self._of(operands[:1])
        copied = kind.startswith("async_")
        if _LOAD.match(kind) and (blocks := (_COPY if copied else _BLOCK).findall(rest)):
            sides, bits = blocks[-1]
            size = math.prod(map(int, sides.split("x")[:-1])) * int(bits) // 8
            through = frozenset(self._of(operands[:1]))
            self.loads.append(Load(through, size, self._inside(), copied))
        if kind in ("dot", "warp_group_dot"):
            m, k, bits, n = map(int, _DOT.findall(rest)[0])
            a, b, to = (self._alias.get(value, value) for value in operands[:3])
            self.dots.append(Dot(m, n, k, bits, a, b, to, result, self._inside()))
            self._write(f"flops += {2 * m * n * k}")
        elif kind in ("get_program_id", "get_num_programs"):
            self._assign(result, f"{kind}['{rest.split()[0]}']")

    def _inside(self) -> int | None:
        """The innermost loop at this place."""
        loops = [block.loop for block in self._blocks if block.loop is not None]
        return loops[-1] if loops else None

    def _branch(self, kind: str, results: list[str], rest: str, operands: list[str]) -> None:
        if kind == "for":
            index, *bounds = _LOOP.findall(rest)[0]
            carried = _CARRIED.findall(rest.partition("iter_args(")[2])
            for (inside, before), result in zip(carried, results, strict=True):
                self._roots[result] = self._of([before])
                self._assign(result, "{}", before)
                self._alias[inside] = result
            self._known.add(index)
            low, high, step = map(self._name, bounds)
            head = f"for {self._name(index)} in range({low}, {high}, {step}):"
            self._begin(_Block(results, self.loops, True), head)
            self.loops += 1
            return
        known = kind == "if" and operands[0] in self._known
        head = f"if {self._name(operands[0])}:" if known else "if True:"
        self._begin(_Block(results, None, known), head)

    def _begin(self, block: _Block, head: str) -> None:
        self._write(head)
        self._blocks.append(block)
        self._write("pass" if block.loop is None else f"turns[{block.loop}] += 1")

    def _yield(self, values: list[str]) -> None:
        block = self._blocks[-1]
        pairs = list(zip(block.results, values, strict=False))
        for result, value in pairs if block.loop is None else []:
            self._roots[result] = self._of([result, value])
        if block.known and pairs:
            self._known.update(r for r, value in pairs if self._is_known(value))
            targets = ", ".join(self._name(result) for result, _ in pairs)
            made = [self._name(v) if self._is_known(v) else "None" for _, v in pairs]
            self._write(f"{targets}, = {', '.join(made)},")

    def _integer(self, kind: str, result: str, rest: str, operands: list[str]) -> None:
        if kind == "constant":
            self._assign(result, re.split(r":| loc\(", rest)[0].strip().capitalize())
        elif kind == "cmpi":
            order = rest.split(",")[0].strip()
            value = "{} % 2**64" if order[0] == "u" else "{}"
            sign = _COMPARE[order[1:] if order[0] in "us" else order]
            self._assign(result, f"{value} {sign} {value}", *operands)
        elif kind in _ARITHMETIC:
            self._assign(result, _ARITHMETIC[kind], *operands)

    def _is_known(self, value: str) -> bool:
        return self._alias.get(value, value) in self._known

    def _assign(self, target: str, text: str, *needs: str) -> None:
        """Compute a value, if what it needs is computed."""
        if all(map(self._is_known, needs)):
            self._known.add(target)
            self._write(f"{self._name(target)} = {text.format(*map(self._name, needs))}")

    def _write(self, line: str) -> None:
        self._body.append(" " * (len(self._blocks) + 1) + line)

    def _name(self, value: str) -> str:
        return "v_" + re.sub(r"\W", "_", self._alias.get(value, value)[1:])

    def tile(self) -> tuple[int, int] | None:
        """Rows and columns of the result that a program holds; None where it multiplies nothing.

        Products of one operand with several stand side by side, or below each other; those that
        are added to another product are more of the same result. Of several results it is the
        first.
        """
        results = {dot.result for dot in self.dots}
        first = [dot for dot in self.dots if dot.to not in results]
        first = [dot for dot in first if dot.a == first[0].a or dot.b == first[0].b]
        rows, columns = {d.a: d.m for d in first}, {d.b: d.n for d in first}
        return (sum(rows.values()), sum(columns.values())) if first else None

    def turn_flops(self, loop: int | None) -> int:
        """Operations of a loop's products in one turn."""
        return sum(2 * d.m * d.n * d.k for d in self.dots if d.loop == loop)

    def loaded_for(self, loop: int | None, work: Sequence[Work] | None) -> list[tuple[Load, float]]:
        """The blocks that are loaded for a loop, and how often in one of its turns.

        Those are its own loads, and copies that other warps make, in loops of theirs.
        """
        own = [(x, 1.0) for x in self.loads if x.loop == loop]
        if loop is None or work is None:
            return own
        turns = [sum(w.turns[i] for w in work) for i in range(self.loops)]
        copies = [x for x in self.loads if x.copied and x.loop not in (loop, None)]
        return own + [(x, turns[x.loop] / max(turns[loop], 1)) for x in copies]  # type: ignore[index]

    def operand_bytes(self, loop: int | None) -> int:
        """Bytes that tcgen05.mma reads in a turn: 128 rows, and the columns again for each of them.

        Source: the PTX ISA; both operands are in shared memory, and a product has at most 128 rows.
        """
        dots = [dot for dot in self.dots if dot.loop == loop]
        return sum((d.m + d.n * -(-d.m // 128)) * d.k * d.bits // 8 for d in dots)

    def work(self, grid: tuple[int, ...], arguments: Mapping[str, Any]) -> list[Work] | None:
        """What each program of a launch does, in the order in which programs start.

        Args:
            grid: the launch's.
            arguments: the kernel's by name; only integers are looked at.

        Returns:
            None where it depends on values in memory.
        """
        x, y, z = (*grid, 1, 1)[:3]
        given = [arguments.get(name) for name in self.arguments]
        places = ({"x": i, "y": j, "z": k} for k, j, i in itertools.product(*map(range, (z, y, x))))
        try:
            return [self._program(place, {"x": x, "y": y, "z": z}, *given) for place in places]
        except (NameError, TypeError):
            return None

    @functools.cached_property
    def _program(self) -> Callable[..., Work]:
        """The integers of one program as a Python function."""
        names = ", ".join(self._name(f"%{name}") for name in self.arguments)
        head = f"def program(get_program_id, get_num_programs, {names}):"
        space: dict[str, Any] = {
            "Work": Work,
            "div": lambda a, b: int(a / b),  # towards zero, as a GPU does
            "rem": lambda a, b: int(math.fmod(a, b)),
        }
        start, end = f" flops, turns = 0, [0] * {self.loops}", " return Work(flops, turns)"
        exec("\n".join([head, start, *self._body, end]), space)
        return space["program"]  # type: ignore[no-any-return]


@functools.lru_cache(maxsize=256)
def read(text: str) -> Code:
    """Parse a kernel's IR."""
    return Code(text)
