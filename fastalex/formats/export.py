"""Our weights for other programs: ``python -m fastalex.export --weights W --to onnx ...``."""

from __future__ import annotations

import argparse
import io
import json
import warnings
from collections.abc import Sequence

import torch
from safetensors.torch import save_file
from torch import nn

from fastalex.common.command_line import Parser, check_output, guarded
from fastalex.common.files import replacing
from fastalex.data import Normalization, decode_size
from fastalex.evaluation.pretrained import load_net
from fastalex.formats.model_card import write_hub_folder
from fastalex.formats.onnx_graph import build, mean_and_std
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
        "onnx and pt2: take uint8 images [N, height, width, 3], RGB, of any size, and resize, crop "
        "and normalise them in the graph (default: float32 [N, 3, S, S], normalised by the caller)"
    )
    parser.add_flag("--preprocess", text)
    return parser


def _run(options: argparse.Namespace) -> int:
    check_output("--output", options.output, folder=options.to == "hub")
    if options.preprocess and options.to not in ("onnx", "pt2"):
        raise ValueError(f"--preprocess: {options.to} holds no graph: leave it out")
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
    pixels = scale if options.preprocess else None
    with replacing(options.output) as temporary:
        if options.to == "onnx":
            temporary.write_bytes(build(unfused, size, pixels, about).SerializeToString())
        elif options.to == "pt2":
            temporary.write_bytes(_program(unfused, size, pixels, about))
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


class _FromPixels(nn.Module):
    """The net behind what fastalex's own commands do to an image."""

    def __init__(self, net: AlexNet, scale: Normalization, size: int) -> None:
        super().__init__()
        self.net, self.size = net, size
        self.mean, self.std = (nn.Buffer(torch.from_numpy(x)) for x in mean_and_std(scale, size))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        height, width = images.shape[1], images.shape[2]
        short, side = torch.sym_min(height, width), decode_size(self.size)  # type: ignore[no-untyped-call]
        resized = images.permute(0, 3, 1, 2).float()
        # Rounded after each axis, halves up, as Pillow does.
        resized = (resized @ _triangles(width, short, side).T + 0.5).floor()
        resized = (_triangles(height, short, side) @ resized + 0.5).floor()
        start = (side - self.size) // 2
        part = resized[:, :, start : start + self.size, start : start + self.size]
        return self.net((part - self.mean) / self.std)  # type: ignore[no-any-return]


def _triangles(length: int, short: int, side: int) -> torch.Tensor:
    """[side, length]: what the pixels along an axis count in each of ``side`` of the centre."""
    step = short / side
    centres = (torch.arange(side) + 0.5)[:, None] * step + (length - short) / 2
    distance = (torch.arange(length) + 0.5 - centres).abs() / torch.sym_max(step, 1.0)  # type: ignore[no-untyped-call]
    triangles = (1 - distance).relu()
    weights: torch.Tensor = triangles / triangles.sum(1, keepdim=True)
    return weights


def _program(net: AlexNet, size: int, scale: Normalization | None, about: dict[str, str]) -> bytes:
    """A program of torch.export for any batch, as torch.export.save writes it."""
    module: nn.Module = net if scale is None else _FromPixels(net, scale, size)
    images, shapes = torch.zeros(2, 3, size, size), {0: torch.export.Dim("batch")}
    if scale is not None:
        images = torch.zeros(2, 300, 260, 3, dtype=torch.uint8)
        shapes |= {1: torch.export.Dim("height", min=2), 2: torch.export.Dim("width", min=2)}
    file = io.BytesIO()
    with warnings.catch_warnings():  # torch's, about itself
        warnings.simplefilter("ignore")
        program = torch.export.export(module.eval(), (images,), dynamic_shapes=(shapes,))
        torch.export.save(program, file, extra_files={"fastalex.json": json.dumps(about)})
    return file.getvalue()
