"""What the benchmarks share: options, the device, and the table at the end."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._functorch import config as functorch_config

from ._report import RESULTS, Report, conditions, lines
from ._report import device as _report_device
from ._timing import Rates

THREADS = 2  # on a CPU
_report = pytest.StashKey[Report]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fastalex")
    group.addoption("--compiled", action="store_true", help="also against torch.compile")
    group.addoption(
        "--save-results",
        nargs="?",
        type=Path,
        const=RESULTS,
        metavar="DIR",
        help="write DIR/THEME_DEVICE_YYYYMM.json after every comparison (bench/results)",
    )
    group.addoption("--batch-size", type=int, metavar="N", help="images (a size for the device)")
    group.addoption("--rounds", type=int, metavar="N", help="times that each call is timed")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    config.option.benchmark_quiet = True  # its tables show one side of a comparison only
    torch.set_num_threads(THREADS)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--compiled"):
        # A backward pass is timed many times: its saved tensors must not be reused by the first.
        functorch_config.donated_buffer = False
        return
    for item in items:
        if item.get_closest_marker("compiled"):
            item.add_marker(pytest.mark.skip(reason="torch.compile takes minutes: --compiled"))


@pytest.fixture(scope="session")
def report(request: pytest.FixtureRequest, device: str, dtype: torch.dtype) -> Report:
    """Where comparisons go; on a GPU its two rates are measured first, for the floor."""
    rates = Rates.measure(dtype) if device == "cuda" else None
    folder = request.config.getoption("--save-results")
    return request.config.stash.setdefault(_report, Report(rates, folder))


@pytest.fixture(scope="session")
def device() -> str:
    return _report_device().type


@pytest.fixture(scope="session")
def sizes(request: pytest.FixtureRequest) -> Callable[[int, int], tuple[int, int]]:
    """The batch and rounds to use, from those that suit the device."""
    given = [request.config.getoption(name) for name in ("--batch-size", "--rounds")]
    return lambda batch, rounds: (given[0] or batch, given[1] or rounds)


@pytest.fixture(scope="session")
def dtype(device: str) -> torch.dtype:
    return torch.bfloat16 if device == "cuda" else torch.float32


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    if _report not in config.stash:  # nothing ran
        return
    themes = config.stash[_report].themes
    for theme, rows in themes.items():
        terminalreporter.section(f"{theme}: {conditions(rows[0])}")
        for line in lines(rows):
            terminalreporter.write_line(line)
    folder = config.getoption("--save-results")
    if folder is not None and themes:
        terminalreporter.write_line(f"saved in {folder}: {', '.join(themes)}")
