"""Weights on disk: safetensors files that hold the whole net and what is needed to use it.

A file is never half written under its own name: it is written beside it, forced to the disk and
renamed. Its header carries a SHA-256 of the tensors, which tells a damaged file from a good one.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from fastalex.common.files import replacing
from fastalex.data.normalization import MeanImage
from fastalex.model.alexnet import AlexNet

FORMAT = "fastalex-weights-1"
MEAN_IMAGE = "normalization.mean_image"  # a tensor beside the weights, in the same file


def save_weights(
    path: Path | str,
    state_dict: Mapping[str, torch.Tensor],
    metadata: Mapping[str, Any],
    mean_image: MeanImage | npt.NDArray[np.float32] | None = None,
) -> None:
    """Write weights atomically: after a crash ``path`` holds the old file or the new one, whole.

    Args:
        path: of the file; its folder exists.
        state_dict: the whole net's tensors with torch's shapes, on any device.
        metadata: whatever JSON can hold; ``load_model`` needs ``variant``, ``num_classes`` and
            ``dropout``. What ``load_weights`` returned will do; its checksums are not looked at.
        mean_image: of the normalization in ``metadata``, if it has one; or its pixels, as
            ``load_mean_image`` returns them.

    Raises:
        OSError: where the file can't be written.
        ValueError: where the normalization has a mean image and it is not given.
    """
    tensors = dict(state_dict)
    if mean_image is not None:
        pixels = mean_image.pixels if isinstance(mean_image, MeanImage) else mean_image
        tensors[MEAN_IMAGE] = torch.from_numpy(pixels)
    elif "mean_image" in (metadata.get("normalization") or {}):
        raise ValueError("mean_image: the normalization has one, give what load_mean_image returns")
    write_tensors(path, tensors, FORMAT, metadata)


def write_tensors(
    path: Path | str, tensors: Mapping[str, torch.Tensor], form: str, metadata: Mapping[str, Any]
) -> None:
    """Write a safetensors file atomically, with a checksum of its tensors and of ``metadata``.

    ``form`` is what kind of file it is, for ``read_tensors`` to tell.
    """
    whole = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    sums = {"sha256": weights_hash(whole), "metadata_sha256": _metadata_hash(metadata)}
    header = {
        "format": "pt",  # what other readers of safetensors look for
        "fastalex": json.dumps({**metadata, "format": form, **sums}, sort_keys=True),
    }
    data = save(whole, header)
    try:
        with replacing(Path(path)) as temporary:
            temporary.write_bytes(data)
    except OSError as error:
        text = error.strerror or str(error)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            free = shutil.disk_usage(Path(path).parent).free
            text += f", the file needs {-(-len(data) // 10**6)} MB and {free // 10**6} MB are free"
        raise OSError(error.errno, text, str(path)) from error


def weights_hash(tensors: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 of names, dtypes, shapes and values, in the order of the names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _metadata_hash(metadata: Mapping[str, Any]) -> str:
    """SHA-256 of what is not a checksum, as JSON gives it back."""
    rest = {k: v for k, v in metadata.items() if k not in ("format", "sha256", "metadata_sha256")}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def read_metadata(path: Path | str, form: str = FORMAT) -> dict[str, Any]:
    """The metadata of a file, a weights file's or another ``form``'s, without its tensors.

    Raises:
        ValueError: where the file is missing, damaged, or of another form.
    """
    with _opened(path) as file:
        return _metadata(path, file, form)


def load_weights(path: Path | str) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The state dict and the metadata of a weights file, the tensors on the CPU.

    Raises:
        ValueError: where the file is missing, damaged, or not fastalex's.
    """
    tensors, metadata = read_tensors(path, FORMAT)
    tensors.pop(MEAN_IMAGE, None)
    return tensors, metadata


def load_mean_image(path: Path | str) -> npt.NDArray[np.float32] | None:
    """What a net subtracts from its images, float32 [D, D, 3]; None where it is no image.

    Its checksum is in the metadata, as ``normalization``.

    Raises:
        ValueError: where the file is missing, damaged, or not fastalex's.
    """
    with _opened(path) as file:
        if MEAN_IMAGE not in file.keys():  # noqa: SIM118
            return None
        pixels: npt.NDArray[np.float32] = file.get_tensor(MEAN_IMAGE).numpy()
        return pixels


def read_tensors(
    path: Path | str, form: str, check: bool = True
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The tensors, on the CPU, and the metadata that ``write_tensors`` wrote.

    ``check`` compares the tensors with their checksum.
    """
    with _opened(path) as file:
        metadata = _metadata(path, file, form)
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if check and metadata.get("sha256") != weights_hash(tensors):
        raise ValueError(f"{path}: damaged, its weights do not match the checksum beside them")
    return tensors, metadata


def load_model(path: Path | str) -> tuple[AlexNet, dict[str, Any]]:
    """The net of a weights file, in evaluation mode, and the file's metadata.

    Raises:
        ValueError: where the file is missing, damaged, not fastalex's, or holds another net than
            its metadata say.
    """
    tensors, metadata = load_weights(path)
    try:
        count, last = metadata["num_classes"], tensors.get("classifier.6.bias")
        # A net of any number of classes would take memory.
        if last is not None and (type(count) is not int or last.shape != (count,)):
            raise ValueError(f"num_classes: its metadata say {count!r}, its weights {len(last)}")
        model = AlexNet(count, metadata["dropout"], metadata["variant"])
        model.load_state_dict(tensors)
    except KeyError as error:
        raise ValueError(f"{path}: its metadata lack {error}") from error
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path}: its weights do not fit its variant: {reason}") from error
    return model.eval(), metadata


@contextlib.contextmanager
def _opened(path: Path | str) -> Iterator[Any]:
    if not os.path.isfile(path):
        raise ValueError(f"{path}: no such weights file")
    try:
        with safe_open(path, "pt") as file:
            yield file
    except SafetensorError as error:
        raise ValueError(f"{path}: damaged, or not a safetensors file ({error})") from error


def _metadata(path: Path | str, file: Any, form: str) -> dict[str, Any]:
    header = file.metadata() or {}
    try:
        metadata = json.loads(header["fastalex"])
        known = metadata["format"] == form
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: safetensors, but not weights that fastalex wrote") from error
    if not known:
        raise ValueError(f"{path}: expected format {form!r}, got {metadata['format']!r}")
    if metadata.get("metadata_sha256", "") not in ("", _metadata_hash(metadata)):
        raise ValueError(f"{path}: damaged, its metadata do not match the checksum beside them")
    return dict(metadata)
