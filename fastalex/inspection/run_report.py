"""One page about a training run, for any browser: ``python -m fastalex.report RUN``."""

from __future__ import annotations

import argparse
import base64
import html
import io
import itertools
import json
import warnings
from collections.abc import Iterable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from fastalex.common.command_line import Parser, check_output, guarded
from fastalex.common.figures import new_figure
from fastalex.common.files import replacing
from fastalex.evaluation import figures
from fastalex.evaluation.ensemble import TOP, Ensemble, Scores, evaluate, open_dataset
from fastalex.inspection import roofline
from fastalex.inspection.gpus import GPUS
from fastalex.inspection.report import Row
from fastalex.training.run_folder import RunFolder

_SQUARES = 50  # classes of which a matrix can still be read
_MISTAKES = 10  # pairs of classes listed
_DPI = 150
_STYLE = """
body { max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222;
  font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2.5rem; }
table { border-collapse: collapse; } td, th { padding: .15rem 1rem .15rem 0; text-align: left; }
td:first-child { color: #666; }
img { max-width: 100%; height: auto; } pre { overflow-x: auto; font-size: 12px; }
p.note { color: #666; }
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 2 where no page could be made."""
    options = _parser().parse_args(arguments)
    return guarded("report", lambda: _run(options))


def _parser() -> Parser:
    parser = Parser(
        prog="python -m fastalex.report",
        usage="%(prog)s RUN [--data DIR] [--gpu NAME] [--output FILE]",
        description="Write one HTML page about a run, which needs no other file: settings, curves, "
        "errors, confusion, conv1, predictions and, with --gpu, the roofline of its step.",
    )
    parser.add_path("run", "folder of a run", "RUN")
    text = "folder of images, if it is not where the run found them (default: the run's)"
    parser.add_path("--data", text, "DIR")
    parser.add_choice("--gpu", GPUS, None, "add what the run's step could take on this GPU at best")
    parser.add_path("--output", "the page (default: RUN/report.html)", "FILE")
    return parser


def _run(options: argparse.Namespace) -> int:
    new_figure(1, 1)  # before any work: matplotlib may be missing
    folder = RunFolder(options.run)
    output: Path = options.output or folder.path / "report.html"
    run = _read(folder)
    check_output("--output", output)
    settings = run["settings"]
    step = _roofline(options.gpu, run) if options.gpu is not None else []
    data = options.data or (settings["data"] and Path(settings["data"]))
    ensemble = Ensemble([folder.weights])
    dataset = open_dataset(data, "val", ensemble)
    scores = evaluate(ensemble, dataset, crops=1)
    parts = [
        _facts(run, ensemble, scores),
        _section("Curves", _image(draw_curves(*read_metrics(folder.metrics)))),
        _section("Mistakes", *_mistakes(scores)),
        _section("conv1", _image(figures.draw_first_layer(ensemble))),
        _section(
            "Predictions", _image(figures.draw_predictions(figures.predict_some(ensemble, dataset)))
        ),
    ]
    if step:
        parts.append(_section("Roofline of a step", *step))
    title = f"AlexNet ({settings['variant']}): {1 - scores.top1:.1%} right"
    page = (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style>'
        f"<h1>{html.escape(title)}</h1>{''.join(parts)}</html>\n"
    )
    with replacing(output) as temporary:
        temporary.write_text(page, encoding="utf-8")
    print(f"report: {output}", flush=True)
    return 0


def _read(folder: RunFolder) -> dict[str, Any]:
    """The contents of a run.json.

    Raises:
        ValueError: where it is none.
    """
    if not folder.holds_run:
        raise ValueError(f"{folder.path}: no run in it, there is no {folder.report.name}")
    try:
        return folder.read_report()
    except ValueError as error:
        raise ValueError(f"{folder.report}: not the run.json of a run ({error})") from error


