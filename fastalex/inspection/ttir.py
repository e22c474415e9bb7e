"""Read Triton's IR: what each program of a launch computes, and through which arguments.

How much work a program has is decided by integers: its place in the grid and the kernel's integer
arguments. The operations on them become a Python function, which is called for each program. So no
formula has to follow what a kernel does.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from fastalex.inspection.sass import Line

_VALUE = re.compile(r"%[\w.$-]+(?:#\d+)?")
_OPERATION = re.compile(r'(?:(%[\w.$-]+)(?::(\d+))? = )?"?([a-z_]+)\.([\w.]+)"?(.*)')
_PAIR = re.compile(r"(%[\w.$-]+) = (%[\w.$#-]+)")
_DOT = re.compile(r"tensor<(\d+)x(\d+)x[a-z]+(\d+)> \* tensor<\d+x(\d+)x\w+>")
_DRIFT = 12  # lines between an access and the place that the compiler gives it, at most
_LOAD = re.compile(r"load$|descriptor_(load|gather)$|atomic_")
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


class Work(NamedTuple):
    """What a program does: operations of its products, and how often each loop's body runs."""

    flops: int
    turns: list[int]


class _Block(NamedTuple):
    """What stands between braces.

    Args:
        results: of all of it.
        carried: values that a loop carries.
        loop: its number as a loop.
        known: whether it is known which programs run it; if not, both sides of a branch count.
    """

    results: list[str]
    carried: list[str]
    loop: int | None
    known: bool


class _Statement(NamedTuple):
    """A line of Python; one without ``target`` can't be left out."""

    depth: int
    target: str | None
    text: str
    needs: Sequence[str]


