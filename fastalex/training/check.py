"""The kernels of a step, checked before its first use on a GPU, and timed beside ATen's.

A kernel may be wrong, or slow, on a GPU, with a Triton or for a size that nobody has tried. So
before a step is recorded for the first time, layer_check.py runs each pass of each layer on the
step's own batch and weights. A layer that fails, or whose two passes take longer than ATen's
(cuDNN's), runs on ATen in the step.

The verdicts are kept beside the tuner's tables, for the GPU, the versions and the sizes.
``FASTALEX_CHECK=always`` checks again, ``never`` does not.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import triton

import fastalex_kernels
from fastalex.common.files import replacing
from fastalex.common.provenance import versions
from fastalex.common.timing import Clock, clock_of
from fastalex.distributed.exchange import Exchange, exchanged
from fastalex.training.chain import Chain
from fastalex.training.inputs import Inputs
from fastalex.training.layer_check import NotChecked, Verdict, check_parts, has_kernels
from fastalex.training.passes import Pass
from fastalex_kernels.common import tuned
from fastalex_kernels.common.backend import device_name, gluon_mode, recorder

VARIABLE = "FASTALEX_CHECK"
MODES = ("always", "never")


def mode() -> str:
    """``"always"``, ``"never"``, or ``"auto"``: once for each GPU, versions and sizes.

    Raises:
        ValueError: for another value of ``FASTALEX_CHECK``.
    """
    value = os.environ.get(VARIABLE, "")
    if value not in ("", *MODES):
        raise ValueError(f"{VARIABLE}: expected {' or '.join(MODES)}, got {value!r}")
    return value or "auto"


class Verdicts:
    """The verdicts that are known of a device, by what was checked; a file of them."""

    def __init__(self, device: torch.device) -> None:
        name = device_name(device) or "recorded"
        tiles = tuned.table_path(name)
        self.path = tiles.with_name(f"checked_{tiles.name.removeprefix('tiles_')}")
        self._head = {"device": name, **versions(), "kernels": kernels_version(tiles)}
        # A kernel that one assembler refuses may run with the next.
        self._head["ptxas"] = torch.version.hip or triton.knobs.nvidia.ptxas.version
        self.known: dict[str, Verdict] = self._read()

    def _read(self) -> dict[str, Verdict]:
        try:
            content = json.loads(self.path.read_text(encoding="utf-8"))
            if {name: content[name] for name in self._head} != self._head:
                return {}
            return {key: Verdict(**values) for key, values in content["layers"].items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return {}  # it is checked again

    def keep(self, found: Mapping[str, Verdict]) -> str:
        """Add verdicts to the file; a line where that can't be done."""
        self.known = {**self._read(), **found}
        content = {**self._head, "layers": {k: asdict(v) for k, v in self.known.items()}}
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(self.path) as temporary:
                temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        except OSError as error:
            return f"{self.path} can't be written, the next run checks again: {error.strerror}"
        return ""


@functools.cache
def kernels_version(tiles: Path) -> str:
    """A fingerprint of the kernels' sources, and of the tiles they are launched with."""
    package = Path(fastalex_kernels.__file__).parent
    files = [*sorted(package.rglob("*.py")), *([tiles] if tiles.is_file() else [])]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]


def float32_precisions() -> tuple[str, str]:
    """How torch computes float32 convolutions and products on a GPU."""
    backends: Any = torch.backends
    return backends.cudnn.conv.fp32_precision, backends.cuda.matmul.fp32_precision


def signature(name: str, one: Pass, x: object, dtype: torch.dtype) -> str:
    """All that decides which kernels a layer launches, and on what sizes."""
    flags = [n for n in ("needs_dx", "masks_dx", "dy_is_preact", "dy_is_sum") if getattr(one, n)]
    if one.gather is not None:
        flags += ["gathers", *(["early"] if one.gather.early else [])]
    if one.outputs is not None:
        flags.append("adds outputs")
    if one.update is not None:
        flags += [type(one.update).__name__, one.update.updates.weight.rule]
        flags += [str(one.update.updates.weight.buffer.dtype)]
    flags += ["training"] if one.module is not None and one.module.training else []
    flags += ["no Gluon"] if gluon_mode() == "never" else []
    kind = str(dtype).removeprefix("torch.")
    kind += f" {' '.join(float32_precisions())}" if dtype == torch.float32 else ""
    return f"{name} {one.module} {x} {kind} {flags}"


def parts_on_aten(chain: Chain, inputs: Inputs, tell: Callable[[str], object]) -> frozenset[str]:
    """The parts of a step that are to run on ATen: those of ``chain.aten``, and what fails here.

    Args:
        chain: of the step, before it is recorded for ``inputs``.
        inputs: of the step; labels are the last.
        tell: is told of each part that is replaced.
    """
    device, how = chain.one.device, mode()
    on_gpu = device.type == "cuda"
    if how == "never" or recorder() is not None or not (on_gpu or how == "always"):
        return chain.aten
    keys, store = _keys(chain, inputs), Verdicts(device)
    if how == "always" or not all(key in store.known for key in keys.values()):
        try:
            with torch.cuda.device(device) if on_gpu else contextlib.nullcontext():
                found = check_parts(chain, list(keys), inputs, device_clock(device))
            said = store.keep({keys[name]: verdict for name, verdict in found.items()})
        except NotChecked as error:
            said = f"the kernels are not checked now: {error}"
        except torch.OutOfMemoryError:
            said = "the kernels are not checked: that takes more memory than the GPU has left"
        if said:
            tell(said)
        if on_gpu:
            torch.cuda.empty_cache()  # the check held a second step
    verdicts = {name: store.known.get(key, Verdict()) for name, key in keys.items()}
    mine = chain.aten | {name for name, verdict in verdicts.items() if verdict.uses == "aten"}
    both = agree(list(keys), mine, chain.exchange, device)
    for name in sorted(both - chain.aten):
        why = verdicts[name].reason if name in mine else "as in the other tower"
        tell(f"{name} runs on ATen, {why}")
    return both


def _keys(chain: Chain, inputs: Inputs) -> dict[str, str]:
    """What a verdict of each part is filed under: all that its launches depend on."""
    shapes = [list(x.shape) for x in inputs if x is not None]
    passes = chain.passes(inputs[:-1])
    parts: list[tuple[str, Pass, object]]
    parts = [(name, one, shapes[0]) for name, one in passes if has_kernels(one)]
    if len(inputs) > 2:
        parts.append(("augment", passes[0][1], shapes))
    parts.append(("loss", passes[-1][1], shapes[-1:]))
    return {
        name: signature(name, one, of, chain.dtype)
        for name, one, of in parts
        if name not in chain.aten
    }


def device_clock(device: torch.device) -> Clock | None:
    """What times the layers; None on a CPU, where kernels are interpreted."""
    return clock_of(device) if device.type == "cuda" else None


def agree(
    names: Sequence[str], mine: frozenset[str], exchange: Exchange | None, device: torch.device
) -> frozenset[str]:
    """Those of ``names`` that this tower or the other one is to run on ATen."""
    if exchange is None:
        return mine
    flags = torch.tensor([float(name in mine) for name in names], device=device)
    theirs = exchanged(exchange, flags).tolist()
    return mine | {name for name, flag in zip(names, theirs, strict=True) if flag}
