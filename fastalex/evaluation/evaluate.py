"""Test trained nets: ``python -m fastalex.evaluate --weights W``; ``--help`` lists the options."""

from __future__ import annotations

import argparse
import csv
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fastalex.common.command_line import Parser, check_output, guarded
from fastalex.common.files import replacing
from fastalex.common.tables import table
from fastalex.evaluation.ensemble import CROPS, TOP, Ensemble, Scores, evaluate, open_dataset
from fastalex.model.ablations import split_name

_CROPS = {1: "centre crop", 10: "ten crops"}


class Published(NamedTuple):
    """What was tested, crops of each image (1, the centre, or 10), on what, errors in %, where."""

    nets: str
    crops: int
    images: str
    top1: float
    top5: float
    source: str


_TEST_2010 = "ILSVRC-2010 test"
_VAL_2012 = "ILSVRC-2012 validation"
_BVLC = "BVLC models/bvlc_alexnet/readme.md"
_TORCHVISION = "torchvision AlexNet_Weights.IMAGENET1K_V1"

_PAPER = (
    Published("one net", 1, _TEST_2010, 39.0, 18.3, "P§6, footnote"),
    Published("one net", 10, _TEST_2010, 37.5, 17.0, "P§6, table 1"),
    Published("one net", 10, _VAL_2012, 40.7, 18.2, "P§6, table 2"),
    Published("five nets", 10, _VAL_2012, 38.1, 16.4, "P§6, table 2"),
)

RESULTS: dict[str, tuple[Published, ...]] = {
    "paper": _PAPER,
    "source2012": _PAPER,  # net 145 logged the paper's errors: S:layers/layer-params-145.cfg
    "caffe": (Published("one net", 1, _VAL_2012, 42.9, 19.8, _BVLC),),
    "owt": (Published("one net", 1, _VAL_2012, 43.5, 20.9, _TORCHVISION),),
}


def is_imagenet(classes: Sequence[str]) -> bool:
    """Whether ``classes`` look like ILSVRC's: a thousand, named by WordNet ids as in its folders.

    The classes of 2010 and of 2012 differ and have ids of the same form, so this can't tell the
    years apart.
    """
    return len(classes) == 1000 and all(re.fullmatch(r"n\d{8}", name) for name in classes)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 2 where the nets could not be tested."""
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
    ensemble = Ensemble(options.weights)
    dataset = open_dataset(options.data, "val", ensemble)
    scores = evaluate(ensemble, dataset, options.crops, options.batch_size, options.workers)
    report = _report(ensemble, scores, options)
    print(json.dumps(report, indent=2) if options.json else "\n".join(_lines(report)), flush=True)
    if options.confusion is not None:  # the scores are out, whatever becomes of the file
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


def _report(ensemble: Ensemble, scores: Scores, options: argparse.Namespace) -> dict[str, Any]:
    """What was found, as ``--json`` prints it."""
    variants = [split_name(member.metadata["variant"])[0] for member in ensemble.members]
    published = dict.fromkeys(result for name in variants for result in RESULTS[name])
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
        "data": str(options.data or "built-in set"),
        **_errors(scores),
        "classes": len(scores.classes),
        "image_size": ensemble.image_size,
        "crops": options.crops,
        "imagenet": is_imagenet(scores.classes),
        "published": [result._asdict() for result in published],
    }
    if options.per_class:
        report["per_class"] = {name: _errors(some) for name, some in scores.per_class()}
    return report


def _errors(scores: Scores) -> dict[str, Any]:
    return {"images": len(scores.labels), "top1_error": scores.top1, "top5_error": scores.top5}


def _lines(report: dict[str, Any]) -> list[str]:
    """The report as text."""
    lines = []
    for net in report["weights"]:
        after = "" if net["epoch"] is None else f", epoch {net['epoch']}"
        lines.append(f"net: {net['variant']}, {net['path']}{after}")
    where, classes, crops = report["data"], report["classes"], _CROPS[report["crops"]]
    images = f"{report['images']} images of {classes} classes"
    lines.append(f"data: {where}, {images}, {report['image_size']} px, {crops}")
    count = len(report["weights"])
    nets = "one net" if count == 1 else f"{count} nets, averaged"
    rows = [["", "nets", "crops", "images", "top-1 error", f"top-{TOP} error"]]
    rows += [["this", nets, crops, where, *_percent(report)]]
    rows += [
        ["published", r["nets"], _CROPS[r["crops"]], r["images"], f"{r['top1']}%", f"{r['top5']}%"]
        for r in report["published"]
    ]
    sources = dict.fromkeys(result["source"] for result in report["published"])
    lines += ["", *table(rows, right=2), "", f"published in: {'; '.join(sources)}"]
    if not report["imagenet"]:
        lines.append(
            "The published errors are of ImageNet's thousand classes. These images are another "
            "data set, so the numbers can't be compared."
        )
    if classes <= TOP:
        lines.append(f"With {classes} classes the top-{TOP} error is 0 for any net.")
    if "per_class" in report:
        rows = [["class", "images", "top-1 error", f"top-{TOP} error"]]
        rows += [
            [name, str(some["images"]), *_percent(some)]
            for name, some in report["per_class"].items()
        ]
        lines += ["", *table(rows, right=3)]
    return lines


def _percent(errors: dict[str, Any]) -> tuple[str, str]:
    return f"{errors['top1_error']:.1%}", f"{errors['top5_error']:.1%}"
