"""Test trained nets: ``python -m fastalex.evaluate --weights W``; ``--help`` lists the options."""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastalex.common.command_line import Parser, check_output, guarded
from fastalex.common.files import replacing
from fastalex.common.tables import table
from fastalex.evaluation.ensemble import CROPS, TOP, Ensemble, Scores, evaluate, open_dataset
from fastalex.evaluation.published import RESULTS, Published, is_imagenet
from fastalex.model.ablations import split_name

_CROPS = {1: "centre crop", 10: "ten crops"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        The exit code. 0: tested. 2: it could not be, one line on stderr says why. 130: Ctrl-C.
    """
    options = _parser().parse_args(arguments)
    return guarded("evaluate", lambda: _run(options))


def _parser() -> Parser:
    parser = Parser(
        prog="python -m fastalex.evaluate",
        usage="%(prog)s --weights W [W ...] [--data DIR] [options]",
        description="Test trained weights, several as an ensemble, and print the published errors "
        "beside their own. Image size, normalisation and classes come from the weights file.",
    )
    text = "weights files (model.safetensors of a run); probabilities of several are averaged"
    parser.add_path("--weights", text, "W", nargs="+", required=True)
    text = "folder with val/CLASS/IMAGE, as for training (default: the built-in set)"
    parser.add_path("--data", text, "DIR")
    text = "of each image: 1 is the centre, 10 the paper's four corners, centre and mirror images"
    parser.add_choice("--crops", CROPS, 10, text)
    parser.add_flag("--per-class", "print the errors of each class too")
    text = "write a CSV table: rows the correct classes, columns the predicted ones"
    parser.add_path("--confusion", text, "FILE")
    parser.add_count("--batch-size", "images in a pass through the net", 64)
    parser.add_count("--workers", "threads that read images ahead", 1)
    parser.add_flag("--json", "print one JSON object instead")
    return parser


def _run(options: argparse.Namespace) -> int:
    if options.confusion is not None:
        check_output("--confusion", options.confusion)
    ensemble = Ensemble.load(options.weights)
    dataset = open_dataset(options.data, "val", ensemble)
    scores = evaluate(ensemble, dataset, options.crops, options.batch_size, options.workers)
    where = str(options.data or "built-in set")
    if options.json:
        print(json.dumps(_report(ensemble, scores, where, options), indent=2))
    else:
        for line in _lines(ensemble, scores, where, options):
            print(line)
    if options.confusion is not None:
        sys.stdout.flush()  # the scores are out, whatever becomes of the file
        write_confusion(options.confusion, scores)
        if not options.json:
            print(f"\nconfusion: {options.confusion}")
    return 0


def write_confusion(path: Path, scores: Scores) -> None:
    """A CSV file: a row for each correct class, a column for each predicted one, atomically."""
    with replacing(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["correct \\ predicted", *scores.classes])
        for name, counts in zip(scores.classes, scores.confusion().tolist(), strict=True):
            writer.writerow([name, *counts])


def _report(
    ensemble: Ensemble, scores: Scores, where: str, options: argparse.Namespace
) -> dict[str, Any]:
    report: dict[str, Any] = {
        "weights": [
            {
                "path": str(member.path),
                "sha256": member.metadata["sha256"],
                "variant": member.model.variant.name,
                "epoch": member.metadata.get("epoch"),
            }
            for member in ensemble.members
        ],
        "data": where,
        "images": len(scores.labels),
        "classes": len(scores.classes),
        "image_size": ensemble.image_size,
        "crops": options.crops,
        "top1_error": scores.top1,
        "top5_error": scores.top5,
        "imagenet": is_imagenet(scores.classes),
        "published": [result._asdict() for result in _published(ensemble)],
    }
    if options.per_class:
        report["per_class"] = {
            name: {"images": len(s.labels), "top1_error": s.top1, "top5_error": s.top5}
            for name, s in scores.per_class()
        }
    return report


def _lines(
    ensemble: Ensemble, scores: Scores, where: str, options: argparse.Namespace
) -> list[str]:
    lines = [f"net: {_describe(member)}" for member in ensemble.members]
    images = f"{len(scores.labels)} images of {len(scores.classes)} classes"
    lines.append(f"data: {where}, {images}, {ensemble.image_size} px, {_CROPS[options.crops]}")
    count = len(ensemble.members)
    ours = ["this", "one net" if count == 1 else f"{count} nets, averaged", _CROPS[options.crops]]
    rows = [["", "nets", "crops", "images", "top-1 error", f"top-{TOP} error"]]
    rows += [[*ours, where, _percent(scores.top1), _percent(scores.top5)]]
    rows += [
        ["published", r.nets, _CROPS[r.crops], r.images, f"{r.top1}%", f"{r.top5}%"]
        for r in _published(ensemble)
    ]
    sources = dict.fromkeys(result.source for result in _published(ensemble))
    lines += ["", *table(rows, right=2), "", f"published in: {'; '.join(sources)}"]
    if not is_imagenet(scores.classes):
        lines.append(
            "The published errors are of ImageNet's thousand classes. These images are another "
            "data set, so the numbers can't be compared."
        )
    if len(scores.classes) <= TOP:
        lines.append(f"With {len(scores.classes)} classes the top-{TOP} error is 0 for any net.")
    if options.per_class:
        rows = [["class", "images", "top-1 error", f"top-{TOP} error"]]
        rows += [
            [name, str(len(s.labels)), _percent(s.top1), _percent(s.top5)]
            for name, s in scores.per_class()
        ]
        lines += ["", *table(rows, right=3)]
    return lines


def _describe(member: Any) -> str:
    epoch = member.metadata.get("epoch")
    after = "" if epoch is None else f", epoch {epoch}"
    return f"{member.model.variant.name}, {member.path}{after}"


def _published(ensemble: Ensemble) -> list[Published]:
    variants = [split_name(member.metadata["variant"])[0] for member in ensemble.members]
    return list(dict.fromkeys(result for name in variants for result in RESULTS[name]))


def _percent(share: float) -> str:
    return f"{share:.1%}"
