"""Read Triton's intermediate code: how much work each program of a launch does, and on what.

The work of a program is decided by scalars: its position in the grid and the kernel's integer
arguments. They are computed here for all programs of a launch at once, from the same text that
becomes machine code, so that no formula has to follow what a kernel does.
"""

from __future__ import annotations

import functools
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

Line = tuple[str, int]  # a file and a line in it

_VALUE = re.compile(r"%[\w.$-]+(?:#\d+)?")
_OPERATION = re.compile(r'^(?:(%[\w.$-]+)(?::(\d+))? = )?"?([a-z_]+\.[\w.]+)"?(.*)$')
_DRIFT = 12  # lines
_LOADS = ("tt.load", "tt.descriptor_load", "tt.descriptor_gather")
_STORES = ("tt.store", "tt.descriptor_store", "tt.descriptor_scatter", "tt.descriptor_reduce")
_ATOMICS = ("tt.atomic_rmw", "tt.atomic_cas")
_DOT = re.compile(r"tensor<(\d+)x(\d+)x\w+> \* tensor<\d+x(\d+)x\w+>")
_BINARY: dict[str, Any] = {
    "addi": np.add, "subi": np.subtract, "muli": np.multiply, "minsi": np.minimum,
    "maxsi": np.maximum, "minui": np.minimum, "maxui": np.maximum, "andi": np.bitwise_and,
    "ori": np.bitwise_or, "xori": np.bitwise_xor, "shli": np.left_shift, "shrsi": np.right_shift,
    "shrui": np.right_shift,
}  # fmt: skip
_COMPARE: dict[str, Any] = {
    "eq": np.equal, "ne": np.not_equal, "slt": np.less, "sle": np.less_equal, "sgt": np.greater,
    "sge": np.greater_equal, "ult": np.less, "ule": np.less_equal, "ugt": np.greater,
    "uge": np.greater_equal,
}  # fmt: skip


@dataclass
class Operation:
    """One operation, with the regions of code inside it."""

    name: str
    results: list[str]
    text: str
    regions: list[list[Operation]] = field(default_factory=list)

    @property
    def operands(self) -> list[str]:
        return _VALUE.findall(self.text)

    def walk(self) -> Iterator[Operation]:
        yield self
        for region in self.regions:
            for operation in region:
                yield from operation.walk()


@dataclass(frozen=True)
class Dot:
    """A product of tiles [m, k] and [k, n]; a, b and ``to`` name them and what it is added to."""

    m: int
    n: int
    k: int
    a: str
    b: str
    to: str

    @property
    def flops(self) -> int:
        return 2 * self.m * self.n * self.k


@dataclass
class Work:
    """What every program of a launch does, in the order in which programs start.

    Attributes:
        flops: operations of the products, padding included.
        trips: for each loop in the code, how often its body runs, in all its entries.
    """

    flops: Any
    trips: list[Any]


class UnreadableCode(ValueError):
    """What a program does depends on something that is not known before it runs."""


