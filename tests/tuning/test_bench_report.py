"""A run of the benchmarks that is cut off leaves what it had measured."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

from bench._report import Report
from bench._timing import Times


def test_each_comparison_is_on_disk_as_soon_as_it_is_made(tmp_path: Path) -> None:
    report, benchmark = Report(None, tmp_path), SimpleNamespace(extra_info={})
    times = Times([2e-3, 1e-3, 4e-3], [6e-3, 6e-3, 5e-3], {"ours": 1e-4})
    for count, against in enumerate(("stock", "no graph"), 1):
        report.add(benchmark, "step", times, 8, layer="step", against=against)
        (path,) = tmp_path.iterdir()
        rows = json.loads(path.read_text())["results"]
        assert len(rows) == count
        assert rows[-1]["against"] == against
        assert (rows[-1]["ours ms"], rows[-1]["theirs ms"], rows[-1]["ratio"]) == (2.0, 6.0, 3.0)
        assert rows[-1]["ours host ms"] == 0.1
        assert rows[-1]["rounds ms"]["theirs"] == [6.0, 6.0, 5.0]
