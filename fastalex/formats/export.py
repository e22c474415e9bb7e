"""Our weights for other programs: ``python -m fastalex.export --weights W --to onnx ...``."""

from __future__ import annotations

import argparse
import io
import json
import warnings
from collections.abc import Sequence

import torch
from safetensors.torch import save_file

from fastalex.common.command_line import Parser, check_output, guarded
from fastalex.common.files import replacing
from fastalex.data import Normalization, decode_size
from fastalex.evaluation.pretrained import load_net
from fastalex.formats.model_card import write_hub_folder
from fastalex.formats.onnx_graph import build
from fastalex.model.ablations import split_name
from fastalex.model.alexnet import AlexNet

_TO = {
    "onnx": "for ONNX Runtime and others, LRN as ONNX's own",
    "pt2": "a program of torch.export, which runs where fastalex is not installed",
    "torchvision": "a .pth that torchvision's alexnet loads (variant owt)",
    "safetensors": "the tensors under torchvision's names",
    "hub": "a folder for the Hugging Face Hub, model.safetensors and a model card",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 2 where no file could be written."""
    options = _parser().parse_args(arguments)
    return guarded("export", lambda: _run(options))


def _parser() -> Parser:
    parser = Parser(
        prog="python -m fastalex.export",
        usage="%(prog)s --weights W --to FORMAT --output F [--preprocess]",
        description="Write trained weights as a file that other programs run or load, in a form "
        "that has torch's own layers alone.",
        epilog="Names of the classes, image size and normalization go along as metadata; "
        "docs/weights.md says where they stand.",
    )
    text = "model.safetensors of a run, or what fastalex.convert wrote"
    parser.add_path("--weights", text, "W", required=True)
    text = "; ".join(f"{name}: {text}" for name, text in _TO.items())
    parser.add_argument("--to", choices=tuple(_TO), required=True, help=text)
    parser.add_path("--output", "the file or, for hub, the folder to write", "F", required=True)
    text = (
        "onnx: take uint8 images [N, height, width, 3], RGB, of any size, and resize, crop "
        "and normalise them in the graph (default: float32 [N, 3, S, S], normalised by the caller)"
    )
    parser.add_flag("--preprocess", text)
    return parser


def _run(options: argparse.Namespace) -> int:
    check_output("--output", options.output, folder=options.to == "hub")
    if options.preprocess and options.to != "onnx":
        raise ValueError(f"--preprocess: only an ONNX graph holds it; leave it out of {options.to}")
    _, net, metadata, scale = load_net(options.weights)
    size: int = metadata["image_size"]
    if options.to == "torchvision" and split_name(net.variant.name) != ("owt", (), False):
        raise ValueError(
            f"--to torchvision: its alexnet is variant owt, and this is {net.variant.name}; "
            "--to onnx and --to pt2 hold any"
        )
    about = {
        "variant": net.variant.name,
        "classes": json.dumps(metadata["classes"]),
        "image_size": str(size),
        "normalization": json.dumps(metadata["normalization"]),
    }
    if options.to == "hub":
        write_hub_folder(options.output, options.weights, metadata)
        print(f"hub: {options.output}; hf upload USER/NAME {options.output} publishes it")
        return 0
    unfused = net.unfused().requires_grad_(False)
    with replacing(options.output) as temporary:
        if options.to == "onnx":
            pixels = scale if options.preprocess else None
            temporary.write_bytes(build(unfused, size, pixels, about).SerializeToString())
        elif options.to == "pt2":
            temporary.write_bytes(_program(unfused, size, about))
        elif options.to == "torchvision":
            torch.save(dict(unfused.state_dict()), temporary)
        else:
            save_file(dict(unfused.state_dict()), temporary, {"format": "pt", **about})
    given = "uint8 [N, height, width, 3], RGB" if options.preprocess else _describe(scale, size)
    print(f"{options.to}: {options.output}\ninput: {given}")
    return 0


def _describe(scale: Normalization, size: int) -> str:
    """What the file's net has to be given by its caller."""
    mean, std = (" ".join(f"{value:.2f}" for value in some) for some in (scale.mean, scale.std))
    less = "the mean image" if scale.mean_image is not None else mean
    return (
        f"float32 [N, 3, {size}, {size}], RGB from 0 to 255, less {less}, divided by {std}: "
        f"the shorter side resized to {decode_size(size)}, the centre cut out"
    )


def _program(net: AlexNet, size: int, about: dict[str, str]) -> bytes:
    """A program of torch.export for any batch, as torch.export.save writes it."""
    shapes = ({0: torch.export.Dim("batch")},)
    file = io.BytesIO()
    with warnings.catch_warnings():  # torch's, about itself
        warnings.simplefilter("ignore")
        images = torch.zeros(2, 3, size, size)
        program = torch.export.export(net, (images,), dynamic_shapes=shapes)
        torch.export.save(program, file, extra_files={"fastalex.json": json.dumps(about)})
    return file.getvalue()
