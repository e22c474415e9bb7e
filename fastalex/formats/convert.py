"""Other programs' weights for ours: ``python -m fastalex.convert FILE --output W``."""

from __future__ import annotations

import argparse
import mmap
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fastalex.common.command_line import Parser, check_output, guarded
from fastalex.data import MeanImage, Normalization, decode_size
from fastalex.data.base import MAX_IMAGE_SIZE, printable
from fastalex.data.folder import class_folders
from fastalex.data.normalization import IMAGENET
from fastalex.formats.caffe import is_caffe, read_blob, read_caffe
from fastalex.formats.layers import ForeignNet, find_variant, state_dict
from fastalex.formats.onnx import is_onnx, read_onnx
from fastalex.formats.pickles import read_cuda_convnet, read_npy
from fastalex.formats.protobuf import Message
from fastalex.formats.tensors import read_safetensors, read_torch
from fastalex.model.ablations import get_variant, split_name
from fastalex.model.alexnet import AlexNet
from fastalex.training.weights import save_weights

# Of ILSVRC 2012, RGB: what Caffe's ilsvrc_2012_mean.npy averages to over its pixels.
_MEAN = (122.6789, 116.6688, 104.0070)
_TORCH_PICKLE = b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # what torch.save began with before 1.6


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        The exit code. 0: written. 2: it could not be, one line on stderr says why. 130: Ctrl-C.
    """
    options = _parser().parse_args(arguments)
    return guarded("convert", lambda: _run(options))


def _parser() -> Parser:
    parser = Parser(
        prog="python -m fastalex.convert",
        usage="%(prog)s FILE --output W [options]",
        description="Make a weights file, which evaluate, predict, figures, export and "
        "train --init-from take, of an AlexNet that another program trained: torchvision's .pth, "
        "a safetensors file with its names, BVLC's or CaffeNet's .caffemodel, an .onnx file, "
        "caffe-tensorflow's .npy, or a checkpoint of cuda-convnet. Nothing in the file is run.",
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
    try:
        net = read_foreign(options.file)
        if options.channels is not None:
            net = net._replace(bgr=options.channels == "bgr")
        variant = find_variant(net, options.variant)
        tensors = state_dict(net, variant)
    except (ValueError, OSError, MemoryError) as error:
        why = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise ValueError(f"{printable(str(options.file))}: {printable(why)}") from error
    count = len(net.layers[-1][1].reshape(-1))
    classes = _classes(options.classes, net, count)
    size = options.image_size or net.image_size or get_variant(variant).image_size
    AlexNet(1, variant=variant).check_image_size(size, size)
    scale = IMAGENET if split_name(variant)[0] == "owt" else Normalization(_MEAN, (1.0, 1.0, 1.0))
    if net.normalization is not None:
        scale = Normalization.from_dict(net.normalization)
    if options.mean is not None:
        scale = _normalization(options.mean, size, net.bgr, split_name(variant)[0] == "source2012")
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


def read_foreign(path: Path) -> ForeignNet:
    """The net of a file of any known format, told by its first bytes and not by its name.

    Raises:
        ValueError: where it is of no known format or damaged.
        OSError: where it can't be read.
    """
    data = _bytes(path)
    start = bytes(data[:32])
    if start[:4] == b"PK\x03\x04" or start[2:].startswith(_TORCH_PICKLE):
        return read_torch(path, data)
    if start[8:9] == b"{":
        return read_safetensors(path)
    if start.startswith(b"\x93NUMPY"):
        return read_npy(data)
    if start[:1] == b"\x80" and bytes(data[-1:]) == b".":
        return read_cuda_convnet(data)
    try:
        file = Message(data)
        if is_onnx(file):
            return read_onnx(file)
        if is_caffe(file):
            return read_caffe(file)
    except ValueError as error:
        raise ValueError(f"damaged, or of no known format ({error})") from error
    raise ValueError("of no known format: --help lists them")


def _bytes(path: Path) -> memoryview:
    """A file's bytes, read as they are needed."""
    with open(path, "rb") as file:
        if os.fstat(file.fileno()).st_size == 0:
            raise ValueError("empty")
        return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))


def _classes(path: Path | None, net: ForeignNet, count: int) -> list[str]:
    if path is None:
        names = net.classes or [f"{i:0{len(str(count - 1))}}" for i in range(count)]
    elif path.is_dir():
        names = class_folders(path)
    else:
        try:
            names = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"--classes {path}: can't be read: {error}") from error
    if len(names) != count:
        raise ValueError(f"--classes: the net has {count} outputs, there are {len(names)} names")
    return names


def _normalization(path: Path, size: int, bgr: bool, centred: bool) -> Normalization:
    """Subtract the mean of a file, of each channel or of each pixel."""
    try:
        mean = _read_mean(path)
        if bgr:
            mean = mean[::-1]
        if not np.isfinite(mean).all():
            raise ValueError("holds numbers that are not finite")
    except (ValueError, OSError) as error:
        why = getattr(error, "strerror", None) or str(error)
        raise ValueError(f"--mean {path}: {printable(why)}") from error
    red, green, blue = (float(channel.mean()) for channel in mean)
    image = None
    if mean.ndim == 3 and mean.shape[1] > 1:
        pixels = np.ascontiguousarray(mean.transpose(1, 2, 0), np.float32)
        image = MeanImage.of(pixels, decode_size(size), centred)
    return Normalization((red, green, blue), (1.0, 1.0, 1.0), image)


def _read_mean(path: Path) -> npt.NDArray[Any]:
    """The mean as [3] or [3, D, D], in the order of channels of the file."""
    data = _bytes(path)
    if bytes(data[:6]) == b"\x93NUMPY":
        mean: npt.NDArray[Any] = np.load(path, allow_pickle=False)
    else:
        mean = read_blob(Message(data))
    mean = mean.reshape(mean.shape[1:]) if mean.ndim == 4 and len(mean) == 1 else mean
    if mean.ndim == 3 and mean.shape[0] != 3:
        mean = mean.transpose(2, 0, 1)
    square = mean.ndim == 3 and mean.shape[1] == mean.shape[2] <= 2 * MAX_IMAGE_SIZE
    if mean.dtype.kind not in "fiu" or mean.shape[0] != 3 or not (mean.ndim == 1 or square):
        raise ValueError(f"expected [3], [3, D, D] or [D, D, 3] numbers, got {list(mean.shape)}")
    return mean.astype(np.float64)
