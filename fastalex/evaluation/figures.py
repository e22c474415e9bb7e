"""Draw the paper's figures for a trained net: ``python -m fastalex.figures --weights W``."""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastalex.common.command_line import Parser, check_output, guarded
from fastalex.common.figures import new_figure
from fastalex.data import ImageDataset, decode_size
from fastalex.data.base import Pixels
from fastalex.evaluation import drawing
from fastalex.evaluation.ensemble import (
    Ensemble,
    open_dataset,
    rank_classes,
    read_batches,
    read_files,
)

_PICTURES, _QUERIES, _NEAREST = 8, 5, 6  # as in Figure 4
_SHOWN = 224  # side in pixels at which images are drawn


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 2 where something could not be drawn."""
    options = _parser().parse_args(arguments)
    return guarded("figures", lambda: _run(options), "figures named above are whole")


def _parser() -> Parser:
    parser = Parser(
        prog="python -m fastalex.figures",
        usage="%(prog)s --weights W [--data DIR] [--output DIR] [options]",
        description="Draw, as PNG and PDF: conv1's kernels (Figure 3), predictions and nearest "
        "neighbours (Figure 4), and a run's curves.",
    )
    parser.add_path("--weights", "weights file", "W", required=True)
    text = "folder of images, as for training (default: the built-in set)"
    parser.add_path("--data", text, "DIR")
    text = (
        "files to show predictions of; where its folder bears the name of a class, that is the "
        f"correct one (default: {_PICTURES} validation images)"
    )
    parser.add_path("--images", text, "IMAGE", nargs="+")
    text = "a run's metrics.jsonl (default: the one beside the weights, if there is one)"
    parser.add_path("--metrics", text, "FILE")
    text = "training images, drawn at random, among which neighbours are sought"
    parser.add_count("--gallery", text, 2000)
    parser.add_path("--output", "where they go", "DIR", default=Path("figures"))
    return parser


def _run(options: argparse.Namespace) -> int:
    new_figure(1, 1)  # before any work: matplotlib may be missing
    check_output("--output", options.output, folder=True)
    ensemble = Ensemble([options.weights])
    metrics = options.metrics or options.weights.parent / "metrics.jsonl"
    curves = read_metrics(metrics) if options.metrics or metrics.is_file() else None
    given = options.images and predict_files(ensemble, options.images)
    dataset = open_dataset(options.data, "val", ensemble)
    output: Path = options.output
    output.mkdir(parents=True, exist_ok=True)

    def save(figure: Any, name: str) -> None:
        print(", ".join(map(str, drawing.save_figure(figure, output / name))), flush=True)

    save(draw_first_layer(ensemble), "conv1")
    save(drawing.draw_predictions(given or predict_some(ensemble, dataset)), "predictions")
    gallery = open_dataset(options.data, "train", ensemble)
    neighbours = find_neighbours(ensemble, dataset, gallery, options.gallery)
    save(drawing.draw_neighbours(neighbours), "neighbours")
    if curves is not None:
        save(drawing.draw_curves(curves), "curves")
    return 0


def draw_first_layer(ensemble: Ensemble) -> Any:
    """Conv1's kernels of the first net, in as many blocks as conv2 has groups."""
    model = ensemble.members[0].model
    weight: torch.Tensor = model.get_parameter("features.0.weight")
    kernels = weight.detach().float().cpu().numpy()
    return drawing.draw_kernels(kernels, model.variant.convolutions[1].groups)


def predict_files(ensemble: Ensemble, paths: Sequence[Path]) -> list[drawing.Prediction]:
    """What the net says of image files; a folder of a class's name tells the correct one.

    Raises:
        ValueError: for one that can't be read.
    """
    small, large = (read_files(paths, side) for side in (decode_size(ensemble.image_size), _SHOWN))
    for path, pixels in zip(paths, small, strict=True):
        if isinstance(pixels, str):
            raise ValueError(f"{path}: {pixels}")
    names = [path.absolute().parent.name for path in paths]
    labels = [name if name in ensemble.classes else None for name in names]
    return _predictions(ensemble, small, large, labels)


def predict_some(ensemble: Ensemble, dataset: ImageDataset) -> list[drawing.Prediction]:
    """What the net says of a few images, of as many classes as possible."""
    chosen = spread(dataset, _PICTURES)
    sides = decode_size(ensemble.image_size), _SHOWN
    small, large = ([dataset.image(i, side) for i in chosen] for side in sides)
    labels = [ensemble.classes[dataset.labels[i]] for i in chosen]
    return _predictions(ensemble, small, large, labels)


def _predictions(
    ensemble: Ensemble, small: Sequence[Any], large: Sequence[Any], labels: Sequence[str | None]
) -> list[drawing.Prediction]:
    probabilities = ensemble.probabilities(np.stack(small), crops=10)
    guesses = [
        [(ensemble.classes[i], float(row[i])) for i in ranked.tolist()]
        for row, ranked in zip(probabilities, rank_classes(probabilities), strict=True)
    ]
    return list(map(drawing.Prediction, large, labels, guesses))


def find_neighbours(
    ensemble: Ensemble, dataset: ImageDataset, gallery: ImageDataset, limit: int
) -> list[drawing.Neighbours]:
    """For a few images of ``dataset``, those of ``gallery`` with the nearest fc7 features.

    Args:
        ensemble: its first net gives the features.
        dataset: where the images come from, one of each class.
        gallery: where the neighbours are sought.
        limit: at most this many of the gallery are looked at, drawn at random.

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
        found.append(drawing.Neighbours(*shown(dataset, query), nearest))
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


def read_metrics(path: Path) -> drawing.Curves:
    """The curves of a metrics.jsonl; of a step or epoch written twice the later record counts.

    Raises:
        ValueError: where it can't be read, or holds no record of a step or an epoch.
    """
    found: dict[str, dict[int, dict[str, Any]]] = {"step": {}, "epoch": {}}
    try:
        for record in map(json.loads, path.read_text(encoding="utf-8").splitlines()):
            if record.get("kind") in found:
                found[record["kind"]][int(record["step"])] = record
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise ValueError(f"--metrics {path}: not the metrics of a run ({error})") from error
    steps, epochs = ([records[n] for n in sorted(records)] for records in found.values())
    steps = [record for record in steps if record["loss"] is not None]
    if not steps and not epochs:
        raise ValueError(f"--metrics {path}: no step and no epoch recorded in it")
    return drawing.Curves(steps, epochs)
