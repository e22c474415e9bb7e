"""Draw the paper's figures for a trained net: ``python -m fastalex.figures --weights W``."""

from __future__ import annotations

import argparse
import itertools
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from fastalex.common.command_line import Parser, check_output, guarded
from fastalex.common.figures import DPI, new_figure
from fastalex.common.files import replacing
from fastalex.data import ImageDataset, decode_size
from fastalex.data.base import Pixels
from fastalex.evaluation.ensemble import Ensemble, open_dataset, rank_classes, read_batches

_PICTURES, _QUERIES, _NEAREST = 8, 5, 6  # as in Figure 4
_SHOWN = 224  # side in pixels at which images are drawn
_COLUMNS = 16  # kernels in a row, as in Figure 3
_LINES = 3  # of a name
_TITLE, _NAME, _SMALL = 7.5, 6.5, 5.5  # points
_GREY, _RED, _DARK_RED = "#b8c4d6", "#e07a6a", "#c0392b"


class Prediction(NamedTuple):
    """A picture, uint8 [D, D, 3], its class, and the most probable ones, best first."""

    pixels: Pixels
    label: str
    guesses: list[tuple[str, float]]


class Neighbours(NamedTuple):
    """One picture and those nearest to it; pixels are uint8 [D, D, 3]."""

    pixels: Pixels
    label: str
    nearest: list[tuple[Pixels, str]]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 2 where something could not be drawn."""
    options = _parser().parse_args(arguments)
    return guarded("figures", lambda: _run(options), "figures named above are whole")


def _parser() -> Parser:
    parser = Parser(
        prog="python -m fastalex.figures",
        usage="%(prog)s --weights W [--data DIR] [--output DIR] [options]",
        description="Draw, as PNG and PDF, conv1's kernels (Figure 3), predictions and nearest "
        "neighbours (Figure 4).",
    )
    parser.add_path("--weights", "weights file", "W", required=True)
    text = "folder of images, as for training (default: the built-in set)"
    parser.add_path("--data", text, "DIR")
    text = "training images, drawn at random, among which neighbours are sought"
    parser.add_count("--gallery", text, 2000)
    parser.add_path("--output", "where they go", "DIR", default=Path("figures"))
    return parser


def _run(options: argparse.Namespace) -> int:
    new_figure(1, 1)  # before any work: matplotlib may be missing
    check_output("--output", options.output, folder=True)
    ensemble = Ensemble([options.weights])
    dataset = open_dataset(options.data, "val", ensemble)
    options.output.mkdir(parents=True, exist_ok=True)

    def save(figure: Any, name: str) -> None:
        print(", ".join(map(str, save_figure(figure, options.output / name))), flush=True)

    save(draw_first_layer(ensemble), "conv1")
    save(draw_predictions(predict_some(ensemble, dataset)), "predictions")
    gallery = open_dataset(options.data, "train", ensemble)
    neighbours = find_neighbours(ensemble, dataset, gallery, options.gallery)
    save(draw_neighbours(neighbours), "neighbours")
    return 0


def draw_first_layer(ensemble: Ensemble) -> Any:
    """Conv1's kernels of the first net, in as many blocks as conv2 has groups."""
    model = ensemble.members[0].model
    weight: torch.Tensor = model.get_parameter("features.0.weight")
    kernels = weight.detach().float().cpu().numpy()
    return draw_kernels(kernels, model.variant.convolutions[1].groups)


def predict_some(ensemble: Ensemble, dataset: ImageDataset) -> list[Prediction]:
    """What the net says of a few images, of as many classes as possible."""
    chosen, side = spread(dataset, _PICTURES), decode_size(ensemble.image_size)
    probabilities = ensemble.probabilities(np.stack([dataset.image(i, side) for i in chosen]), 10)
    found = []
    for index, row, ranked in zip(chosen, probabilities, rank_classes(probabilities), strict=True):
        guesses = [(ensemble.classes[i], float(row[i])) for i in ranked.tolist()]
        label = ensemble.classes[dataset.labels[index]]
        found.append(Prediction(dataset.image(index, _SHOWN), label, guesses))
    return found


