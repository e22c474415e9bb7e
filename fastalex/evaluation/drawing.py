"""The paper's figures drawn from arrays, and written as PNG and PDF.

matplotlib is imported when the first figure is made, for it is an extra. Nothing is shown on a
screen: figures are made without pyplot and rendered by Agg.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fastalex.common.figures import DPI, new_figure
from fastalex.common.files import replacing
from fastalex.data.base import Pixels

KERNEL_SCALE = 8  # pixels of the PNG for each weight of a conv1 kernel
_COLUMNS = 16  # kernels in a row, as in Figure 3
_LINES = 3  # of a name
_TITLE, _NAME, _SMALL = 7.5, 6.5, 5.5  # points
_DOTTED = 40  # epochs up to which each is marked
_GREY, _RED, _BLUE, _ORANGE = "#b8c4d6", "#e07a6a", "#2f5d9b", "#c8641e"

Weights = npt.NDArray[np.float32]


def save_figure(figure: Any, stem: Path) -> list[Path]:
    """Write ``stem`` with .png and .pdf added, each atomically; returns the two paths."""
    paths = []
    for kind in ("png", "pdf"):
        path = stem.with_name(f"{stem.name}.{kind}")
        # Without a date the same figure is the same file.
        metadata = {"CreationDate": None} if kind == "pdf" else {}
        with replacing(path) as temporary:
            figure.savefig(temporary, format=kind, metadata=metadata)
        paths.append(path)
    return paths


def kernel_grid(kernels: Weights, columns: int = _COLUMNS) -> Pixels:
    """Kernels as coloured tiles, row by row, with a white line of one pixel around each.

    Each kernel is scaled by its own largest weight: zero is grey 128 (127.5 rounded), the largest
    weight in size is 0 or 255.

    Args:
        kernels: float32 [n, 3, k, k], in the order R, G, B.
        columns: tiles in a row.

    Returns:
        uint8 [rows * (k + 1) + 1, columns * (k + 1) + 1, 3].
    """
    count, _, side, _ = kernels.shape
    rows = -(-count // columns)
    grid: Pixels = np.full((rows * (side + 1) + 1, columns * (side + 1) + 1, 3), 255, np.uint8)
    for i, kernel in enumerate(kernels):
        largest = float(np.abs(kernel).max()) or 1.0
        tile = np.rint(127.5 + 127.5 * kernel.transpose(1, 2, 0).astype(np.float64) / largest)
        top, left = (n * (side + 1) + 1 for n in divmod(i, columns))
        grid[top : top + side, left : left + side] = tile.astype(np.uint8)
    return grid


def draw_kernels(kernels: Weights, towers: int, scale: int = KERNEL_SCALE) -> Any:
    """The first layer's kernels, tower by tower, as in Figure 3.

    A weight is a square of ``scale`` x ``scale`` pixels of the PNG, without any smoothing.

    Args:
        kernels: float32 [n, 3, k, k].
        towers: blocks to draw them in, of n / towers each.
        scale: pixels for each weight.

    Returns:
        The figure.
    """
    columns = _COLUMNS
    blocks = [kernel_grid(block, columns) for block in np.split(kernels, towers)]
    gap, margin = 4 * scale, (10 * scale if towers > 1 else 2 * scale)
    heights = [len(block) * scale for block in blocks]
    height = sum(heights) + gap * (towers - 1) + 4 * scale
    width = blocks[0].shape[1] * scale + margin + 2 * scale
    figure = new_figure(width / DPI, height / DPI)
    top = 2 * scale
    for number, (block, tall) in enumerate(zip(blocks, heights, strict=True), 1):
        place = (margin, height - top - tall, block.shape[1] * scale, tall)
        # Repeated here, so that no renderer has a pixel to choose.
        enlarged = block.repeat(scale, 0).repeat(scale, 1)
        whole = (width, height, width, height)
        axes = figure.add_axes([v / w for v, w in zip(place, whole, strict=True)])
        axes.imshow(enlarged, interpolation="none", aspect="auto")
        axes.set_axis_off()
        if towers > 1:
            middle = 1 - (top + tall / 2) / height
            figure.text(
                margin / 2 / width, middle, f"tower {number}", rotation=90, ha="center", va="center"
            )
        top += tall + gap
    return figure


@dataclass(frozen=True)
class Prediction:
    """What a net said of one picture.

    Attributes:
        pixels: uint8 [D, D, 3].
        label: the correct class, if known.
        guesses: the most probable classes and their probabilities, best first.
    """

    pixels: Pixels
    label: str | None
    guesses: list[tuple[str, float]]


def draw_predictions(predictions: Sequence[Prediction], columns: int = 4) -> Any:
    """Pictures, each with its correct label and bars of the most probable, as in Figure 4, left.

    The bar of the correct label is red.

    Args:
        predictions: at least one.
        columns: pictures in a row.

    Returns:
        The figure.
    """
    columns = min(columns, len(predictions))
    rows = -(-len(predictions) // columns)
    bars = max(len(p.guesses) for p in predictions)
    wide, gap = 1.55, 0.18  # inches
    labels = [_wrapped(p.label or "", wide, _TITLE) for p in predictions]
    names = [_wrapped(name, wide, _NAME) for p in predictions for name, _ in p.guesses]
    label, bar = 0.08 + 0.12 * _lines(labels), 0.03 + 0.105 * _lines(names)
    tall = wide + label + bars * bar
    width, height = columns * (wide + gap) + gap, rows * (tall + gap) + gap
    figure = new_figure(width, height)
    for i, prediction in enumerate(predictions):
        row, column = divmod(i, columns)
        left, top = gap + column * (wide + gap), height - gap - row * (tall + gap)
        picture = _axes(figure, left, top - wide, wide, wide)
        picture.imshow(prediction.pixels, interpolation="antialiased")
        _frame(picture)
        figure.text(
            (left + wide / 2) / width,
            (top - wide - label / 2) / height,
            labels[i],
            ha="center",
            va="center",
            fontsize=_TITLE,
            linespacing=1.0,
            fontweight="bold",
        )
        below = len(prediction.guesses) * bar
        _bars(_axes(figure, left, top - wide - label - below, wide, below), prediction, wide)
    return figure


def _bars(axes: Any, prediction: Prediction, width: float) -> None:
    names, shares = zip(*prediction.guesses, strict=True)
    places = range(len(names))
    colours = [_RED if name == prediction.label else _GREY for name in names]
    axes.barh(places, shares, height=0.86, color=colours)
    for place, name in zip(places, names, strict=True):
        text = _wrapped(name, width, _NAME)
        va = "center" if "\n" in text else "center_baseline"
        axes.text(0.02, place, text, va=va, fontsize=_NAME, linespacing=1.0)
    axes.set_xlim(0, 1)
    axes.set_ylim(len(names) - 0.5, -0.5)
    _frame(axes)


@dataclass(frozen=True)
class Neighbours:
    """One picture and those nearest to it; pixels are uint8 [D, D, 3]."""

    pixels: Pixels
    label: str
    nearest: list[tuple[Pixels, str]]


def draw_neighbours(rows: Sequence[Neighbours]) -> Any:
    """A picture in the first column and those nearest to it beside it, as in Figure 4, right.

    The name of another class than the first column's is red.

    Args:
        rows: at least one, each with the same number of neighbours.

    Returns:
        The figure.
    """
    count = len(rows[0].nearest)
    side, gap, apart = 0.86, 0.07, 0.22  # inches
    names = [name for row in rows for name in (row.label, *(name for _, name in row.nearest))]
    label = 0.06 + 0.09 * _lines(_wrapped(name, side, _SMALL) for name in names)
    width = 2 * gap + side + apart + count * (side + gap)
    heading = 0.22
    height = len(rows) * (side + label) + heading + gap
    figure = new_figure(width, height)
    for number, row in enumerate(rows):
        bottom = height - heading - number * (side + label) - side
        pictures = [(row.pixels, row.label), *row.nearest]
        for column, (pixels, name) in enumerate(pictures):
            left = gap + column * (side + gap) + (apart if column else 0)
            axes = _axes(figure, left, bottom, side, side)
            axes.imshow(pixels, interpolation="antialiased")
            _frame(axes)
            figure.text(
                (left + side / 2) / width,
                (bottom - label / 2) / height,
                _wrapped(name, side, _SMALL),
                ha="center",
                va="center",
                fontsize=_SMALL,
                linespacing=1.0,
                color="black" if name == row.label else "#c0392b",
            )
    for left, what in ((gap, "test image"), (2 * gap + side + apart, "nearest training images")):
        figure.text(left / width, 1 - heading / 2 / height, what, va="center", fontweight="bold")
    return figure


@dataclass(frozen=True)
class Curves:
    """A run's records: x is steps, losses are means, errors are shares from 0 to 1."""

    steps: list[int]
    loss: list[float]
    rates: list[float]
    epoch_steps: list[int]
    val_loss: list[float]
    top1: list[float]
    top5: list[float]