def _facts(run: dict[str, Any], ensemble: Ensemble, scores: Scores) -> str:
    settings, world, member = run["settings"], run["world"], ensemble.members[0]
    parameters = sum(p.numel() for p in member.model.parameters())
    split = "two towers" if world["towers"] == 2 else "whole"
    done = member.metadata
    rows = {
        "status": f"{run['status']}, epoch {done['epoch']}, step {done['step']}",
        "errors": f"top-1 {scores.top1:.1%}, top-{TOP} {scores.top5:.1%} "
        f"of {len(scores.labels)} validation images, centre crop",
        "net": f"{settings['variant']}, {parameters:,} parameters, dropout {settings['dropout']}",
        "data": f"{settings['data'] or 'built-in set'}, {len(scores.classes)} classes, "
        f"{settings['image_size']} px, augmentation {settings['augmentation']}",
        "training": f"{settings['epochs']} epochs, {settings['batch_size']} images a step, "
        f"{settings['precision']}, seed {settings['seed']}, recipe {settings['recipe'] or 'none'}",
        "ran on": f"{world['processes']} {world['device_type']} process(es), {split}",
        "time": _time(run),
        "versions": ", ".join(f"{name} {version}" for name, version in run["versions"].items()),
        "commit": run["commit"] or "an installed package",
    }
    return _table(rows.items())


def _time(run: dict[str, Any]) -> str:
    started, ended = run["started"], run.get("ended")
    if ended is None:
        return f"started {started}"
    taken = datetime.fromisoformat(ended) - datetime.fromisoformat(started)
    return f"{started} to {ended}: {str(taken).split('.')[0]} since it was started or resumed"


Records = list[dict[str, Any]]


def read_metrics(path: Path) -> tuple[Records, Records]:
    """The records of steps and of epochs, each in order; written twice, the later one counts.

    Raises:
        ValueError: where ``path`` can't be read, or holds none.
    """
    found: dict[str, dict[int, dict[str, Any]]] = {"step": {}, "epoch": {}}
    try:
        for record in map(json.loads, path.read_text(encoding="utf-8").splitlines()):
            if record["kind"] in found and record["loss"] is not None:
                found[record["kind"]][int(record["step"])] = record
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not the metrics of a run ({error})") from error
    steps, epochs = ([records[n] for n in sorted(records)] for records in found.values())
    if not steps and not epochs:
        raise ValueError(f"{path}: no step and no epoch recorded in it")
    return steps, epochs


def draw_curves(steps: Records, epochs: Records) -> Any:
    """Training and validation loss, and validation errors, over the steps of a run."""
    figure = new_figure(6.9, 2.6)
    figure.set_layout_engine("constrained", w_pad=0.1)
    left, right = figure.subplots(1, 2)
    ends = [record["step"] for record in epochs]
    left.plot([r["step"] for r in steps], [r["loss"] for r in steps], label="training")
    left.plot(ends, [r["val_loss"] for r in epochs], ".-", label="validation")
    left.set_ylabel("loss (nats)")
    for top in (1, TOP):
        errors = [100 * (1 - record[f"top{top}"]) for record in epochs]
        right.plot(ends, errors, ".-", label=f"top-{top}, validation")
    right.set_ylabel("error (%)")
    pairs = itertools.pairwise(steps)
    drops = [before["step"] for before, after in pairs if after["lr"] <= before["lr"] / 2]
    for axes in (left, right):
        axes.set(xlabel="step", xlim=0)
        axes.set_ylim(bottom=0)
        for number, step in enumerate(drops):
            label = None if number else "learning rate falls"
            axes.axvline(step, color="#888888", linestyle=":", label=label)
        axes.legend(frameon=False)
    return figure