def find_neighbours(
    ensemble: Ensemble, dataset: ImageDataset, gallery: ImageDataset, limit: int
) -> list[Neighbours]:
    """For a few images of ``dataset``, the nearest of ``limit`` of ``gallery``, drawn at random.

    Source: P§6.1: the smallest Euclidean distance between 4096-dimensional activations.
    """
    queries = spread(dataset, _QUERIES)
    # At random: evenly spaced ones of a set whose classes take turns leave classes out.
    order = np.random.default_rng(0).permutation(len(gallery))
    candidates: list[int] = np.sort(order[:limit]).tolist()
    near = ensemble_features(ensemble, dataset, queries, "Queries")
    far = ensemble_features(ensemble, gallery, candidates, "Features")
    distances = torch.cdist(near, far, compute_mode="donot_use_mm_for_euclid_dist")

    def shown(images: ImageDataset, index: int) -> tuple[Pixels, str]:
        return images.image(index, _SHOWN), ensemble.classes[images.labels[index]]

    found = []
    for query, row in zip(queries, distances.argsort(dim=1, stable=True), strict=True):
        nearest = [shown(gallery, candidates[n]) for n in row[:_NEAREST].tolist()]
        found.append(Neighbours(*shown(dataset, query), nearest))
    return found


def ensemble_features(
    ensemble: Ensemble, dataset: ImageDataset, indices: Sequence[int], what: str
) -> torch.Tensor:
    """float32 [len(indices), 4096]: the last hidden layer's activations."""
    batches = read_batches(dataset, indices, ensemble.image_size, what)
    return torch.cat([ensemble.features(pixels) for pixels in batches])


def spread(dataset: ImageDataset, count: int) -> list[int]:
    """Up to ``count`` images: the first of each of evenly spaced classes, then the second, ..."""
    labels = np.unique(dataset.labels)
    chosen = labels[np.arange(min(count, len(labels))) * len(labels) // min(count, len(labels))]
    by_class = [np.flatnonzero(dataset.labels == label) for label in chosen]
    ranks = itertools.zip_longest(*by_class)
    return [int(index) for rank in ranks for index in rank if index is not None][:count]


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


def kernel_grid(kernels: npt.NDArray[np.float32]) -> Pixels:
    """Kernels, float32 [n, 3, k, k], as coloured tiles with a white line of one pixel around each.

    Each is scaled by its own largest weight: zero is grey 128, the largest weight is 0 or 255.
    Returns uint8 [rows * (k + 1) + 1, 16 * (k + 1) + 1, 3].
    """
    side = kernels.shape[-1] + 1
    largest = np.abs(kernels).max((1, 2, 3), keepdims=True).astype(np.float64)
    tiles = np.rint(127.5 + 127.5 * kernels / np.where(largest == 0, 1, largest))
    rows = -(-len(tiles) // _COLUMNS)
    grid: Pixels = np.full((rows * side + 1, _COLUMNS * side + 1, 3), 255, np.uint8)
    for number, tile in enumerate(tiles.transpose(0, 2, 3, 1)):
        top, left = (place * side + 1 for place in divmod(number, _COLUMNS))
        grid[top : top + side - 1, left : left + side - 1] = tile
    return grid


def draw_kernels(kernels: npt.NDArray[np.float32], towers: int, scale: int = 8) -> Any:
    """The first layer's kernels, float32 [n, 3, k, k], tower by tower, as in Figure 3.

    A weight is a square of ``scale`` x ``scale`` pixels of the PNG, without any smoothing.
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


def draw_predictions(predictions: Sequence[Prediction]) -> Any:
    """Pictures, each with its correct label and bars of the most probable, as in Figure 4, left.

    The bar of the correct label is red. Four pictures stand in a row.
    """
    columns = min(4, len(predictions))
    rows = -(-len(predictions) // columns)
    wide, bars = 1.7, max(len(p.guesses) for p in predictions)
    names = [_wrapped(name, wide, _NAME) for p in predictions for name, _ in p.guesses]
    titles = [_wrapped(p.label, wide, _TITLE) for p in predictions]
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
