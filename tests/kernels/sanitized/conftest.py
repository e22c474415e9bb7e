"""What ttsem runs: ``python -m ttsem.sanitize pytest tests/kernels/sanitized -m ""``.

ttsem executes Triton's intermediate code in the place of a GPU, and takes over the process for it:
bfloat16 and TF32 as they are, every race, every access out of bounds, at the kernel's line.
"""

from __future__ import annotations

import importlib
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import triton

if "ttsem" in sys.modules:  # nobody else can read the code that it leaves in Triton's cache
    triton.knobs.cache.dir = f"{triton.knobs.cache.dir}-ttsem"


@pytest.fixture(autouse=True)
def stores_through_descriptors(monkeypatch: pytest.MonkeyPatch) -> None:
    """ttsem 0.1.0 keeps what is stored through a tensor, and not what through a descriptor."""
    sanitize = sys.modules["__main__"]  # which "-m ttsem.sanitize" is
    write_back = sanitize._write_back  # type: ignore[attr-defined]

    def described(record: Any, *rest: Any) -> None:
        bound = {name: getattr(value, "base", value) for name, value in record.bound.items()}
        write_back(replace(record, bound=bound), *rest)

    monkeypatch.setattr(sanitize, "_write_back", described)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent not in item.path.parents:
            continue
        item.add_marker(pytest.mark.slow)
        if "ttsem" not in sys.modules:
            reason = 'needs ttsem: python -m ttsem.sanitize pytest tests/kernels/sanitized -m ""'
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def blocks_of_two_axes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton folds a reshape from [1, m, n] into the load; ttsem 0.1.0 leaves out the reshape."""
    handlers = importlib.import_module("ttsem.ops").OPS
    load = handlers["tt.descriptor_load"]

    def reshaped(*args: Any) -> list[Any]:
        return [block.reshape(block.shape[-2:]) for block in load(*args)]

    monkeypatch.setitem(handlers, "tt.descriptor_load", reshaped)
