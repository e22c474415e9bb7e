"""Draw docs/net.svg: the two towers, their exchanges, and the kernel each part runs on.

    python docs/draw_net.py [OUT]

Sizes come from fastalex.model.variants, so the picture is the net.
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

from fastalex.model.variants import VARIANTS

COLOURS = {
    "conv": "#4c78a8",
    "norm": "#b8731a",
    "pool": "#4f8a3d",
    "fc": "#9d6fb0",
    "io": "#777777",
}
WIDTH, HEIGHT, GAP = 1.5, 1.15, 0.42
ROWS = (2.0, 0.0)  # tower 0 above, tower 1 below


def _box(axes: Axes, x: float, y: float, text: str, colour: str, height: float = HEIGHT) -> None:
    axes.add_patch(
        FancyBboxPatch(
            (x, y - height / 2), WIDTH, height, boxstyle="round,pad=0.02,rounding_size=0.08",
            facecolor=colour, edgecolor="none",
        )
    )  # fmt: skip
    axes.text(x + WIDTH / 2, y, text, ha="center", va="center", color="white", fontsize=8.5)


def _arrow(
    axes: Axes, start: tuple[float, float], end: tuple[float, float], crossing: bool
) -> None:
    axes.add_patch(
        FancyArrowPatch(
            start, end, arrowstyle="-|>", mutation_scale=9, shrinkA=1, shrinkB=1,
            color="#c8502d" if crossing else "#555555", linewidth=1.5 if crossing else 1.0,
        )
    )  # fmt: skip


def _columns() -> list[tuple[str, str, bool]]:
    """(text, colour, whether it reads both towers) of each column of boxes, for one tower."""
    variant = VARIANTS["paper"]
    sizes = {1: "55 x 55", 2: "27 x 27", 3: "13 x 13", 4: "13 x 13", 5: "13 x 13"}
    pooled = {1: "27 x 27", 2: "13 x 13", 5: "6 x 6"}
    columns = []
    for index, layer in enumerate(variant.convolutions, start=1):
        maps, k = layer.channels // variant.towers, layer.kernel_size
        text = f"conv{index} + ReLU\n{k} x {k}\n{maps} x {sizes[index]}"
        columns.append((text, COLOURS["conv"], index > 1 and layer.groups == 1))
        if layer.pool:
            name, colour = ("LRN + pool", "norm") if layer.norm else ("max-pool", "pool")
            columns.append((f"{name}\n3 x 3 / 2\n{maps} x {pooled[index]}", COLOURS[colour], False))
    for name in ("fc6", "fc7"):
        columns.append((f"{name} + ReLU\n+ dropout\n2048", COLOURS["fc"], True))
    return columns


def draw() -> plt.Figure:
    columns = _columns()
    total = (len(columns) + 2) * (WIDTH + GAP)
    figure, axes = plt.subplots(figsize=(total * 0.72, 3.6))
    axes.set_xlim(-0.2, total)
    axes.set_ylim(-1.35, 3.2)
    axes.axis("off")
    middle = sum(ROWS) / 2
    _box(axes, 0, middle, "images\n3 x 224 x 224", COLOURS["io"])
    for i, (text, colour, both) in enumerate(columns, start=1):
        x = i * (WIDTH + GAP)
        for y in ROWS:
            _box(axes, x, y, text, colour)
            sources = (middle,) if i == 1 else ROWS if both else (y,)
            for source in sources:
                crossing = i > 1 and source != y
                _arrow(axes, (x - GAP, source), (x, y), crossing)
    x = (len(columns) + 1) * (WIDTH + GAP)
    _box(axes, x, middle, "fc8\n1000 classes", COLOURS["fc"])
    for y in ROWS:
        _arrow(axes, (x - GAP, y), (x, middle), True)
    for y, name in zip(ROWS, ("GPU 0", "GPU 1"), strict=True):
        axes.text(
            WIDTH + GAP,
            y + HEIGHT / 2 + 0.12,
            name,
            fontsize=10,
            fontweight="bold",
            color="#333333",
        )
    axes.text(
        WIDTH / 2,
        -1.1,
        "red: what crosses between the towers",
        fontsize=9,
        color="#c8502d",
        ha="left",
    )
    figure.tight_layout(pad=0.2)
    return figure


if __name__ == "__main__":
    out = Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).with_name("net.svg"))
    matplotlib.rcParams["svg.hashsalt"] = "fastalex"
    metadata = {"Date": None} if out.suffix == ".svg" else None
    draw().savefig(out, metadata=metadata, facecolor="white", dpi=110)
