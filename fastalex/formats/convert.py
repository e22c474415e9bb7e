"""Other programs' weights for ours: ``python -m fastalex.convert FILE --output W``."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fastalex.common.command_line import Parser, check_output, guarded
from fastalex.data import MeanImage, Normalization, decode_size
from fastalex.data.base import MAX_IMAGE_SIZE, printable
from fastalex.data.folder import class_folders
from fastalex.data.normalization import IMAGENET
from fastalex.formats.caffe import read_blob, read_caffe, read_message
from fastalex.formats.cuda_convnet import read_cuda_convnet
from fastalex.formats.layers import ForeignNet, find_variant, state_dict
from fastalex.formats.onnx import read_onnx
from fastalex.formats.tensors import read_safetensors, read_torch
from fastalex.model.ablations import get_variant, split_name
from fastalex.model.alexnet import AlexNet
from fastalex.training.weights import save_weights

# Of ILSVRC 2012, RGB: what Caffe's ilsvrc_2012_mean.npy averages to over its pixels.
_MEAN = (122.6789, 116.6688, 104.0070)
_IR_VERSION, _GRAPH = 1, 7  # the fields that an ONNX file begins with
_TORCH_PICKLE = b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # what torch.save began with before 1.6


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 2 where no weights file could be made."""
    options = _parser().parse_args(arguments)
    return guarded("convert", lambda: _run(options))


def _parser() -> Parser:
    parser = Parser(
        prog="python -m fastalex.convert",
        usage="%(prog)s FILE --output W [options]",
        description="Make a weights file, which evaluate, predict, figures, export and "
        "train --init-from take, of an AlexNet that another program trained: torchvision's .pth, "
        "a safetensors file with its names, BVLC's or CaffeNet's .caffemodel, an .onnx file, "
        "or a checkpoint of cuda-convnet. Nothing in the file is run.",
        epilog="docs/weights.md says what is done to the weights of each format.",
    )
    parser.add_path("file", "what the other program wrote", "FILE")
    parser.add_path("--output", "the weights file to write", "W", required=True)
    text = (
        "names of the classes in the order of the net's outputs: a text file with one a line, or "
        "a folder of class folders (default: the file's own, or numbers)"
    )
    parser.add_path("--classes", text, "NAMES")
    text = (
        "mean of the images it was trained on, .npy or Caffe's .binaryproto (default: ILSVRC "
        "2012's mean of each channel; torchvision's constants for owt)"
    )
    parser.add_path("--mean", text, "FILE")
    text = "order in which the file's net and mean have the colours (default: bgr of Caffe's)"
    parser.add_choice("--channels", ("rgb", "bgr"), None, text)
    text = "which AlexNet it is, where the file's format and shapes fit several"
    parser.add_argument("--variant", metavar="NAME", help=text)
    text = "side in pixels of the images it gets (default: the file's own, or as published)"
    parser.add_count("--image-size", text, most=MAX_IMAGE_SIZE)
    return parser


def _run(options: argparse.Namespace) -> int:
    check_output("--output", options.output)
    if options.variant is not None:
        get_variant(options.variant)
    with _named(str(options.file)):
        net = read_foreign(options.file)
        if options.channels is not None:
            net = net._replace(bgr=options.channels == "bgr")
        variant = find_variant(net, options.variant)
        tensors = state_dict(net, variant)
    count = len(net.layers[-1][1].reshape(-1))
    classes = _classes(options.classes, net, count)
    size = options.image_size or net.image_size or get_variant(variant).image_size
    AlexNet(1, variant=variant).check_image_size(size, size)
    scale = IMAGENET if split_name(variant)[0] == "owt" else Normalization(_MEAN, (1.0, 1.0, 1.0))
    if net.normalization is not None:
        scale = Normalization.from_dict(net.normalization)
    if options.mean is not None:
        with _named(f"--mean {options.mean}"):
            mean = _read_mean(options.mean, net.bgr)
        scale = _normalization(mean, decode_size(size), split_name(variant)[0] == "source2012")
    metadata = {
        "variant": variant,
        "num_classes": count,
        "dropout": 0.5,
        "classes": classes,
        "image_size": size,
        "normalization": scale.to_dict(),
        "converted": options.file.name,
    }
    save_weights(options.output, tensors, metadata, scale.mean_image)
    parameters = sum(tensor.numel() for tensor in tensors.values())
    turned = ", BGR turned to RGB" if net.bgr else ""
    print(
        f"read: {net.kind}: variant {variant}, {parameters:,} parameters, {count} classes, "
        f"{size} px{turned}\nweights: {options.output}"
    )
    return 0


