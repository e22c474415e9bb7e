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
import fcntl
import functools
import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

import fastalex_kernels
from fastalex.common.files import replacing
from fastalex.common.provenance import versions
from fastalex.common.timing import Clock, clock_of
from fastalex.distributed.exchange import Exchange
from fastalex.training.layer_check import (
    LayerCheck,
    NotChecked,
    UnusableGPU,
    Verdict,
    check_function,
    check_layers,
    has_kernels,
)
from fastalex.training.optim import BUFFER
from fastalex.training.passes import Pass
from fastalex_kernels.common import tuned
from fastalex_kernels.common.backend import device_name, recorder

Tensor = torch.Tensor

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
        """Add verdicts to the file; a line where that can't be done.

        Of two processes that check at once the first one's verdicts hold.
        """
        self.known = {**self.known, **found}
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path.with_suffix(".lock"), "w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                others = {} if mode() == "always" else self._read()
                self.known = {**self.known, **others}
                content = {**self._head, "layers": {k: asdict(v) for k, v in self.known.items()}}
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
    flags = [n for n in ("needs_dx", "masks_dx", "dy_is_preact") if getattr(one, n)]
    gather = getattr(one, "_gather", None)
    flags += ["gathers"] if gather is not None else []
    flags += ["early"] if getattr(gather, "early", False) else []
    update, module = getattr(one, "update", None), getattr(one, "module", None)
    flags += [type(update).__name__, *(u.rule for u in getattr(update, "updates", ()) if u)]
    flags += ["training"] if module is not None and module.training else []
    kind = str(dtype).removeprefix("torch.")
    kind += f" {' '.join(float32_precisions())}" if dtype == torch.float32 else ""
    return f"{name} {getattr(one, 'module', type(one).__name__)} {x} {kind} {flags}"


class FirstUse(NamedTuple):
    """A step before it is recorded, and what is needed to check its launches.

    Attributes:
        passes: of the step.
        make_passes: others of the same layers, exchanging with nobody, some by name on ATen.
        first: makes what the first layer reads, by the kernel of augmentation or by torch, in
            blocks of pixels as its kernels read it or else as images.
        loss: makes the mean loss and the gradient of the logits from them and the labels.
        inputs: of the step; labels are the last.
        dtype: of the products.
    """

    passes: Sequence[tuple[str, Pass]]
    make_passes: Callable[[frozenset[str]], list[tuple[str, Pass]]]
    first: Callable[..., Tensor]
    loss: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
    inputs: Sequence[Tensor | None]
    dtype: torch.dtype

    def on_aten(
        self,
        known: frozenset[str],
        optimizer: torch.optim.Optimizer,
        exchange: Exchange | None,
        tell: Callable[[str], object],
    ) -> frozenset[str]:
        """The parts of the step that are to run on ATen: those ``known``, and what fails here.

        Args:
            known: were found before.
            optimizer: of the parameters, which are left as they are.
            exchange: with the other tower, which does as this one.
            tell: is told of each part that is replaced.
        """
        x, how = self._labels, mode()
        if how == "never" or recorder() is not None or not (x.is_cuda or how == "always"):
            return known
        keys, store = self._keys(known), Verdicts(x.device)
        if how == "always" or not all(key in store.known for key in keys.values()):
            on_device = torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()
            try:
                with on_device:
                    found = self.check(known, optimizer)
                said = store.keep({keys[name]: verdict for name, verdict in found.items()})
            except NotChecked as error:
                said = f"the kernels are not checked now: {error}"
            except torch.OutOfMemoryError:
                said = "the kernels are not checked: that takes more memory than the GPU has left"
            if said:
                tell(said)
            if x.is_cuda:
                torch.cuda.empty_cache()  # the check held a second step
        verdicts = {name: store.known.get(key, Verdict()) for name, key in keys.items()}
        mine = known | {name for name, verdict in verdicts.items() if verdict.uses == "aten"}
        both = agree(list(keys), mine, exchange, x.device)
        for name in sorted(both - known):
            why = verdicts[name].reason if name in mine else "as in the other tower"
            tell(f"{name} runs on ATen, {why}")
        return both

    def check(self, known: frozenset[str], optimizer: torch.optim.Optimizer) -> dict[str, Verdict]:
        """Check every launch of the step, and time each layer on a GPU."""
        weights = [p for group in optimizer.param_groups for p in group["params"]]
        buffers = {p: optimizer.state[p].get(BUFFER) for p in weights}
        values = [p.detach().clone() for p in weights]
        verdicts = {name: Verdict() for name in self._keys(known)}
        clock = device_clock(self._labels.device)

        def restore() -> None:
            for p, value in zip(weights, values, strict=True):
                p.detach().copy_(value)
                if buffers[p] is not None:
                    optimizer.state[p][BUFFER] = buffers[p]

        try:
            passes = self.make_passes(known)
            layers = self._check_launches(verdicts, passes)
            every = frozenset(verdicts)
            rivals = dict(reversed(self.make_passes(every))) if clock is not None else {}
            for layer in layers:
                if clock is not None and layer.verdict.wrong is None:
                    first = layer.one is passes[0][1]
                    x = self.first(False, False).to(self.dtype) if first else None
                    layer.time(rivals[layer.name], x, clock)
        except UnusableGPU:  # nothing can be copied any more
            raise
        except BaseException:
            restore()
            raise
        restore()
        return verdicts

    @property
    def _labels(self) -> Tensor:
        labels = self.inputs[-1]
        assert labels is not None
        return labels

    def _keys(self, known: frozenset[str]) -> dict[str, str]:
        """What a verdict of each part is filed under: all that its launches depend on."""
        shapes = [list(x.shape) for x in self.inputs if x is not None]
        keys = {
            name: signature(name, one, shapes[0], self.dtype)
            for name, one in self.passes
            if has_kernels(one)
        }
        first, last = self.passes[0], self.passes[-1]
        ends = {"augment": (first, shapes), "loss": (last, shapes[-1:])}
        for name, ((_, one), of) in ends.items():
            if name not in known and (name == "loss" or len(self.inputs) > 2):
                keys[name] = signature(name, one, of, self.dtype)
        return keys

    def _check_launches(
        self, verdicts: Mapping[str, Verdict], passes: list[tuple[str, Pass]]
    ) -> list[LayerCheck]:
        if "augment" in verdicts:
            expected = self.first(False)
            check_function("augment", verdicts["augment"], lambda: [self.first(True)], [expected])
        augmented = "augment" in verdicts and verdicts["augment"].wrong is None
        x = self.first(True) if augmented else self.first(False).to(self.dtype)

        def loss(logits: Tensor) -> Tensor:
            leaf = logits.double().requires_grad_()
            with torch.enable_grad():
                mean = F.cross_entropy(leaf, self._labels)
            expected = [mean.detach(), *torch.autograd.grad(mean, leaf)]
            if "loss" in verdicts:
                make = lambda: self.loss(logits, self._labels)  # noqa: E731
                check_function("loss", verdicts["loss"], make, expected)
            return expected[1].to(logits.dtype)

        return check_layers(passes, verdicts, x, loss)


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
    transfer = exchange.transfer(flags)
    transfer.start()
    transfer.wait()
    theirs = transfer.received.tolist()
    return mine | {name for name, flag in zip(names, theirs, strict=True) if flag}
