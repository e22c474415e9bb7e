"""No kernel that starts early touches memory before it has waited for the one before it.

Why that is enough is said in fastalex_kernels/common/dependent.py. Compilers reorder, so it is the
machine code that is read.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl

import fastalex_kernels
from fastalex.common.compile import compile_launch
from fastalex.inspection import offline
from fastalex.inspection.record import record_step
from fastalex.inspection.sass import Instruction
from fastalex_kernels.common.backend import interpreted, record_launches
from fastalex_kernels.common.dependent import wait_for_predecessor
from fastalex_kernels.common.launch import call, launch
from fastalex_kernels.common.program import Launch, Program

WAIT, SIGNAL = "ACQBULK", "PREEXIT"  # griddepcontrol.wait and .launch_dependents
# Of global memory, by threads, the tensor memory accelerator and prefetches; LDC reads arguments.
ACCESS = re.compile(r"(LD|LDG|LDGSTS|ST|STG|SULD|SUST|REDG?|ATOMG?|CCTL\w*|UTMA\w+|UBLK\w+)\b")
compiles = pytest.mark.skipif(interpreted(), reason="an interpreted kernel has no machine code")


def fault(code: Sequence[Instruction], early: bool = True) -> str | None:
    """Why a thread may touch memory, or let the next kernel start, before it has waited.

    Without ``early`` a kernel is not to wait at all.
    """
    if not early:
        found = (i.name for i in code if i.name.startswith((WAIT, SIGNAL)))
        return next(found, None)
    waits = [n for n, i in enumerate(code) if i.name.startswith(WAIT)]
    if len(waits) != 1 or code[waits[0]].guarded:
        return f"{len(waits)} waits, or one under a condition"
    places = {label: n for n, i in enumerate(code) for label in i.labels}
    before, after = code[: waits[0]], code[waits[0] :]
    barriers = [n for n, i in enumerate(code) if i.name.startswith("BAR.SYNC")]
    accesses = [n for n, i in enumerate(code) if ACCESS.match(i.name)]
    for instruction in before:
        if ACCESS.match(instruction.name) or instruction.name.startswith((SIGNAL, "EXIT", "CALL")):
            return f"{instruction.name} before the wait"
        target = re.search(r"\.L\w+", instruction.operands)
        place = places[target[0]] if target and instruction.name.startswith("BR") else 0
        if place > waits[0]:
            # Warps that only fetch meet those that have waited before they touch memory.
            met = min((n for n in barriers if n > place), default=len(code))
            early = any(n < waits[0] for n in barriers)
            if early or any(place <= n < met for n in accesses):
                return "a jump over the wait"
    if not any(ACCESS.match(i.name) for i in after):
        return "no access at all"
    return None if any(i.name.startswith(SIGNAL) for i in after) else "no signal"


@compiles
@pytest.mark.parametrize("towers", [1, 2])
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "sm_120", "gfx942"])
def test_most_launches_of_a_step_start_early(target: str, towers: int) -> None:
    """That each of them waits first is read with the rest of its machine code."""
    events = record_step(target, 128, towers=towers).events
    early = [event.launch.starts_early for event in events if event.launch is not None]
    assert not any(early) if target in ("sm_80", "gfx942") else sum(early) > len(early) / 2


@triton.jit
def _late(x_ptr, y_ptr):
    x = tl.load(x_ptr)
    wait_for_predecessor()
    tl.store(y_ptr, x)


@triton.jit
def _sometimes(x_ptr, y_ptr):
    if tl.program_id(0) < 4:
        wait_for_predecessor()
    tl.store(y_ptr, tl.load(x_ptr))


@triton.jit
def _kernel(x_ptr, y_ptr):
    wait_for_predecessor()
    tl.store(y_ptr, tl.load(x_ptr))


@compiles
@pytest.mark.compiled
def test_a_wait_that_comes_late_is_seen() -> None:
    x = torch.empty(16, device="meta")
    launches = [
        Launch.of("", "", kernel, (8,), (x, x), {"launch_pdl": True})
        for kernel in (_kernel, _late, _sometimes)
    ]
    code = [offline.read(compile_launch(one, "sm_90")).instructions for one in launches]
    found = list(map(fault, code))
    assert found[0] is None
    assert fault(code[0], early=False) == "ACQBULK"
    assert found[1] == "LDG.E before the wait"
    assert found[2] is not None


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "sm_120", "gfx942", "interpreter"])
def test_only_a_launch_after_a_launch_starts_early(target: str) -> None:
    x, y = torch.zeros(16), torch.zeros(16)
    started: list[bool] = []

    def recorder(kernel: object, grid: object, args: object, options: dict[str, object]) -> None:
        started.append(bool(options.get("launch_pdl")))

    def early(**options: bool) -> list[bool]:
        started.clear()
        with record_launches(target, recorder), Program([x], **options).recording() as program:
            for _ in range(3):
                launch(_kernel, (1,), x, y, counted=1)
            call(y.copy_, x)
            launch(_kernel, (0,), x, y, counted=1)  # is none
            for _ in range(2):
                launch(_kernel, (1,), x, y, counted=1)
        assert started == [one.starts_early for one in program.launches if one.grid is not None]
        return list(started)

    able = target in ("sm_90", "sm_100", "sm_120")
    assert early() == [False, able, able, False, able]
    assert early(after_torch=True) == [able, able, able, False, able]
    assert not any(early(dependent=False))
    started.clear()
    with record_launches(target, recorder):
        launch(_kernel, (1,), x, y, counted=1)
        launch(_kernel, (1,), x, y, counted=1)
    assert started == [False, False], "outside of a program nothing is known of the one before"


def _kernels() -> Iterator[ast.FunctionDef]:
    """The functions of the package that are launched."""
    for path in Path(fastalex_kernels.__file__).parent.rglob("*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel"):
                yield node


@pytest.mark.parametrize("kernel", list(_kernels()), ids=lambda node: node.name)
def test_a_kernel_waits_in_its_first_statement(kernel: ast.FunctionDef) -> None:
    decorators = " ".join(map(ast.unparse, kernel.decorator_list))
    assert re.search(r"\b(triton|gluon)\.jit\b", decorators)
    first = kernel.body[1 if ast.get_docstring(kernel) else 0]
    assert ast.unparse(first) == "wait_for_predecessor()"
