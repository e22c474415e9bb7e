"""The profiler's chart: a dot for each time on a logarithmic scale, whose distances are ratios."""

from __future__ import annotations

from typing import Any

from fastalex.common.figures import new_figure

_MARKS = {
    "ours": ("o", "#c8641e"),
    "torch": ("s", "#2f5d9b"),
    "compiled": ("D", "#7d9dc4"),
    "floor": ("|", "#404040"),
}
_DPI = 200


def new_chart(rows: int = 12) -> Any:
    """An empty figure for so many layers."""
    return new_figure(7.2, 1.1 + 0.23 * rows, _DPI)


def draw(report: dict[str, Any]) -> Any:
    """The figure of a report of ``fastalex.profiler``."""
    results = report["results"]
    layers = list(dict.fromkeys(row["layer"] for row in results))
    figure = new_chart(len(layers))
    passes = list(dict.fromkeys(row["pass"] for row in results))
    panels = figure.subplots(1, len(passes), sharex=True, sharey=True, squeeze=False)[0]
    for panel, which in zip(panels, passes, strict=True):
        rows = {row["layer"]: row for row in results if row["pass"] == which}
        names = [*results[0]["ms"], "floor"]
        for name in names:
            found = [(_value(rows[x], name), i) for i, x in enumerate(layers) if x in rows]
            points = [(x, i) for x, i in found if x is not None]
            if points:
                mark, color = _MARKS[name]
                x, y = zip(*points, strict=True)
                size = {"ours": 14, "floor": 60}.get(name, 26)
                panel.scatter(
                    x, y, size, marker=mark, c=color, label=name, zorder=3 if name == "ours" else 2
                )
        panel.set_title(which, fontsize=8)
        panel.set_xscale("log")
        panel.set_xlabel("milliseconds")
        panel.grid(axis="both", color="#e4e4e4", linewidth=0.6)
        panel.set_axisbelow(True)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_yticks(range(len(layers)), layers)
    panels[0].invert_yaxis()
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=len(labels), frameon=False)
    figure.suptitle(
        f"AlexNet ({report['variant']}), batch {report['batch_size']}, {report['dtype']}\n"
        f"{report['device']}",
        fontsize=8,
    )
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    return figure


def _value(row: dict[str, Any], name: str) -> float | None:
    value: float | None = row["floor ms"] if name == "floor" else row["ms"].get(name)
    return value
