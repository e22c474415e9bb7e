"""Our weights for other programs: ``python -m fastalex.export --weights W --to onnx ...``."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from fastalex.common.command_line import Parser, check_output, guarded
from fastalex.common.files import replacing
from fastalex.data import Normalization, decode_size
from fastalex.formats.onnx_graph import Pixels, build
from fastalex.model.ablations import split_name
from fastalex.model.alexnet import AlexNet
from fastalex.training.weights import load_mean_image, load_model

_TO = {
    "onnx": "for ONNX Runtime and others, LRN as ONNX's own",
    "pt2": "a program of torch.export, which runs where fastalex is not installed",
    "torchvision": "a .pth that torchvision's alexnet loads (variant owt)",
    "safetensors": "the tensors under torchvision's names",
}
_WITH_PIXELS = ("onnx", "pt2")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        The exit code. 0: written. 2: it could not be, one line on stderr says why. 130: Ctrl-C.
    """
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
    parser.add_argument(
        "--to", choices=tuple(_TO), required=True,
        help="; ".join(f"{name}: {text}" for name, text in _TO.items()),
    )  # fmt: skip
    parser.add_path("--output", "the file to write", "F", required=True)
    text = (
        "onnx and pt2: take uint8 images [N, height, width, 3], RGB, of any size, and resize, crop "
        "and normalise them in the graph (default: float32 [N, 3, S, S], normalised by the caller)"
    )
    parser.add_flag("--preprocess", text)
    return parser


def _run(options: argparse.Namespace) -> int:
    check_output("--output", options.output)
    if options.preprocess and options.to not in _WITH_PIXELS:
        raise ValueError(f"--preprocess: a file of {options.to} holds no graph: leave it out")
    net, metadata = load_model(options.weights)
    for key in ("classes", "image_size", "normalization"):
        if key not in metadata:
            raise ValueError(f"{options.weights}: its metadata lack {key!r}")
    size: int = metadata["image_size"]
    try:
        net.check_image_size(size, size)
        scale = Normalization.from_dict(metadata["normalization"], load_mean_image(options.weights))
        pixels = _pixels(scale, size)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{options.weights}: {error}") from error
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
    unfused = net.unfused().requires_grad_(False)
    given = pixels if options.preprocess else None
    with replacing(options.output) as temporary:
        if options.to == "onnx":
            temporary.write_bytes(build(unfused, size, given, about).SerializeToString())
        elif options.to == "pt2":
            temporary.write_bytes(_program(unfused, size, given, about))
        elif options.to == "torchvision":
            torch.save(dict(unfused.state_dict()), temporary)
        else:
            _save_safetensors(temporary, unfused, about)
    print(f"{options.to}: {options.output}\n{_describe(scale, size, options)}")
    return 0


def _pixels(scale: Normalization, size: int) -> Pixels:
    side = decode_size(size)
    mean = np.array(scale.mean, np.float32)[:, None, None]
    if scale.mean_image is not None:  # of the centre crop the centre is subtracted
        start = (len(scale.mean_image.pixels) - size) // 2
        part = scale.mean_image.pixels[start : start + size, start : start + size]
        mean = np.ascontiguousarray(part.transpose(2, 0, 1))
    return Pixels(side, mean, np.array(scale.std, np.float32)[:, None, None])


def _describe(scale: Normalization, size: int, options: argparse.Namespace) -> str:
    """What the file's net has to be given."""
    if options.preprocess:
        return "input: uint8 [N, height, width, 3], RGB"
    mean = " ".join(f"{value:.2f}" for value in scale.mean)
    mean = "the mean image" if scale.mean_image is not None else mean
    std = " ".join(f"{value:.2f}" for value in scale.std)
    return (
        f"input: float32 [N, 3, {size}, {size}], RGB from 0 to 255, less {mean}, divided by {std}: "
        f"the shorter side resized to {decode_size(size)}, the centre cut out"
    )


class _FromPixels(nn.Module):
    """The net behind what fastalex's own commands do to an image."""

    def __init__(self, net: AlexNet, pixels: Pixels, size: int) -> None:
        super().__init__()
        self.net, self.side, self.size = net, pixels.decode_size, size
        self.mean, self.std = (
            nn.Buffer(torch.from_numpy(values)) for values in (pixels.mean, pixels.std)
        )

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        height, width = images.shape[1], images.shape[2]
        short = torch.sym_min(height, width)  # type: ignore[no-untyped-call]
        # Indices and no slices, of which a program would ask whether they are the whole image.
        places = torch.arange(short, device=images.device)
        square = images.index_select(1, places + (height - short) // 2)
        square = square.index_select(2, places + (width - short) // 2).permute(0, 3, 1, 2)
        resized = square.float()
        for sides in ((short, self.side), (self.side, self.side)):  # rounded twice, as Pillow does
            resized = F.interpolate(resized, sides, mode="bilinear", antialias=True).round()
        start = (self.side - self.size) // 2
        part = resized[:, :, start : start + self.size, start : start + self.size]
        return self.net((part - self.mean) / self.std)  # type: ignore[no-any-return]


def _program(net: AlexNet, size: int, pixels: Pixels | None, about: dict[str, str]) -> bytes:
    """A program of torch.export for any batch, as torch.export.save writes it."""
    batch = torch.export.Dim("batch")
    module: nn.Module = net
    images, shapes = torch.zeros(2, 3, size, size), {0: batch}
    if pixels is not None:
        module = _FromPixels(net, pixels, size)
        images = torch.zeros(2, 300, 260, 3, dtype=torch.uint8)
        sides = [torch.export.Dim(name, min=2) for name in ("height", "width")]
        shapes |= {1: sides[0], 2: sides[1]}
    file = io.BytesIO()
    with _quiet():
        program = torch.export.export(module.eval(), (images,), dynamic_shapes=(shapes,))
        torch.export.save(program, file, extra_files={"fastalex.json": json.dumps(about)})
    return file.getvalue()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without torch's warnings about itself."""
    logger = logging.getLogger("torch")
    level = logger.level
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            logger.setLevel(level)


def _save_safetensors(path: Path, net: AlexNet, about: dict[str, Any]) -> None:
    from safetensors.torch import save_file

    save_file(dict(net.state_dict()), path, {"format": "pt", **about})