class Code:
    """A kernel's intermediate code.

    Attributes:
        arguments: names of the kernel's run-time arguments.
        reads, writes: the arguments through which memory is read and written.
        read_lines, written_lines: for each line of source that does so, those arguments.
        dots: the products in it.
        body: its operations.
    """

    def __init__(self, text: str) -> None:
        self._locations = dict(re.findall(r"(?m)^(#loc\d*) = (loc\(.*\))$", text))
        self.arguments: list[str] = []
        self.body = self._parse(text)
        self.dots = [self._dot(o) for o in self._operations() if o.name == "tt.dot"]
        self.loops = [o for o in self._operations() if o.name == "scf.for"]
        self.reads: set[str] = set()
        self.writes: set[str] = set()
        self.read_lines: dict[Line, set[str]] = defaultdict(set)
        self.written_lines: dict[Line, set[str]] = defaultdict(set)
        self._find_accesses()

    def _operations(self) -> Iterator[Operation]:
        for operation in self.body:
            yield from operation.walk()

    @staticmethod
    def _dot(operation: Operation) -> Dot:
        found = _DOT.search(operation.text)
        assert found is not None, operation.text
        m, k, n = map(int, found.groups())
        return Dot(m, n, k, *operation.operands[:3])

    def _parse(self, text: str) -> list[Operation]:
        body: list[Operation] = []
        blocks = [body]  # the innermost is last
        owners: list[Operation] = []
        for line in map(str.strip, text.splitlines()):
            if line.startswith("tt.func"):
                self.arguments = re.findall(r"[(,] ?%([\w.$-]+): ", line)
                continue
            if line.startswith("}"):
                if not owners:
                    continue
                blocks.pop()
                if line.endswith("{"):  # } else {
                    owners[-1].regions.append([])
                    blocks.append(owners[-1].regions[-1])
                else:
                    owners.pop()
                continue
            found = _OPERATION.match(line)
            if found is None:
                continue
            result, count, name, rest = found.groups()
            results = [result] if result and not count else []
            if count:
                results = [f"{result}#{i}" for i in range(int(count))]
            operation = Operation(name, results, rest)
            blocks[-1].append(operation)
            if line.endswith("{"):
                operation.regions.append([])
                owners.append(operation)
                blocks.append(operation.regions[-1])
        return body

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

    def _find_accesses(self) -> None:
        roots: dict[str, set[str]] = {f"%{name}": {name} for name in self.arguments}

        def of(values: list[str]) -> set[str]:
            return set().union(*(roots.get(v, set()) for v in values))

        def visit(operation: Operation) -> None:
            operands = operation.operands
            if operation.name == "scf.for":
                pairs = re.findall(r"(%[\w.$-]+) = (%[\w.$#-]+)", _carried(operation.text))
                for i, (inner, outer) in enumerate(pairs):
                    roots[inner] = of([outer])
                    if i < len(operation.results):
                        roots[operation.results[i]] = of([outer])
            moved = of(operands[:1])
            place = self._line(operation.text)
            memory = False
            for names, arguments, lines in (
                (_LOADS + _ATOMICS, self.reads, self.read_lines),
                (_STORES + _ATOMICS, self.writes, self.written_lines),
            ):
                if operation.name in names:
                    memory = True
                    arguments |= moved
                    if place:
                        lines[place] |= moved
            if not memory and operation.name != "scf.for":
                for result in operation.results:
                    roots[result] = of(operands)
            for region in operation.regions:
                for inside in region:
                    visit(inside)
                last = region[-1] if region else None
                if operation.name == "scf.if" and last and last.name == "scf.yield":
                    for result, value in zip(operation.results, last.operands, strict=False):
                        roots[result] = roots.get(result, set()) | of([value])

        for operation in self.body:
            visit(operation)

    def at(self, line: Line | None, store: bool) -> set[str]:
        """The arguments that are read or written at a line of source, or at the nearest one.

        The compiler may give an access the line of what is done with the value.
        """
        lines = self.written_lines if store else self.read_lines
        if line is None or line in lines:
            return lines.get(line, set()) if line else set()
        near = [
            (abs(there[1] - line[1]), there)
            for there in lines
            if there[0] == line[0] and abs(there[1] - line[1]) <= _DRIFT
        ]
        return lines[min(near)[1]] if near else set()

    def tile(self) -> tuple[int, int] | None:
        """Rows and columns of the result that a program holds; None where it multiplies nothing.

        Products of one operand with several stand side by side, or below each other; those that
        are added to another product are more of the same result.
        """
        if not self.dots:
            return None
        products = {o.results[0] for o in self._operations() if o.name == "tt.dot"}
        first = [dot for dot in self.dots if dot.to not in products]
        rows, columns = {d.a: d.m for d in first}, {d.b: d.n for d in first}
        return sum(rows.values()), sum(columns.values())

    def work(self, grid: tuple[int, ...], arguments: Mapping[str, Any]) -> Work:
        """What each program of a launch does.

        Args:
            grid: the launch's.
            arguments: the kernel's by name; only integers are looked at.

        Raises:
            UnreadableCode: where it depends on values in memory.
        """
        try:
            return _Programs(self, grid, arguments, follow=False).run()
        except UnreadableCode:
            return _Programs(self, grid, arguments, follow=True).run()


def _carried(text: str) -> str:
    found = re.search(r"iter_args\((.*?)\) ->", text)
    return found[1] if found else ""


