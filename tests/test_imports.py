"""What an import does, and which module may import which."""

from __future__ import annotations

import ast
import graphlib
import subprocess
import sys
from importlib.util import resolve_name

import pytest

from tests._commands import ROOT, environment

PACKAGES = {"fastalex": ROOT / "fastalex", "fastalex_kernels": ROOT / "kernels/fastalex_kernels"}

# A machine whose driver ends the program that asks it anything.
POISON = """
import importlib, os, pkgutil, sys
import torch, triton
import triton.compiler  # whatever Triton itself does on import is done

def refuse(*_, **__):
    raise AssertionError("a driver was asked")

driver = sys.modules["triton.runtime.driver"]
driver._create_driver = refuse
type(driver.driver).active = type(driver.driver).default = property(refuse)
for name in ("init", "_lazy_init", "is_available", "device_count", "current_device",
             "get_device_properties", "get_device_capability", "get_device_name"):
    setattr(torch.cuda, name, refuse)
torch._C._cuda_getDeviceCount = torch._C._cuda_init = refuse
"""
CHECK = """
for ask in (lambda: driver.driver.active, torch.cuda.is_available, torch.cuda.device_count):
    try:
        ask()
    except AssertionError:
        continue
    raise SystemExit("the poison does not work")
"""
# The command lines too: only running one may look for a GPU.
ALL_MODULES = """
names = [m.name for p in (fastalex, fastalex_kernels)
         for m in pkgutil.walk_packages(p.__path__, p.__name__ + ".")]
for name in names:
    importlib.import_module(name)
assert "fastalex.model.alexnet" in names and "fastalex_kernels.conv2d.forward" in names
"""


def _run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=240,
    )


@pytest.mark.parametrize(
    "code", ["import fastalex, fastalex_kernels", f"import fastalex, fastalex_kernels{ALL_MODULES}"]
)
def test_importing_asks_no_driver_and_says_nothing(code: str) -> None:
    process = _run(POISON + CHECK + code)
    assert (process.returncode, process.stdout, process.stderr) == (0, "", "")


def test_importing_starts_neither_cuda_nor_a_triton_driver() -> None:
    code = (
        "import fastalex, fastalex_kernels, sys, torch\n"
        "driver = sys.modules['triton.runtime.driver'].driver\n"
        "assert driver._active is None and driver._default is None\n"
        "assert not torch.cuda.is_initialized()\n"
    )
    process = _run(code)
    assert process.returncode == 0, process.stderr


def _trees() -> dict[str, ast.Module]:
    """Every module of both packages by its full name."""
    trees = {}
    for package, root in PACKAGES.items():
        for path in sorted(root.rglob("*.py")):
            parts = [package, *path.relative_to(root).with_suffix("").parts]
            name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            trees[name] = ast.parse(path.read_text(), str(path))
    return trees


TREES = _trees()


def _imported(name: str) -> set[str]:
    """All that a module imports, at its top or inside a function, as full names."""
    found = set()
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            is_package = any(other.startswith(f"{name}.") for other in TREES)
            here = name if is_package else name.rpartition(".")[0]
            module = resolve_name("." * node.level + (node.module or ""), here)
            submodules = {f"{module}.{alias.name}" for alias in node.names} & set(TREES)
            found |= submodules | ({module} if len(submodules) < len(node.names) else set())
    return found


def _ours(name: str) -> set[str]:
    return _imported(name) & set(TREES)


def _reaches(start: str) -> set[str]:
    """The modules of ours that importing ``start`` loads."""
    seen, waiting = set(), [start]
    while waiting:
        name = waiting.pop()
        if name not in seen:
            seen.add(name)
            waiting += _ours(name)
    return seen


def test_the_kernels_know_nothing_of_the_model() -> None:
    names = [name for name in TREES if name.split(".")[0] == "fastalex_kernels"]
    assert len(names) > 5
    for name in names:
        assert not {i for i in _imported(name) if i.split(".")[0] == "fastalex"}, name


def test_the_model_knows_nothing_of_processes() -> None:
    # Importing a module imports its package first, which imports the rest when it is asked for.
    names = _reaches("fastalex.model.alexnet")
    assert {
        "fastalex.model.layers",
        "fastalex.model.variants",
        "fastalex_kernels.conv2d.forward",
    } <= names
    for name in names:
        assert not {i for i in _imported(name) if i.startswith("torch.distributed")}, name
    assert "fastalex.distributed.towers" not in names


ROOMS = {  # a module imports from its own room and from rooms before it
    "fastalex": [
        "common", "model", "data", "distributed", "training", "evaluation", "formats", "inspection",
        "tuning",
    ],
    "fastalex_kernels": [
        "common", "reference", "aten", "momentum", "conv2d", "linear", "lrn_pool",
        "augment", "cross_entropy", "layers",
    ],
}  # fmt: skip


def _room(name: str) -> tuple[str, int]:
    """The package of a module, and how far up its room is; the doors of a package are the last."""
    package, *parts = name.split(".")
    rooms = ROOMS[package]
    if not parts or (package == "fastalex" and len(parts) == 1 and parts[0] not in rooms):
        return package, -1 if parts == ["_version"] else len(rooms)
    return package, rooms.index(parts[0])


def test_imports_run_one_way() -> None:
    wrong = []
    for name in TREES:
        package, place = _room(name)
        for other in _ours(name):
            other_package, other_place = _room(other)
            if other_package == package and other_place > place:
                wrong.append((name, other))
    assert wrong == []


def test_no_module_of_another_package_is_imported_by_a_private_name() -> None:
    private = [
        (name, other)
        for name in TREES
        for other in _ours(name)
        if name.split(".")[0] != other.split(".")[0]
        and any(part.startswith("_") for part in other.split("."))
    ]
    assert private == []


def test_no_two_modules_need_each_other() -> None:
    graph = {name: _ours(name) - {name} for name in TREES}
    assert len(list(graphlib.TopologicalSorter(graph).static_order())) == len(TREES)


def _is_launch(node: ast.AST) -> bool:
    """kernel[grid](...), with a name that says what is launched."""
    return (
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Subscript)
        and isinstance(node.func.value, ast.Name)
        and node.func.value.id.endswith("kernel")
    )


def test_kernels_are_launched_in_one_place() -> None:
    launching = {n for n, tree in TREES.items() if any(_is_launch(x) for x in ast.walk(tree))}
    assert launching == {"fastalex_kernels.common.launch"}
