"""What ttsem runs: ``python -m ttsem.sanitize pytest tests/kernels/sanitized -m ""``.

ttsem executes Triton's intermediate code in the place of a GPU, and takes over the process for it:
bfloat16 and TF32 as they are, every race, every access out of bounds, at the kernel's line.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import triton

if "ttsem" in sys.modules:  # nobody else can read the code that it leaves in Triton's cache
    triton.knobs.cache.dir = f"{triton.knobs.cache.dir}-ttsem"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent not in item.path.parents:
            continue
        item.add_marker(pytest.mark.slow)
        if "ttsem" not in sys.modules:
            reason = 'needs ttsem: python -m ttsem.sanitize pytest tests/kernels/sanitized -m ""'
            item.add_marker(pytest.mark.skip(reason=reason))
