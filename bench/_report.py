"""What a run of the benchmarks reports: the table at its end, and the files of results."""

from __future__ import annotations

import functools
import json
import re
from dataclasses import dataclass, field
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from fastalex.common.files import replacing
from fastalex.common.provenance import device_name, provenance
from fastalex.common.tables import table
from fastalex.inspection.cost import Floor

from ._timing import Rates, Times, rate

UNITS = ("GFLOP/s", "GB/s", "images/s")
RESULTS = Path(__file__).parent / "results"


@dataclass
class Report:
    """Every comparison of a run, by theme; a theme is a file of results."""

    rates: Rates | None  # None on a CPU
    folder: Path | None = None  # where each comparison is saved as soon as it is made
    themes: dict[str, list[dict[str, Any]]] = field(default_factory=dict)

    def add(
        self, benchmark: Any, theme: str, times: Times | None, work: Floor | int, **row: Any
    ) -> None:
        """Add a comparison to the report and to the benchmark's ``extra_info``.

        Args:
            times: None, under --benchmark-disable, adds nothing.
            row: what was compared: layer, direction, against, batch, dtype, ...
        """
        if times is None:
            return
        ours, theirs = times.median()
        unit, speed = rate(work, ours)
        row |= {"device": device_name(device()), "ours ms": ours * 1e3, "theirs ms": theirs * 1e3}
        row |= {"ratio": theirs / ours, unit: speed}
        row |= {f"{name} host ms": seconds * 1e3 for name, seconds in times.host.items()}
        if self.rates is not None and isinstance(work, Floor):
            row["share of floor"] = self.rates.floor(work) / ours
        benchmark.extra_info.update(row)
        rounds = {"ours": times.ours, "theirs": times.theirs}
        row["rounds ms"] = {k: [round(s * 1e3, 4) for s in v] for k, v in rounds.items()}
        rows = self.themes.setdefault(theme, [])
        rows.append(row)
        if self.folder is not None:
            save(theme, rows, self.folder)


def lines(rows: list[dict[str, Any]]) -> list[str]:
    """Our time beside the other's, a line for each comparison."""
    cells = [["layer", "direction", "against", "ours ms", "theirs ms", "ratio", "ours at"]]
    for row in rows:
        speed = next(f"{row[unit]:,.1f} {unit}" for unit in UNITS if unit in row)
        if "share of floor" in row:
            speed += f", {row['share of floor']:.0%} of the floor"
        times = f"{row['ours ms']:.3f}", f"{row['theirs ms']:.3f}", f"{row['ratio']:.2f}"
        cells.append([row["layer"], row["direction"], row["against"], *times, speed])
    return table(cells, right=4)


@functools.cache
def _provenance() -> dict[str, Any]:
    return provenance(device())


def save(theme: str, rows: list[dict[str, Any]], folder: Path) -> Path:
    """Write a theme's comparisons into ``folder`` with what is needed to repeat them."""
    content = {"theme": theme, **_provenance(), "results": rows}
    content["versions"] = {**content["versions"], "pytest-benchmark": version("pytest-benchmark")}
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / results_name(theme)
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n")
    return path


def results_name(theme: str) -> str:
    """``THEME_DEVICE_YYYYMM.json``; every processor is called cpu."""
    name = device_name(device()) if torch.cuda.is_available() else "cpu"
    name = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    return f"{theme}_{name}_{date.today():%Y%m}.json"


def device() -> torch.device:
    """Where the benchmarks run."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def conditions(row: dict[str, Any]) -> str:
    threads = "" if torch.cuda.is_available() else f", {torch.get_num_threads()} threads"
    return f"{row['device']}{threads}, {row['dtype']}, batch {row['batch']}"
