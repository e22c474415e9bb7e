"""The paper's figures drawn from arrays with matplotlib, and written as PNG and PDF."""

from __future__ import annotations

import itertools
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

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
_GREY, _RED, _DARK_RED = "#b8c4d6", "#e07a6a", "#c0392b"
_BLUE, _ORANGE = "#2f5d9b", "#c8641e"

Weights = npt.NDArray[np.float32]


class Prediction(NamedTuple):
    """A picture, uint8 [D, D, 3], its class, if known, and the most probable ones, best first."""

    pixels: Pixels
    label: str | None
    guesses: list[tuple[str, float]]


class Neighbours(NamedTuple):
    """One picture and those nearest to it; pixels are uint8 [D, D, 3]."""

    pixels: Pixels
    label: str
    nearest: list[tuple[Pixels, str]]


class Curves(NamedTuple):
    """A run's records of steps and of epochs, as in ``metrics.jsonl``, each in order."""

    steps: list[dict[str, Any]]
    epochs: list[dict[str, Any]]


def save_figure(figure: Any, stem: Path) -> list[Path]:
    """Write ``stem`` with .png and .pdf added, each atomically; returns the two paths."""
    paths = [stem.with_name(f"{stem.name}.{kind}") for kind in ("png", "pdf")]
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # laid out once, for both
    for path in paths:
        kind = path.suffix[1:]
        # Without a date the same figure is the same file.
        metadata = {"CreationDate": None} if kind == "pdf" else {}
        with replacing(path) as temporary:
            figure.savefig(temporary, format=kind, metadata=metadata)
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
    white = {"constant_values": 255}
    largest = np.abs(kernels).max((1, 2, 3), keepdims=True).astype(np.float64)
    tiles = np.rint(127.5 + 127.5 * kernels / np.where(largest == 0, 1, largest))
    tiles = np.pad(tiles, ((0, -len(tiles) % columns), (0, 0), (1, 0), (1, 0)), **white)
    _, _, side, _ = tiles.shape
    grid = tiles.reshape(-1, columns, 3, side, side).transpose(0, 3, 1, 4, 2)
    grid = grid.reshape(-1, columns * side, 3).astype(np.uint8)
    return np.pad(grid, ((0, 1), (0, 1), (0, 0)), **white)


def draw_kernels(kernels: Weights, towers: int, scale: int = KERNEL_SCALE) -> Any:
    """The first layer's kernels, tower by tower, as in Figure 3.

    A weight is a square of ``scale`` x ``scale`` pixels of the PNG, without any smoothing.

    Args:
        kernels: float32 [n, 3, k, k].
        towers: blocks to draw them in, of n / towers each.
        scale: pixels for each weight.
    """
    # Weights repeated here, so that no renderer has a pixel to choose.
    blocks = [
        kernel_grid(block).repeat(scale, 0).repeat(scale, 1) for block in np.split(kernels, towers)
    ]
    tall, wide = blocks[0].shape[:2]
    edge, gap, margin = 2 * scale, 4 * scale, (10 * scale if towers > 1 else 2 * scale)
    width, height = margin + wide + edge, towers * (tall + gap) - gap + 2 * edge
    figure = new_figure(width / DPI, height / DPI)
    for number, block in enumerate(blocks):
        bottom = height - edge - tall - number * (tall + gap)
        place = (margin / width, bottom / height, wide / width, tall / height)
        axes = figure.add_axes(place, xticks=[], yticks=[], frame_on=False)
        axes.imshow(block, interpolation="none", aspect="auto")
        if towers > 1:
            across, up = margin / 2 / width, (bottom + tall / 2) / height
            style = {"rotation": 90, "ha": "center", "va": "center"}
            figure.text(across, up, f"tower {number + 1}", **style)
    return figure


