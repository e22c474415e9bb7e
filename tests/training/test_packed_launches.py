"""What a replayed launch hands to the driver, against what Triton hands it for the same call.

The driver is a library of functions that do nothing: the rest is Triton's own launcher, compiled.
"""

from __future__ import annotations

import json
import shutil
from typing import Any

import pytest
import torch

from tests import _commands
from tests.training._packed_script import STREAM

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA driver is here"),
    pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc"),
]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("driver")
    process = _commands.run(["-m", "tests.training._packed_script", str(folder)], _commands.ROOT)
    assert process.returncode == 0, process.stderr
    result: dict[str, list[dict[str, Any]]] | None = json.loads(process.stdout.splitlines()[-1])
    if result is None:
        pytest.skip("this Triton compiles a launcher for each kernel, which nothing packs")
    return result


@pytest.mark.parametrize("how", ["packed", "raises", "plain"])
def test_the_driver_gets_the_same_bytes(found: dict[str, list[Any]], how: str) -> None:
    launches = found[how]
    assert len(launches) >= 3
    assert sum(launch["descriptors"] for launch in launches) >= 4
    for launch in launches:
        assert launch["same"], launch
        assert launch["bytes"] > 40
        assert launch["grids"][0] == launch["grids"][1]
        assert launch["streams"] == [0, STREAM]


def test_only_launches_that_read_an_input_ask_triton(found: dict[str, list[Any]]) -> None:
    assert [launch["calls Triton"] for launch in found["packed"]].count(True) == 1
    for launch in found["packed"]:
        assert launch["calls Triton"] is not launch["same with another input"], launch


@pytest.mark.parametrize("how", ["raises", "plain"])
def test_where_triton_has_another_launcher_it_is_called_as_it_is(
    found: dict[str, list[Any]], how: str
) -> None:
    assert all(launch["calls Triton"] for launch in found[how])