def draw_curves(curves: Curves) -> Any:
    """Training and validation loss, and validation errors, over the steps of a run.

    Dotted lines are where the learning rate fell.

    Args:
        curves: with at least one step or epoch.

    Returns:
        The figure.
    """
    figure = new_figure(6.9, 2.6)
    left, right = _axes(figure, 0.5, 0.45, 2.8, 1.95), _axes(figure, 3.9, 0.45, 2.8, 1.95)
    line: dict[str, Any] = {"linewidth": 0.9}
    dots = {**line, "clip_on": False, "zorder": 3}
    if len(curves.epoch_steps) < _DOTTED:
        dots |= {"marker": "o", "markersize": 2.5}
    left.plot(curves.steps, curves.loss, color=_BLUE, label="training", **line)
    left.plot(curves.epoch_steps, curves.val_loss, color=_ORANGE, label="validation", **dots)
    left.set_ylabel("loss (nats)")
    for values, name, colour in ((curves.top1, "top-1", _BLUE), (curves.top5, "top-5", _ORANGE)):
        percent = [100 * value for value in values]
        right.plot(curves.epoch_steps, percent, color=colour, label=f"{name}, validation", **dots)
    right.set_ylabel("error (%)")
    last = max([*curves.steps, *curves.epoch_steps])
    for axes in (left, right):
        axes.set_xlabel("step")
        axes.set_xlim(0, last * 1.02)
        axes.set_ylim(bottom=0)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#e4e4e4", linewidth=0.5)
        axes.set_axisbelow(True)
        for step in _drops(curves):
            axes.axvline(step, color="#888888", linewidth=0.6, linestyle=":")
        axes.legend(frameon=False)
    return figure


def _drops(curves: Curves) -> list[int]:
    """Steps after which the learning rate was a half of what it had been, or less."""
    pairs = zip(curves.rates, curves.rates[1:], curves.steps, strict=False)
    return [step for before, after, step in pairs if after <= before / 2]


def _axes(figure: Any, left: float, bottom: float, width: float, height: float) -> Any:
    """Axes at a place in inches."""
    across, up = figure.get_size_inches()
    return figure.add_axes([left / across, bottom / up, width / across, height / up])


def _frame(axes: Any) -> None:
    axes.set_xticks([])
    axes.set_yticks([])


def _wrapped(text: str, inches: float, points: float) -> str:
    """``text`` with spaces for underscores, in lines of a width; a letter is 0.58 of its size wide.

    Only what is left after ``_LINES`` lines is cut.
    """
    room = int(inches * 72 / (0.58 * points))
    lines = textwrap.wrap(text.replace("_", " "), room, max_lines=_LINES, placeholder="…")
    return "\n".join(lines)


def _lines(texts: Iterable[str]) -> int:
    return max(text.count("\n") for text in texts) + 1