def draw_predictions(predictions: Sequence[Prediction], columns: int = 4) -> Any:
    """Pictures, each with its correct label and bars of the most probable, as in Figure 4, left.

    The bar of the correct label is red. ``columns`` pictures stand in a row.
    """
    columns = min(columns, len(predictions))
    rows = -(-len(predictions) // columns)
    wide, bars = 1.7, max(len(p.guesses) for p in predictions)
    names = [_wrapped(name, wide, _NAME) for p in predictions for name, _ in p.guesses]
    titles = [_wrapped(p.label or "", wide, _TITLE) for p in predictions]
    below = bars * (0.03 + 0.105 * _lines(names))
    tall = wide + below + 0.12 + 0.12 * _lines(titles)
    figure = new_figure(columns * (wide + 0.08), rows * tall)
    figure.set_layout_engine("constrained", w_pad=0.03, h_pad=0.03)
    grid = figure.subplots(2 * rows, columns, squeeze=False, height_ratios=[wide, below] * rows)
    for axes in grid.flat:
        axes.set_axis_off()
    for i, (prediction, title) in enumerate(zip(predictions, titles, strict=True)):
        row, column = divmod(i, columns)
        picture, chart = grid[2 * row : 2 * row + 2, column]
        _show(picture, prediction.pixels)
        picture.set_xlabel(title, fontsize=_TITLE, linespacing=1.0, fontweight="bold")
        _bars(chart, prediction, wide)
    return figure


def _bars(axes: Any, prediction: Prediction, width: float) -> None:
    names, shares = zip(*prediction.guesses, strict=True)
    places = range(len(names))
    colours = [_RED if name == prediction.label else _GREY for name in names]
    axes.set(frame_on=True, xlim=(0, 1), ylim=(len(names) - 0.5, -0.5), xticks=[], yticks=[])
    axes.set_axis_on()
    axes.barh(places, shares, height=0.86, color=colours)
    for place, name in zip(places, names, strict=True):
        text = _wrapped(name, width, _NAME)
        va = "center" if "\n" in text else "center_baseline"
        axes.text(0.02, place, text, va=va, fontsize=_NAME, linespacing=1.0)


def draw_neighbours(rows: Sequence[Neighbours]) -> Any:
    """A picture in the first column and those nearest to it beside it, as in Figure 4, right.

    The name of another class than the first column's is red. Each row has as many neighbours.
    """
    side, columns = 0.9, 1 + len(rows[0].nearest)
    names = [name for row in rows for name in (row.label, *(name for _, name in row.nearest))]
    tall = side + 0.08 + 0.09 * _lines(_wrapped(name, side, _SMALL) for name in names)
    figure = new_figure(columns * (side + 0.05), len(rows) * tall + 0.2)
    figure.set_layout_engine("constrained", w_pad=0.02, h_pad=0.02)
    grid = figure.subplots(len(rows), columns, squeeze=False)
    for row, line in zip(rows, grid, strict=True):
        for axes, (pixels, name) in zip(line, [(row.pixels, row.label), *row.nearest], strict=True):
            _show(axes, pixels)
            color = "black" if name == row.label else _DARK_RED
            text = _wrapped(name, side, _SMALL)
            axes.set_xlabel(text, fontsize=_SMALL, linespacing=1.0, color=color)
    for axes, what in zip(grid[0], ("test image", "nearest training images"), strict=False):
        axes.set_title(what, loc="left", fontsize=_TITLE, fontweight="bold")
    return figure


def draw_curves(curves: Curves) -> Any:
    """Training and validation loss, and validation errors, over the steps of a run.

    Dotted lines are where the learning rate fell to a half of what it had been, or less.
    """
    figure = new_figure(6.9, 2.6)
    figure.set_layout_engine("constrained", w_pad=0.1)
    left, right = figure.subplots(1, 2)
    steps, ends = ([record["step"] for record in some] for some in curves)
    dots: dict[str, Any] = {"clip_on": False, "zorder": 3, "linewidth": 0.9}
    if len(ends) < _DOTTED:
        dots |= {"marker": "o", "markersize": 2.5}
    losses, validated = [r["loss"] for r in curves.steps], [r["val_loss"] for r in curves.epochs]
    left.plot(steps, losses, color=_BLUE, label="training", linewidth=0.9)
    left.plot(ends, validated, color=_ORANGE, label="validation", **dots)
    left.set_ylabel("loss (nats)")
    for top, colour in ((1, _BLUE), (5, _ORANGE)):
        errors = [100 * (1 - record[f"top{top}"]) for record in curves.epochs]
        right.plot(ends, errors, color=colour, label=f"top-{top}, validation", **dots)
    right.set_ylabel("error (%)")
    pairs = itertools.pairwise(curves.steps)
    drops = [before["step"] for before, after in pairs if after["lr"] <= before["lr"] / 2]
    for axes in (left, right):
        axes.set(xlabel="step", xlim=(0, max([*steps, *ends]) * 1.02))
        axes.set_ylim(bottom=0)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#e4e4e4", linewidth=0.5)
        axes.set_axisbelow(True)
        for step in drops:
            axes.axvline(step, color="#888888", linewidth=0.6, linestyle=":")
        axes.legend(frameon=False)
    return figure


def _show(axes: Any, pixels: Pixels) -> None:
    axes.set_axis_on()
    axes.imshow(pixels, interpolation="antialiased")
    axes.set(xticks=[], yticks=[])


def _wrapped(text: str, inches: float, points: float) -> str:
    """``text`` with spaces for underscores, in lines of a width; a letter is 0.58 of its size wide.

    Only what is left after ``_LINES`` lines is cut.
    """
    room = int(inches * 72 / (0.58 * points))
    lines = textwrap.wrap(text.replace("_", " "), room, max_lines=_LINES, placeholder="…")
    return "\n".join(lines)


def _lines(texts: Iterable[str]) -> int:
    return max(text.count("\n") for text in texts) + 1
