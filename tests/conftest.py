"""What the whole suite shares."""

from __future__ import annotations

import pytest
import torch
from hypothesis import settings

# The same examples on every run and machine, and no limit on the time of one.
settings.register_profile("fastalex", derandomize=True, deadline=None, print_blob=False)
settings.load_profile("fastalex")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))