class Code:
    """A kernel's IR.

    Attributes:
        arguments: names of the kernel's run-time arguments.
        reads, writes: the arguments through which memory is read and written.
        dots: the products.
        loops: how many loops there are.
    """

    def __init__(self, text: str) -> None:
        self._locations = dict(re.findall(r"(?m)^(#loc\d*) = (loc\(.*\))$", text))
        head, *body = text[text.index("tt.func") :].splitlines()
        self.arguments: list[str] = re.findall(r"[(,] ?%([\w.$-]+): ", head)
        self.dots: list[Dot] = []
        self.loops = 0
        # Of a value, the arguments that it comes from; of a line that loads or stores, its own.
        self._roots: dict[str, set[str]] = {f"%{name}": {name} for name in self.arguments}
        self._loads: dict[Line | None, set[str]] = defaultdict(set)
        self._stores: dict[Line | None, set[str]] = defaultdict(set)
        self._known = set(self._roots)  # integers; of pointers nothing is computed
        self._statements: list[_Statement] = []
        self._blocks: list[_Block] = []
        for line in map(str.strip, body):
            self._read(line)
        self.reads = set().union(*self._loads.values())
        self.writes = set().union(*self._stores.values())

    def _read(self, line: str) -> None:
        if line.startswith("}") and self._blocks:
            block = self._blocks.pop()
            if line.endswith("{"):
                self._emit("else:" if block.known else "if True:")
                self._open(block)
            for result, inner in zip(block.results, block.carried, strict=False):
                self._roots[result] = self._of([inner])
                self._emit("{}", result, [inner])
        found = _OPERATION.match(line)
        if found is None:
            return
        result, count, dialect, kind, rest = found.groups()
        operands = _VALUE.findall(rest)
        if dialect == "scf" and kind == "yield":
            self._yield(operands)
        elif dialect == "tt" and (_LOAD.match(kind) or _STORE.match(kind)):
            for pattern, lines in ((_LOAD, self._loads), (_STORE, self._stores)):
                if pattern.match(kind):
                    lines[self._line(rest)] |= self._roots.get(operands[0], set())
        elif result and dialect != "scf":
            self._roots[result] = self._of(operands)
            if kind == "dot":
                self._dot(result, rest, operands)
            elif kind in ("get_program_id", "get_num_programs"):
                self._emit(f"{kind}['{rest.split()[0]}']", result)
            elif dialect == "arith" and "tensor<" not in rest:
                self._integer(kind, result, rest, operands)
        if line.endswith("{"):
            results = [f"{result}#{i}" for i in range(int(count or 0))] or [result]
            self._begin(kind, results if result else [], rest, operands)

    def _of(self, values: Sequence[str]) -> set[str]:
        return set().union(*(self._roots.get(v, set()) for v in values))

    def _begin(self, kind: str, results: list[str], rest: str, operands: list[str]) -> None:
        if kind != "for":
            known = kind == "if" and operands[0] in self._known
            self._emit("if {}:" if known else "if True:", None, operands[:1] if known else ())
            self._open(_Block(results, [], None, known))
            return
        index, *bounds = re.findall(r" (%\S+) = (\S+) to (\S+) step (\S+)", rest)[0]
        pairs = _PAIR.findall(rest.split("iter_args(")[1]) if "iter_args(" in rest else []
        for inner, outer in pairs:
            self._roots[inner] = self._of([outer])
            self._emit("{}", inner, [outer])
        self._known.add(index)
        self._emit(f"for {_name(index)} in range({{}}, {{}}, {{}}):", None, bounds)
        self._open(_Block(results, [inner for inner, _ in pairs], self.loops, True))
        self.loops += 1

    def _open(self, block: _Block) -> None:
        self._blocks.append(block)
        self._emit("pass" if block.loop is None else f"turns[{block.loop}] += 1")

    def _yield(self, values: list[str]) -> None:
        block = self._blocks[-1]
        if block.loop is None:
            for result, value in zip(block.results, values, strict=False):
                self._roots[result] = self._of([result, value])
                if block.known:
                    self._emit("{}", result, [value])
            return
        pairs = list(zip(block.carried, values, strict=False))
        for inner, value in pairs:
            self._emit("{}", f"{inner}_next", [value])
        for inner, _ in pairs:
            self._emit("{}", inner, [f"{inner}_next"])

    def _dot(self, result: str, rest: str, operands: list[str]) -> None:
        m, k, bits, n = map(int, _DOT.findall(rest)[0])
        inside = [block.loop for block in self._blocks if block.loop is not None]
        a, b, to = operands[:3]
        self.dots.append(Dot(m, n, k, bits, a, b, to, result, inside[-1] if inside else None))
        self._emit(f"flops += {2 * m * n * k}")

    def _integer(self, kind: str, result: str, rest: str, operands: list[str]) -> None:
        if kind == "constant":
            self._emit(rest.split(":")[0].strip().capitalize(), result)
        elif kind == "cmpi":
            order = rest.split(",")[0].strip()
            value = "{} % 2**64" if order[0] == "u" else "{}"
            sign = _COMPARE[order[1:] if order[0] in "us" else order]
            self._emit(f"{value} {sign} {value}", result, operands)
        elif kind in _ARITHMETIC:
            self._emit(_ARITHMETIC[kind], result, operands)

    def _emit(self, text: str, target: str | None = None, needs: Sequence[str] = ()) -> None:
        line = text.format(*map(_name, needs))
        line = line if target is None else f"{_name(target)} = {line}"
        self._statements.append(_Statement(len(self._blocks) + 1, target, line, needs))
        if target is not None and self._known.issuperset(needs):
            self._known.add(target)

    def _line(self, text: str) -> Line | None:
        """Where in the source an operation was written, inside every function called."""
        found = re.search(r"loc\((#loc\d*)\)$", text)
        while found:
            location = self._locations.get(found[1], "")
            place = re.match(r'loc\("([^"]+)":(\d+):\d+\)', location)
            if place:
                return place[1], int(place[2])
            # loc("name"(#loc5)), or loc(callsite(#loc5 at #loc6)) whose first is the inner one
            found = re.match(r'loc\((?:"[^"]*"|callsite)\((#loc\d*)', location)
        return None

    def at(self, line: Line | None, store: bool) -> set[str]:
        """The arguments that are read or written at a line of source, or at the nearest one."""
        lines = self._stores if store else self._loads
        near = [
            (abs(there[1] - line[1]), there)
            for there in lines
            if line and there and there[0] == line[0] and abs(there[1] - line[1]) <= _DRIFT
        ]
        return lines[min(near)[1]] if near else set()

    def tile(self) -> tuple[int, int] | None:
        """Rows and columns of the result that a program holds; None where it multiplies nothing.

        Products of one operand with several stand side by side, or below each other; those that
        are added to another product are more of the same result.
        """
        results = {dot.result for dot in self.dots}
        first = [dot for dot in self.dots if dot.to not in results]
        rows, columns = {d.a: d.m for d in first}, {d.b: d.n for d in first}
        return (sum(rows.values()), sum(columns.values())) if first else None

    def turn(self, loop: int | None) -> tuple[int, int]:
        """Operations of a loop's products in one turn, and bytes of their operands."""
        dots = [dot for dot in self.dots if dot.loop == loop]
        blocks = {d.a: d.m * d.k * d.bits // 8 for d in dots}
        blocks |= {d.b: d.n * d.k * d.bits // 8 for d in dots}
        return sum(2 * d.m * d.n * d.k for d in dots), sum(blocks.values())

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
        """The integers of one program as a Python function, without those that decide nothing."""
        needed: set[str] = set()
        before = -1
        while before != len(needed):  # a loop's values may need what stands behind them
            before = len(needed)
            kept = [s for s in self._statements if s.target is None or s.target in needed]
            needed.update(*(s.needs for s in kept))
        names = ", ".join(_name(f"%{name}") for name in self.arguments)
        lines = [f"def program(get_program_id, get_num_programs, {names}):"]
        lines += [f" flops, turns = 0, [0] * {self.loops}"]
        lines += [" " * s.depth + s.text for s in kept]
        space: dict[str, Any] = {"Work": Work, "div": _divide, "rem": _remainder}
        exec("\n".join([*lines, " return Work(flops, turns)"]), space)
        return space["program"]  # type: ignore[no-any-return]


def _name(value: str) -> str:
    return "v_" + re.sub(r"\W", "_", value[1:])


def _divide(a: int, b: int) -> int:
    """Towards zero, as a GPU does."""
    quotient = abs(a) // abs(b)
    return quotient if (a < 0) == (b < 0) else -quotient


def _remainder(a: int, b: int) -> int:
    return a - b * _divide(a, b)


@functools.lru_cache(maxsize=256)
def read(text: str) -> Code:
    """Parse a kernel's IR."""
    return Code(text)
