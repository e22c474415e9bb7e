"""A training step without a GPU: its launches in order, and torch's operators between them.

``fastalex.training.TrainStep`` runs twice on tensors without data: once to record its launches,
then watched, so that the operators of torch's among them are seen, too.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastalex.common.compile import without_data
from fastalex.data import decode_size
from fastalex.data.augment import Augment
from fastalex.data.normalization import IMAGENET
from fastalex.distributed.exchange import LoopbackExchange, LoopbackTransfer
from fastalex.distributed.towers import cut_to_tower
from fastalex.model.alexnet import AlexNet, layer_names
from fastalex.model.layers import Conv2dReLU, MaxPool2d
from fastalex.training import TrainStep
from fastalex.training.optim import BUFFERS, build_optimizer
from fastalex_kernels.common.backend import record_launches
from fastalex_kernels.common.program import Launch

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
PRECISIONS = {"bf16": "bf16", "fp32": "float32"}  # of TrainStep, by the names that reports use
_OVERWRITES = ("copy_", "fill_", "zero_")  # they write their first tensor without reading it


@dataclass(frozen=True)
class Event:
    """One launch of ours, or one operator of torch's."""

    layer: str  # augment, conv1, pool1, ... fc8, loss; step: what no recorded launch does
    phase: str  # forward or backward
    name: str  # of the kernel or operator
    launch: Launch | None = None  # its tensors without data; None for an operator
    read: int = 0  # bytes that an operator moves
    written: int = 0


@dataclass(frozen=True)
class Layer:
    """What a layer is given and what it makes; of the augmentation, its crops and their blocks."""

    name: str
    module: nn.Module | Augment
    input: tuple[int, ...]
    output: tuple[int, ...]
    weight: tuple[int, ...] | None
    needs_input_grad: bool


@dataclass(frozen=True)
class Exchanged:
    """A tensor exchanged with the other tower, of ``size`` bytes in each direction.

    What stands between the places ``started`` and ``ended`` of the step's events runs meanwhile.
    """

    layer: str  # that waits for it
    phase: str
    size: int
    started: int
    ended: int


@dataclass
class Step:
    """A recorded step: events and exchanges in order, layers by name, elements of parameters."""

    events: list[Event] = field(default_factory=list)
    layers: dict[str, Layer] = field(default_factory=dict)
    parameters: int = 0
    exchanges: list[Exchanged] = field(default_factory=list)


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes what a recorded step does: launches, operators of torch's but for views, exchanges."""

    def __init__(self, step: Step) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.beside: list[Event] = []  # operators outside of the list of launches
        self._step = step
        self._place: tuple[str, str] | None = None
        self._started: dict[LoopbackTransfer, int] = {}

    def see(self, launch: Launch, stream: int) -> None:
        """Stands in for the launch's own ``run``."""
        transfer = getattr(launch.kernel, "__self__", None)
        if launch.grid is not None:
            self._step.events.append(Event(launch.layer, launch.phase, launch.name, launch))
        elif isinstance(transfer, LoopbackTransfer):
            now = len(self._step.events)
            first = self._started.setdefault(transfer, now)
            if launch.kernel == transfer.wait:
                one = Exchanged(launch.layer, launch.phase, transfer.sent.nbytes, first, now)
                self._step.exchanges.append(one)
        else:
            self._place = launch.layer, launch.phase
            launch.kernel(*launch.arguments, **launch.options)
            self._place = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func._schema.name.split("::")[1]
        aliases = [r.alias_info for r in func._schema.returns]
        view = any(a is not None and not a.is_write for a in aliases)
        read, written = _tensors(args, kwargs), _tensors(result)
        if name in _OVERWRITES or "out" in (kwargs or {}):
            read = [x for x in read if not any(x is y for y in written)]
        if func.namespace == "aten" and not view and (read or written):
            moved = sum(x.nbytes for x in read), sum(x.nbytes for x in written)
            place = self._place or ("step", "forward")
            events = self._step.events if self._place else self.beside
            events.append(Event(*place, f"aten.{name}", None, *moved))
        return result


def _tensors(*trees: Any) -> list[torch.Tensor]:
    return [x for x in tree_leaves(trees) if isinstance(x, torch.Tensor) and x.numel()]