@contextlib.contextmanager
def _named(what: str) -> Iterator[None]:
    """One line, which begins with ``what``, on whatever is wrong in a file."""
    try:
        yield
    except (ValueError, OSError, MemoryError) as error:
        why = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise ValueError(f"{printable(what)}: {printable(why)[:400]}") from error


def _normalization(mean: npt.NDArray[np.float64], side: int, centred: bool) -> Normalization:
    """Subtract a mean of each channel, or of each pixel of images of ``side``."""
    red, green, blue = (float(channel.mean()) for channel in mean)
    image = None
    if mean.ndim == 3 and mean.shape[1] > 1:
        pixels = np.ascontiguousarray(mean.transpose(1, 2, 0), np.float32)
        image = MeanImage.of(pixels, side, centred)
    return Normalization((red, green, blue), (1.0, 1.0, 1.0), image)


def read_foreign(path: Path) -> ForeignNet:
    """The net of a file of any known format, told by its first bytes and not by its name.

    Raises:
        ValueError: where it is of no known format or damaged.
        OSError: where it can't be read.
    """
    try:
        return _read(path, np.memmap(path, np.uint8, "r").data)
    except (ValueError, OSError):
        raise
    except Exception as error:  # whatever a damaged file makes of numpy, torch, safetensors, onnx
        raise ValueError(f"damaged, or it holds no net ({type(error).__name__})") from error


def _read(path: Path, data: memoryview) -> ForeignNet:
    start = bytes(data[:32])
    if start[:4] == b"PK\x03\x04" or start[2:].startswith(_TORCH_PICKLE):
        return read_torch(path)
    if start[8:9] == b"{":
        return read_safetensors(path)
    if start[:1] == b"\x80" and bytes(data[-1:]) == b".":
        return read_cuda_convnet(data)
    try:
        file = read_message(data)
    except ValueError as error:
        raise ValueError(f"damaged, or of no known format ({error})") from error
    if _IR_VERSION in file and _GRAPH in file:
        return read_onnx(data)
    return read_caffe(file)


def _classes(path: Path | None, net: ForeignNet, count: int) -> list[str]:
    if path is None:
        names = net.classes or [f"{i:0{len(str(count - 1))}}" for i in range(count)]
    elif path.is_dir():
        names = class_folders(path)
    else:
        with _named(f"--classes {path}"):
            names = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if len(names) != count:
        raise ValueError(f"--classes: the net has {count} outputs, there are {len(names)} names")
    return names


def _read_mean(path: Path, bgr: bool) -> npt.NDArray[np.float64]:
    """The mean of a file, RGB, as [3] or [3, D, D]."""
    data = np.memmap(path, np.uint8, "r").data
    numpy = bytes(data[:6]) == b"\x93NUMPY"
    mean: npt.NDArray[Any] = np.load(path, allow_pickle=False) if numpy else read_blob(data)
    mean = mean[0] if mean.ndim == 4 and len(mean) == 1 else mean
    if mean.ndim == 3 and len(mean) != 3:
        mean = mean.transpose(2, 0, 1)
    square = mean.ndim == 3 and mean.shape[1] == mean.shape[2] <= 2 * MAX_IMAGE_SIZE
    if mean.dtype.kind not in "fiu" or len(mean) != 3 or not (mean.ndim == 1 or square):
        raise ValueError(f"expected [3], [3, D, D] or [D, D, 3] numbers, got {list(mean.shape)}")
    if not np.isfinite(mean).all():
        raise ValueError("holds numbers that are not finite")
    return mean[::-1].astype(np.float64) if bgr else mean.astype(np.float64)
