"""What a run of the benchmarks reports: the table at its end, and the files of results."""

from __future__ import annotations

import json
import platform
import re
import subprocess
from dataclasses import dataclass, field
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import fastalex

from ._timing import Rates, Times, Work

UNITS = ("GFLOP/s", "GB/s", "images/s")
RESULTS = Path(__file__).parent / "results"


@dataclass
class Report:
    """Every comparison of a run, by theme; a theme is a file of results."""

    rates: Rates | None  # None on a CPU
    themes: dict[str, list[dict[str, Any]]] = field(default_factory=dict)

    def add(self, benchmark: Any, theme: str, times: Times | None, work: Work, **row: Any) -> None:
        """Add a comparison to the report and to the benchmark's ``extra_info``.

        Args:
            times: None, under --benchmark-disable, adds nothing.
            row: what was compared: layer, direction, against, batch, dtype, ...
        """
        if times is None:
            return
        ours, theirs = times.median()
        unit, rate = work.rate(ours)
        row |= {"device": device_name(), "ours ms": ours * 1e3, "theirs ms": theirs * 1e3}
        row |= {"ratio": theirs / ours, unit: rate}
        if self.rates is not None and not work.images:
            row["share of floor"] = self.rates.floor(work) / ours
        benchmark.extra_info.update(row)
        rounds = {"ours": times.ours, "theirs": times.theirs}
        row["rounds ms"] = {k: [round(s * 1e3, 4) for s in v] for k, v in rounds.items()}
        self.themes.setdefault(theme, []).append(row)


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Our time beside the other's, a line for each comparison."""
    titles = f"{'layer':<12}{'direction':<10}{'against':<12}{'ours ms':>10}{'theirs ms':>11}"
    lines = [f"{titles}{'ratio':>7}  ours at"]
    for row in rows:
        rate = next(f"{row[unit]:,.1f} {unit}" for unit in UNITS if unit in row)
        share = f", {row['share of floor']:.0%} of the floor" if "share of floor" in row else ""
        lines.append(
            f"{row['layer']:<12}{row['direction']:<10}{row['against']:<12}"
            f"{row['ours ms']:>10.3f}{row['theirs ms']:>11.3f}{row['ratio']:>7.2f}  {rate}{share}"
        )
    return lines


def save(theme: str, rows: list[dict[str, Any]]) -> Path:
    """Write a theme's comparisons with what is needed to repeat them."""
    today = date.today()
    name = rows[0]["device"] if torch.cuda.is_available() else "cpu"
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    content = {
        "theme": theme,
        "date": today.isoformat(),
        "commit": _commit(),
        "device": rows[0]["device"],
        "host cpu": _host_cpu(),
        "threads": torch.get_num_threads(),
        "versions": {
            "fastalex": fastalex.__version__,
            "python": platform.python_version(),
            "cuda": torch.version.cuda,
            **{name: version(name) for name in ("torch", "triton", "pytest-benchmark")},
        },
        "results": rows,
    }
    path = RESULTS / f"{theme}_{slug}_{today:%Y%m}.json"
    RESULTS.mkdir(exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n")
    return path


def device_name() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else _host_cpu()


def conditions(row: dict[str, Any]) -> str:
    threads = "" if torch.cuda.is_available() else f", {torch.get_num_threads()} threads"
    return f"{row['device']}{threads}, {row['dtype']}, batch {row['batch']}"


def _host_cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _commit() -> str:
    """The commit that was measured, "-dirty" where files differ from it; "unknown" outside git."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, cwd=RESULTS.parent, capture_output=True, text=True)
    except OSError:
        return "unknown"
    return done.stdout.strip() or "unknown"