def layers_of(model: AlexNet, batch: int, size: int) -> dict[str, Layer]:
    """The layers by name, in order, as they are given images of ``size`` pixels a side."""
    layers: dict[str, Layer] = {}
    made: tuple[int, ...] = (batch, 3, size, size)
    for name, module in layer_names(model).items():
        given, weight = made, getattr(module, "weight", None)
        if weight is not None:  # a tower's layer may read both towers
            inputs, sides = weight.shape[1] * getattr(module, "groups", 1), made[2:]
            given = (batch, inputs, *(sides if weight.dim() == 4 else ()))
            made = (batch, weight.shape[0], *given[2:])
        if isinstance(module, (Conv2dReLU, MaxPool2d)):
            made = (*made[:2], *map(module.output_size, made[2:]))
        shape = None if weight is None else tuple(weight.shape)
        layers[name] = Layer(name, module, given, made, shape, needs_input_grad=bool(layers))
    return layers


def _batch(images: int, size: int) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
    """Images as bytes with their crops, as ``fastalex.data`` gives them, and their labels."""
    side = decode_size(size)
    crops = [torch.empty(images, dtype=torch.int32) for _ in range(2)]
    mirrors = torch.empty(images, dtype=torch.bool)
    pixels = torch.empty(images, side, side, 3, dtype=torch.uint8)
    return (pixels, *crops, mirrors), torch.empty(images, dtype=torch.int64)


def record_step(
    target: str,
    batch: int,
    dtype: str = "bf16",
    step: str = "train",
    towers: int = 1,
    variant: str = "paper",
    momentum_dtype: str = "float32",
) -> Step:
    """Record one step of AlexNet on ``target``.

    Args:
        target: one of ``fastalex.common.compile.TARGETS``.
        batch: images of the step.
        dtype: of the products, a key of ``PRECISIONS``.
        step: ``"train"`` (augmentation of bytes, forward, loss, backward, updates) or ``"infer"``
            (of these the forward passes, without dropout).
        towers: 2 records one of the two towers of a net that two GPUs share.
        variant: of ``fastalex.AlexNet``.
        momentum_dtype: a key of ``fastalex.training.optim.BUFFERS``.

    Raises:
        ValueError: for 2 towers of a variant that has one, or float16, which a step does not run.
    """
    recorded = Step()
    with FakeTensorMode(allow_non_fake_inputs=True), record_launches(target, lambda *_: None):
        model = AlexNet(variant=variant).train(step == "train")
        if towers > model.variant.towers:
            raise ValueError(f"towers: variant {variant} has {model.variant.towers}, got {towers}")
        if towers > 1:
            cut_to_tower(model, LoopbackExchange())
        size = model.variant.image_size
        augment = Augment(IMAGENET, size, torch.device("cpu"))
        precision = PRECISIONS.get(dtype, dtype)
        rule = "torch" if momentum_dtype == "float32" else "paper"
        buffers = BUFFERS[momentum_dtype]
        optimizer = build_optimizer(model, lr=0.01, rule=rule, momentum_dtype=buffers)
        train_step = TrainStep(model, optimizer, precision, augment=augment)
        images, labels = _batch(batch, size)
        model.seed_dropout(0, 0)
        train_step(images, labels)
        watch = _Watch(recorded)
        for launch in train_step.launches:
            launch.run = functools.partial(watch.see, launch)
        with watch:
            model.seed_dropout(0, 1)
            train_step(images, labels)
    if step == "infer":  # of a step, what comes first
        forward = [e for e in recorded.events if e.phase == "forward" and e.layer != "loss"]
        recorded.events = forward
        recorded.exchanges = [one for one in recorded.exchanges if one.phase == "forward"]
    else:
        recorded.events += watch.beside
    storages: dict[int, torch.UntypedStorage] = {}
    recorded.events = [
        e if e.launch is None else replace(e, launch=without_data(e.launch, storages))
        for e in recorded.events
    ]
    recorded.parameters = sum(p.numel() for p in model.parameters())
    first = recorded.events[0].launch
    assert first is not None
    crops, blocks = (batch, 3, size, size), tuple(first.named["out_ptr"].shape)
    recorded.layers = {
        "augment": Layer("augment", augment, crops, blocks, None, False),
        **layers_of(model, batch, size),
    }
    return recorded
