"""Figures of matplotlib, which is an extra and imported when the first figure is made.

Nothing is shown on a screen: figures are made without pyplot and rendered by Agg.
"""

from __future__ import annotations

from typing import Any

DPI = 300
_STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.size": 7.0,
    "axes.linewidth": 0.6,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "pdf.fonttype": 42,  # outlines that editors and submission systems take
}


class MissingMatplotlib(ValueError):
    """matplotlib is not installed; the message says how to."""


def new_figure(width: float, height: float) -> Any:
    """An empty ``matplotlib.figure.Figure`` of a size in inches.

    Raises:
        MissingMatplotlib: where it can't be imported.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingMatplotlib(
            f"figures need matplotlib ({error}): pip install 'fastalex[figures]'"
        ) from error
    matplotlib.rcParams.update(_STYLE)
    return Figure(figsize=(width, height), dpi=DPI)