def _mistakes(scores: Scores) -> list[str]:
    """The confusion matrix, where it can be read, and the most frequent mistakes."""
    confusion = scores.confusion()
    parts = []
    if len(scores.classes) <= _SQUARES:
        parts.append(_image(draw_confusion(confusion, scores.classes)))
    wrong = confusion * (1 - np.eye(len(confusion), dtype=int))
    order = np.argsort(wrong, axis=None)[::-1][:_MISTAKES]
    pairs = [divmod(int(i), len(wrong)) for i in order if wrong.flat[i]]
    names = scores.classes
    if pairs:
        rows = [(f"{names[a]} taken for {names[b]}", str(wrong[a, b])) for a, b in pairs]
        parts.append(_table(rows))
    return parts or ['<p class="note">None.</p>']


def draw_confusion(confusion: Any, classes: Sequence[str]) -> Any:
    """A square of colour for each pair of classes: of a row's images, the share of the column.

    Args:
        confusion: int64 [classes, classes], as ``Scores.confusion`` counts it.
        classes: names, by label.
    """
    side = 1.6 + 0.13 * len(classes)
    figure = new_figure(side, side)
    figure.set_layout_engine("constrained")
    axes = figure.subplots()
    shares = confusion / np.maximum(1, confusion.sum(1, keepdims=True))
    axes.imshow(shares, cmap="Greys", vmin=0, vmax=1)
    places, names = range(len(classes)), [name.replace("_", " ") for name in classes]
    axes.set_xticks(places, names, rotation=90)
    axes.set_yticks(places, names)
    axes.set(xlabel="predicted", ylabel="correct")
    return figure


def _roofline(gpu: str, run: dict[str, Any]) -> list[str]:
    """The roofline report of a process's step in the run, and a chart of it."""
    settings, world = run["settings"], run["world"]
    dtype = {"bf16": "bf16", "fp16": "bf16"}.get(settings["precision"], "fp32")
    batch = settings["batch_size"] * world["towers"] // world["processes"]  # of a replica
    warnings.filterwarnings("ignore", message="TRITON_DEFAULT_FP_FUSION")
    case = roofline.Case(batch, dtype, gpus=world["towers"], variant=settings["variant"])
    report, rows = roofline.make_report(GPUS[gpu], case)
    text = "\n".join(roofline.describe(report, rows))
    note = "Computed from machine code; nothing was timed. Images of the variant's published size."
    return [
        _image(draw_layers(rows)),
        f'<p class="note">{note}</p>',
        f"<pre>{html.escape(text)}</pre>",
    ]


def draw_layers(rows: Sequence[Row]) -> Any:
    """A bar for the estimate of each layer and pass, and a line where its floor is."""
    places = dict.fromkeys(f"{row.layer} {row.phase}" for row in rows)
    floors, estimates = dict.fromkeys(places, 0.0), dict.fromkeys(places, 0.0)
    for row in rows:
        floors[f"{row.layer} {row.phase}"] += 1e6 * (row.floor or 0)
        estimates[f"{row.layer} {row.phase}"] += 1e6 * (row.estimate.middle if row.estimate else 0)
    figure = new_figure(6.4, 0.5 + 0.15 * len(places))
    figure.set_layout_engine("constrained")
    axes = figure.subplots()
    names = list(places)
    axes.barh(names, list(estimates.values()), color="#9db8d2", label="estimate, unmeasured")
    axes.plot(list(floors.values()), names, "|", color="black", markersize=7, label="floor")
    axes.invert_yaxis()
    axes.set_xlabel("microseconds")
    axes.legend(frameon=False)
    return figure


def _section(title: str, *parts: str) -> str:
    return f"<h2>{html.escape(title)}</h2>{''.join(parts)}"


def _table(rows: Iterable[tuple[str, str]]) -> str:
    cells = "".join(
        f"<tr><td>{html.escape(name)}</td><td>{html.escape(value)}</td></tr>"
        for name, value in rows
    )
    return f"<table>{cells}</table>"


def _image(figure: Any) -> str:
    """A figure as an element that holds its own pixels."""
    memory = io.BytesIO()
    figure.savefig(memory, format="png", dpi=_DPI)
    pixels = base64.b64encode(memory.getvalue()).decode()
    return f'<img alt="" src="data:image/png;base64,{pixels}">'
