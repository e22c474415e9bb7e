"""One step of the real model on tensors without data: what a GPU would be asked to do, in order.

Both kinds of work are recorded: launches of ``fastalex_kernels``, and the operators of torch that
run beside them, each with the layer and the pass it belongs to.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.tools.tensor_descriptor import TensorDescriptor

import fastalex_kernels as kernels
from fastalex import offline, parallel
from fastalex.data import Normalization, decode_size
from fastalex.data.augment import Augment
from fastalex.fused_update import fuse_updates, lay_out
from fastalex.layers import Dropout, LRNMaxPool2d, MaxPool2d, SpaceToDepth, SpatialResponseNorm
from fastalex.model import AlexNet
from fastalex.optim import build_optimizer
from fastalex_kernels._launch import record_launches

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_CHANNELS = Normalization((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))  # a mean and a deviation of each
_NO_WORK = ("empty", "new_empty", "_unsafe_view", "_local_scalar_dense", "set_", "lift_fresh")
_OVERWRITES = ("copy_", "fill_", "zero_")  # they write their first tensor without reading it
_CHUNK, _CHUNKS = (
    65536,
    320,
)  # elements of a block, blocks of a launch: torch's MultiTensorApply.cuh


@dataclass(frozen=True)
class Event:
    """One launch of ours or one operator of torch's.

    Args:
        layer: ``"augment"``, ``"conv1"``, ``"pool1"``, ... ``"fc8"``, ``"loss"``, ``"optimizer"``
            or ``"step"``.
        phase: ``"forward"``, ``"backward"`` or ``"update"``.
        launch: the launch, None for an operator.
        name: of the kernel or operator.
        places: where each tensor of the launch begins, by argument: equal for views of one.
        read, written: bytes an operator moves.
        sizes: elements of the tensors an operator reads.
        launches: kernels it comes to.
    """

    layer: str
    phase: str
    name: str
    launch: offline.Launch | None = None
    places: Mapping[str, Any] = field(default_factory=dict)
    read: int = 0
    written: int = 0
    sizes: tuple[int, ...] = ()
    launches: int = 1


@dataclass(frozen=True)
class Layer:
    """What a layer was given and what it made; of the augmentation, its crops and their blocks."""

    name: str
    module: nn.Module | Augment
    input: tuple[int, ...]
    output: tuple[int, ...]
    weight: tuple[int, ...] | None
    needs_input_grad: bool


@dataclass
class Swap:
    """A tensor swapped with the other tower.

    Args:
        layer, phase: that waits for it.
        size: bytes in each direction.
        begun, ended: what stands between these places of the step's events runs meanwhile.
    """

    layer: str
    phase: str
    size: int
    begun: int
    ended: int


@dataclass
class Step:
    """A recorded step.

    Attributes:
        events: in order.
        layers: by name, in order.
        parameters: elements of each of the model's parameters.
        exchanged: every swap with the other tower, in order.
    """

    events: list[Event] = field(default_factory=list)
    layers: dict[str, Layer] = field(default_factory=dict)
    parameters: list[int] = field(default_factory=list)
    exchanged: list[Swap] = field(default_factory=list)


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Keeps every operator that does work, and knows which layer it is in."""

    def __init__(self, step: Step) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.step = step
        self.place = ("step", "forward")

    def at(self, layer: str, phase: str) -> None:
        self.place = (layer, phase)

    def launched(self, kernel: Any, grid: Any, args: Any, kwargs: Any) -> None:
        places = {name: _place(x) for name, x in zip(kernel.arg_names, args, strict=False)}
        launch = offline.Launch(kernel, grid, args, kwargs)
        self.step.events.append(Event(*self.place, launch.name, launch, places))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        event = _operator(self.place, func, (args, kwargs), result)
        if event is not None:
            self.step.events.append(event)
        return result


def tensor_of(argument: Any) -> torch.Tensor | None:
    """The tensor behind a kernel's argument, None where it is a number."""
    if isinstance(argument, TensorDescriptor):
        argument = argument.base
    return argument if isinstance(argument, torch.Tensor) else None


