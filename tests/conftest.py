"""What the whole suite shares."""

from __future__ import annotations

import os

# Tensors are small here: the threads of an operation mostly wait for each other, ten times as long
# where other processes want the cores too.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("FASTALEX_CHECK", "never")  # test_check.py does; each size would be timed

from pathlib import Path

import pytest
import torch
from hypothesis import settings

from fastalex.data import datasets
from fastalex.model.variants import VARIANTS
from tests import _small_train

# The same examples on every run and machine, and no limit on the time of one.
settings.register_profile("fastalex", derandomize=True, deadline=None, print_blob=False)
settings.load_profile("fastalex")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to run in, with the small net and few images."""
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    for name, variant in VARIANTS.items():
        monkeypatch.setitem(VARIANTS, name, _small_train.thin(variant))
    monkeypatch.setattr(datasets, "TRAIN_COUNT", _small_train.TRAIN_COUNT)
    monkeypatch.setattr(datasets, "VAL_COUNT", _small_train.VAL_COUNT)
    monkeypatch.chdir(tmp_path)
    return tmp_path