class _Programs:
    """Computes the scalars of all programs of a launch; what it cannot know is absent.

    Args:
        follow: go through every loop step by step, instead of only through those that hold loops.
    """

    def __init__(
        self, code: Code, grid: tuple[int, ...], arguments: Mapping[str, Any], follow: bool
    ) -> None:
        x, y, z = self.grid = (*grid, 1, 1)[:3]
        number = np.arange(x * y * z)
        self.ids = {"x": number % x, "y": number // x % y, "z": number // (x * y)}
        self.code, self.follow = code, follow
        self.values: dict[str, Any] = {
            f"%{name}": int(arguments[name])
            for name in code.arguments
            if isinstance(arguments.get(name), int)
        }
        self.flops = np.zeros(len(number))
        self.trips = {id(loop): np.zeros(len(number)) for loop in code.loops}

    def run(self) -> Work:
        self._block(self.code.body, np.ones(len(self.flops)))
        return Work(self.flops, [self.trips[id(loop)] for loop in self.code.loops])

    def _block(self, block: list[Operation], runs: Any) -> list[str]:
        """Go through ``block``, which each program runs ``runs`` times; what it yields."""
        for operation in block:
            if operation.name == "scf.yield":
                return operation.operands
            if operation.name == "scf.for":
                self._loop(operation, runs)
            elif operation.name == "scf.if":
                self._branch(operation, runs)
            elif operation.name == "scf.while":
                raise UnreadableCode("a loop with a condition of its own")
            elif operation.name == "tt.dot":
                self.flops += runs * Code._dot(operation).flops
            elif operation.results:
                value = self._scalar(operation)
                if value is None:
                    self.values.pop(operation.results[0], None)
                else:
                    self.values[operation.results[0]] = value
        return []

    def _known(self, name: str) -> Any:
        if name not in self.values:
            raise UnreadableCode(f"{name} is not known")
        return self.values[name]

    def _loop(self, loop: Operation, runs: Any) -> None:
        found = re.match(r" (%[\w.$-]+) = (\S+) to (\S+) step (\S+)", loop.text)
        assert found is not None, loop.text
        index, *bounds = found.groups()
        low, high, step = (self._known(name) for name in bounds)
        count = np.maximum(-(-(high - low) // step), 0)
        self.trips[id(loop)] += runs * count
        carried = re.findall(r"(%[\w.$-]+) = (%[\w.$#-]+)", _carried(loop.text))
        body = loop.regions[0]
        nested = any(o.name == "scf.for" for inside in body for o in inside.walk())
        if not (nested or self.follow):
            for name, _ in carried:
                self.values.pop(name, None)
            self._block(body, runs * count)
            for result in loop.results:
                self.values.pop(result, None)
            return
        state = [self.values.get(outer) for _, outer in carried]
        for i in range(int(np.max(count, initial=0))):
            active = i < count
            self.values[index] = low + i * step
            for (name, _), value in zip(carried, state, strict=True):
                self._set(name, value)
            yielded = self._block(body, runs * active)
            state = [
                _choose(active, self.values.get(new), old)
                for new, old in zip(yielded, state, strict=False)
            ]
        for result, value in zip(loop.results, state, strict=False):
            self._set(result, value)

    def _set(self, name: str, value: Any) -> None:
        if value is None:
            self.values.pop(name, None)
        else:
            self.values[name] = value

    def _branch(self, branch: Operation, runs: Any) -> None:
        condition = self.values.get(branch.operands[0])
        if condition is None:  # taken to run both sides: more than it does
            for region in branch.regions:
                self._block(region, runs)
            for result in branch.results:
                self.values.pop(result, None)
            return
        condition = np.asarray(condition, dtype=bool)
        sides = [
            [self.values.get(name) for name in self._block(region, runs * taken)]
            for region, taken in zip(branch.regions, (condition, ~condition), strict=False)
        ]
        for i, result in enumerate(branch.results):
            self._set(result, _choose(condition, sides[0][i], sides[1][i]))

    def _scalar(self, operation: Operation) -> Any:
        """The value of an operation on integers, None where it is another or not known."""
        kind, name = operation.name.split(".", 1)
        text = operation.text
        if name == "constant":
            found = re.match(r" (-?\d+|true|false)(?: |$)", text)
            return None if found is None else {"true": 1, "false": 0}.get(found[1]) or _int(found)
        if name == "get_program_id":
            return self.ids[text.split()[0]]
        if name == "get_num_programs":
            return self.grid["xyz".index(text.split()[0])]
        operands = [self.values.get(v) for v in operation.operands]
        if kind != "arith" or not operands or any(v is None for v in operands):
            return None
        return _arithmetic(name, text, operands)


def _int(found: re.Match[str]) -> int:
    return 0 if found[1] == "false" else int(found[1])


def _arithmetic(name: str, text: str, operands: list[Any]) -> Any:
    if name in _BINARY:
        return _BINARY[name](*operands)
    if name == "cmpi":
        return np.asarray(_COMPARE[text.split(",")[0].strip()](*operands), dtype=np.int64)
    if name == "select":
        return np.where(np.asarray(operands[0], dtype=bool), *operands[1:])
    if name in ("extsi", "extui", "trunci", "index_cast"):
        return operands[0]
    a, b = (np.asarray(v) for v in (*operands, 1)[:2])
    quotient = np.sign(a) * np.sign(b) * (np.abs(a) // np.maximum(np.abs(b), 1))
    if name in ("divsi", "divui"):  # towards zero, as a GPU does
        return quotient
    if name in ("remsi", "remui"):
        return a - quotient * b
    return None


def _choose(condition: Any, first: Any, second: Any) -> Any:
    return None if first is None or second is None else np.where(condition, first, second)


@functools.lru_cache(maxsize=256)
def read(text: str) -> Code:
    """Parse a kernel's intermediate code."""
    return Code(text)