def _place(argument: Any) -> Any:
    x = tensor_of(argument)
    return None if x is None else (x.untyped_storage()._cdata, x.storage_offset())


def _tensors(*trees: Any) -> list[torch.Tensor]:
    return [x for x in tree_leaves(trees) if isinstance(x, torch.Tensor) and x.numel()]


def _size(tensors: Sequence[torch.Tensor]) -> int:
    return sum(x.numel() * x.element_size() for x in tensors)


def _operator(place: tuple[str, str], func: Any, arguments: Any, result: Any) -> Event | None:
    """The operator as an event; None where it only looks at tensors in another way."""
    schema = func._schema
    name = schema.name.split("::")[1]
    alias = [r.alias_info for r in schema.returns]
    looks = any(a is not None and not a.is_write for a in alias)
    if func.namespace != "aten" or looks or name.startswith(_NO_WORK):
        return None
    read, written = _tensors(arguments), _tensors(result)
    if not read and not written:
        return None
    if name == "_fused_sgd_":
        # The gradients are marked as written, for a loss scale; without one they are not.
        parameters, gradients, momenta = arguments[0][:3]
        chunks = sum(-(-p.numel() // _CHUNK) for p in parameters)
        read, written = _tensors(parameters, gradients, momenta), _tensors(parameters, momenta)
        launches = -(-chunks // _CHUNKS)
    else:
        launches = 1
        if name in _OVERWRITES:
            read = read[1:]
    sizes = tuple(x.numel() for x in read)
    return Event(*place, f"aten.{name}", None, {}, _size(read), _size(written), sizes, launches)


class _NoPeer:
    """Stands for the process that holds the other tower: a swap keeps its size, and no data."""

    rank = 0

    def __init__(self, recorder: _Recorder) -> None:
        self.recorder = recorder

    def start(self, x: torch.Tensor) -> _NoTransfer:
        return _NoTransfer(self.recorder, x)


class _NoTransfer:
    def __init__(self, recorder: _Recorder, x: torch.Tensor) -> None:
        self.recorder, self.sent = recorder, x
        self.begun = len(recorder.step.events)

    def wait(self) -> torch.Tensor:
        step = self.recorder.step
        swap = Swap(*self.recorder.place, _size([self.sent]), self.begun, len(step.events))
        step.exchanged.append(swap)
        return torch.empty_like(self.sent)


def layer_names(model: AlexNet) -> dict[str, nn.Module]:
    """The layers by the names papers use: conv1, pool1, ... fc8; those that do nothing left out."""
    names: dict[str, nn.Module] = {}
    number = 0
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            number += 1
            names[f"{'conv' if isinstance(module, nn.Conv2d) else 'fc'}{number}"] = module
        elif isinstance(module, LRNMaxPool2d) and module.kernel_size == 1:
            names[f"norm{number}"] = module
        elif isinstance(module, MaxPool2d):
            names[f"pool{number}"] = module
        elif isinstance(module, SpatialResponseNorm):
            names[f"spatial-norm{number}"] = module
        elif isinstance(module, Dropout):
            names[f"dropout{number}"] = module
    return names


def _watch(model: AlexNet, recorder: _Recorder) -> None:
    """Tell ``recorder`` which layer runs, forward and backward."""

    def enter(name: str) -> Any:
        return lambda module, inputs: recorder.at(name, "forward")

    def leave(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: torch.Tensor) -> None:
            weight = getattr(module, "weight", None)
            recorder.step.layers[name] = Layer(
                name,
                module,
                tuple(inputs[0].shape),
                tuple(output.shape),
                None if weight is None else tuple(weight.shape),
                inputs[0].requires_grad,
            )
            if output.requires_grad:
                output.register_hook(  # type: ignore[no-untyped-call]
                    lambda _: recorder.at(name, "backward")
                )

        return hook

    for name, module in layer_names(model).items():
        module.register_forward_pre_hook(enter(name), prepend=True)
        module.register_forward_hook(leave(name))


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Let ``dtype`` be torch's default inside the ``with`` block."""
    previous = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(previous)


@dataclass(frozen=True)
class _Batch:
    """Images as bytes with their crops, as ``fastalex.data`` hands them over, and their labels.

    ``one`` is the gradient of the loss.
    """

    pixels: tuple[torch.Tensor, ...]
    labels: torch.Tensor
    one: torch.Tensor

    @classmethod
    def empty(cls, images: int, size: int) -> _Batch:
        side = decode_size(size)
        crops = [torch.empty(images, dtype=torch.int32) for _ in range(2)]
        mirrors = torch.empty(images, dtype=torch.bool)
        pixels = torch.empty(images, side, side, 3, dtype=torch.uint8)
        labels = torch.empty(images, dtype=torch.int64)
        return cls((pixels, *crops, mirrors), labels, torch.ones(()))


def _train(
    recorder: _Recorder,
    model: AlexNet,
    augment: Augment,
    optimizer: Any,
    batch: _Batch,
    dtype: Any,
    number: int,
) -> None:
    """Step ``number`` as ``fastalex.engine`` makes it."""
    recorder.at("step", "forward")
    model.seed_dropout(0, number)
    with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
        recorder.at("augment", "forward")
        images = augment.for_layer(model.features[0], *batch.pixels)
        made = images.blocks if isinstance(images, SpaceToDepth) else images
        recorder.step.layers["augment"] = Layer(
            "augment", augment, tuple(images.shape), tuple(made.shape), None, False
        )
        logits = model(images)
    recorder.at("loss", "forward")
    loss = kernels.cross_entropy(logits, batch.labels, gradient=batch.one)
    optimizer.zero_grad()
    recorder.at("loss", "backward")
    loss.backward(batch.one)  # type: ignore[no-untyped-call]
    recorder.at("optimizer", "update")
    optimizer.step()


def record_step(
    target: str,
    batch: int,
    dtype: str = "bf16",
    step: str = "train",
    towers: int = 1,
    variant: str = "paper",
) -> Step:
    """Record one step of AlexNet on ``target``.

    Args:
        target: one of ``fastalex.offline.TARGETS``.
        batch: images of the step.
        dtype: of the products, a key of ``DTYPES``. In training the parameters are float32 and
            autocast chooses what runs in ``dtype``; for inference they are in ``dtype``.
        step: ``"train"`` (augmentation of bytes, forward, loss, backward, optimizer) or
            ``"infer"`` (forward, of images).
        towers: 2 records one of the two towers of a net that two GPUs share.
        variant: of ``fastalex.AlexNet``.

    Raises:
        ValueError: for 2 towers of a variant that has one.
    """
    recorded = Step()
    recorder = _Recorder(recorded)
    kind = DTYPES[dtype]
    with FakeTensorMode(allow_non_fake_inputs=True):
        with default_dtype(kind if step == "infer" else torch.float32):
            model = AlexNet(variant=variant)
        if towers > 1:
            parallel.cut_to_tower(model, _NoPeer(recorder))
        _watch(model, recorder)
        size = model.variant.image_size
        with record_launches(target, recorder.launched):
            if step == "infer":
                model.eval()
                with torch.no_grad(), recorder:  # inference mode hides copies
                    model(torch.empty(batch, 3, size, size, dtype=kind))
            else:
                lay_out(model)
                augment = Augment(_CHANNELS, size, torch.device("cpu"))
                given = _Batch.empty(batch, size)
                optimizer = build_optimizer(model, lr=0.01)
                fuse_updates(model, optimizer, kind)
                for number in (1, 2):  # the first step also copies the weights for the products
                    recorded.events.clear()
                    recorded.exchanged.clear()
                    with recorder:
                        _train(recorder, model, augment, optimizer, given, kind, number)
        recorded.parameters = [p.numel() for p in model.parameters()]
    recorded.events = [_detached(event) for event in recorded.events]
    return recorded


def _detached(event: Event) -> Event:
    """The event with launch arguments that outlive the recording."""
    if event.launch is None:
        return event
    arguments = tuple(map(offline.without_data, event.launch.args))
    return replace(event, launch=replace(event.launch, args=arguments))
