"""One training step of AlexNet, in the open.

AlexNet is a chain, so its step is one too: augmentation where bytes come in, eight layers forward,
the loss, the same layers backward, and each parameter updated where its gradient is made. Two
towers exchange halves before four of the layers. Nothing passes beside the arguments, and autograd
takes no part: the step is ``TrainStep._record``, the layers are in passes.py.

It runs once as it is written. What it launches is recorded, with the memory that was allocated for
it, and later steps go through that list (fastalex_kernels.program). A CUDA graph holds the same
list; reports, benchmarks and the tuner walk it.
"""

from __future__ import annotations

import contextlib
import itertools
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

import fastalex_kernels as kernels
from fastalex.data.augment import Augment
from fastalex.exchange import Exchange
from fastalex.graph import Graph
from fastalex.layers import (
    AdaptiveAvgPool2d,
    Conv2dReLU,
    Dropout,
    Linear,
    LinearReLUDropout,
    LRNMaxPool2d,
    MaxPool2d,
    SpatialResponseNorm,
)
from fastalex.model import AlexNet, layer_names
from fastalex.nvtx_ranges import listening, nvtx_range
from fastalex.optim import BUFFER, Rates, update_rule
from fastalex.parallel import GatherInput
from fastalex.training.passes import (
    Convolution,
    Flatten,
    FullyConnected,
    Gather,
    Pass,
    Place,
    Pool,
    Torch,
    images_as_blocks,
    images_as_maps,
)
from fastalex.training.updates import FusedUpdate, StoredGradients, Update, momentum_update
from fastalex_kernels._launch import aligned, call, interpreted, use_triton
from fastalex_kernels.augment import augment_forward, padded_lines
from fastalex_kernels.conv2d_relu import pack_weight
from fastalex_kernels.cross_entropy import cross_entropy_forward
from fastalex_kernels.lrn_max_pool2d import MAX_CHANNELS
from fastalex_kernels.momentum import MomentumUpdate, Updates
from fastalex_kernels.program import Launch, Program

PRODUCTS = {"float32": torch.float32, "bf16": torch.bfloat16}
_BLOCK = 4  # pixels between the windows of a layer that reads blocks, and the side of a block
_KNOWN = (
    Conv2dReLU, MaxPool2d, LRNMaxPool2d, SpatialResponseNorm, AdaptiveAvgPool2d, Dropout,
    LinearReLUDropout, Linear, nn.Identity, nn.Sequential, AlexNet,
)  # fmt: skip
_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
Inputs = Sequence[torch.Tensor | None]


@dataclass(frozen=True)
class Tricks:
    """What makes the step fast beyond its kernels; each can be left out, to measure its worth.

    Attributes:
        fused_update: gradients are applied by the kernels that make them.
        fused_activation: a ReLU's backward pass is done by the kernel that makes its gradient.
        early: what needs no answer of the other tower runs while its half is on its way.
        graph: on a GPU the recorded launches are captured as a CUDA graph.
    """

    fused_update: bool = True
    fused_activation: bool = True
    early: bool = True
    graph: bool = False


@dataclass
class _Recorded:
    """A step as recorded for inputs of one shape."""

    program: Program
    loss: torch.Tensor
    squares: dict[str, torch.Tensor]  # of each gradient, by parameter
    graph: Graph | None


class TrainStep:
    """``loss = step(images, labels)``: forward, loss, backward and updates of one batch.

    Args:
        model: an AlexNet of which every parameter is trained, or one tower of it. Its convolutions'
            weights get the memory order that the kernels read; values and shapes stay.
        optimizer: ``torch.optim.SGD`` or ``fastalex.optim.PaperSGD`` over the model's parameters,
            whose rule the step applies. It reads the rates from ``param_groups`` at each call, and
            its momentum buffers are those of the optimizer's ``state``.
        precision: of the products: ``"float32"`` or ``"bf16"``. Parameters are float32.
        exchange: with the other tower; None takes the one that ``parallelize`` gave the model.
        augment: what turns bytes into images, where batches of bytes come in.
        tricks: what is done for speed.
        reduce: called when the gradients are in ``parameter.grad``, before the optimizer's step;
            for replicas that share a batch. It needs ``Tricks(fused_update=False)``.
        tell: is told, once, where a step can't be captured as a CUDA graph.

    Raises:
        ValueError: for a model or an optimizer that it can't run, naming what and why. Autograd and
            the optimizer can.

    A parameter may be changed between two steps, in place or by ``load_state_dict``. A write
    through ``.data`` is seen only where the products read float32: torch does not count it.

    Source: P§3.5, P§5.
    """

    def __init__(
        self,
        model: AlexNet,
        optimizer: torch.optim.Optimizer,
        precision: str = "float32",
        exchange: Exchange | None = None,
        augment: Augment | None = None,
        tricks: Tricks = Tricks(),
        reduce: Callable[[], object] | None = None,
        tell: Callable[[str], object] = print,
    ) -> None:
        if reduce is not None and tricks.fused_update:
            raise ValueError("reduce: fused updates leave no gradient to reduce")
        self._reduce = reduce
        self.model, self.optimizer, self.precision = model, optimizer, precision
        self._exchange, self._augment, self._tricks, self._tell = exchange, augment, tricks, tell
        self._seeds: tuple[int, int] | None = None  # of a dropout that nobody else seeds: see below
        self._build()

    def _build(self) -> None:
        """Everything that is a function of the model and the optimizer as they are now."""
        check(self.model, self.optimizer, self.precision)
        first = next(self.model.parameters())
        self._device, self._triton = first.device, use_triton(first)
        self._dtype = torch.float32 if interpreted() else self._product_dtype()
        self._layers = list(_chain(self.model))
        self._rates = Rates(self.optimizer)
        self._updates: dict[str, MomentumUpdate] = {}
        self._of_layer: dict[nn.Module, Update] = {}
        for _, layer in self._layers:
            if layer is not None and next(layer.parameters(recurse=False), None) is not None:
                self._of_layer[layer] = self._update_of(layer)
        self._written = [x for u in self._updates.values() for x in (u.parameter, u.buffer)]
        self._seen = [(0, -1)] * len(self._updates)  # address and version
        modules = list(self.model.modules())
        self._places = [p for m in modules for p in (m._modules, m._parameters)]
        self._parts = _parts(self._places)
        self._one = torch.ones((), device=self._device)
        self._counters = self.model.dropout_counters()
        self._counted = -1  # their version after the last step
        self._recorded: dict[Any, _Recorded] = {}
        self._last: _Recorded | None = None

    def _product_dtype(self) -> torch.dtype:
        return PRODUCTS[self.precision]

    @property
    def launches(self) -> list[Launch]:
        """What the last call launched, in order, with layer, phase, kernel, grid and arguments."""
        return [] if self._last is None else self._last.program.launches

    def gradient_norms(self) -> dict[str, torch.Tensor]:
        """The Euclidean norm of each parameter's last gradient, float64 scalars on the device."""
        if not self._tricks.fused_update:
            gradients = {n: p.grad for n, p in self.model.named_parameters() if p.grad is not None}
            return {n: g.norm(dtype=torch.float64) for n, g in gradients.items()}
        squares = {} if self._last is None else self._last.squares
        return {name: s.sum(dtype=torch.float64).sqrt() for name, s in squares.items()}

    def __call__(self, images: Any, labels: torch.Tensor) -> torch.Tensor:
        """Do one step.

        Args:
            images: [N, 3, H, W]; or bytes as the loader gives them, the arguments of ``augment``:
                images [N, D, D, 3] uint8, tops, lefts and mirrors [N], and colors [N, 3] or none.
            labels: int64 [N].

        Returns:
            The mean loss, a float32 scalar on the device, in memory of its own.

        Raises:
            ValueError: for bytes without ``augment``, images of a wrong shape, or a model that was
                changed into one that the step can't run.
        """
        self._follow()
        images = getattr(images, "pixels", images)
        given = (*(images if isinstance(images, (tuple, list)) else (images,)), labels)
        key = (self.model.training, *map(_form, given))
        recorded = self._recorded.get(key)
        if recorded is None:
            self._check(images, labels)
            recorded = self._recorded[key] = self._record(self._inputs(images, labels))
        elif recorded.graph is not None:
            recorded.graph.run(self._inputs(images, labels))
        else:
            recorded.program.give(self._inputs(images, labels))
            recorded.program.run()
        self._last = recorded
        if not self._tricks.fused_update:
            self._apply_stored()
        self._wrote()
        return recorded.loss.clone()

    @torch.no_grad()
    def _record(self, inputs: Inputs) -> _Recorded:
        """The step, as it is done for the first time."""
        *images, labels = inputs
        assert labels is not None
        layers = self._passes(images)
        program = Program(inputs)
        with program.recording():
            with _at(program, "augment" if len(images) > 1 else "conv1", "forward"):
                x = self._first_input(program, images)
            for name, layer in layers:
                with _at(program, name, "forward"):
                    x = layer.forward(x)
            with _at(program, "loss", "forward"):
                loss, made = self._loss(x, labels)
            gradient: torch.Tensor | None = made
            partials: torch.Tensor | None = None
            for name, layer in reversed(layers):
                assert gradient is not None
                with _at(program, name, "backward"):
                    gradient, partials = layer.backward(gradient, partials)
        squares = {n: u.squares for n, u in self._updates.items() if u.squares is not None}
        graph = None
        if self._tricks.graph and self._device.type == "cuda":
            graph = Graph(program, self._exchange_of(), self._tell)
        return _Recorded(program, loss, squares, graph)

    def _passes(self, images: Inputs) -> list[tuple[str, Pass]]:
        """The layers, each knowing what stands below and above it."""
        maps = self.model.map_size(self._image_size(images))
        passes: list[tuple[str, Pass]] = []
        for name, layer in self._layers:
            if layer is self.model.avgpool and maps == self.model.avgpool.output_size:
                continue  # it has nothing to do
            passes.append((name, Flatten() if layer is None else self._pass(layer)))
        chain = [one for _, one in passes]
        fused = [
            self._tricks.fused_activation and below.relu and above.masks
            for below, above in itertools.pairwise(chain)
        ]
        for i, one in enumerate(chain):
            one.place = Place(
                first=i == 0,
                relu_below=i > 0 and fused[i - 1],
                relu_done=i < len(fused) and fused[i],
            )
        return passes

    def _pass(self, layer: nn.Module) -> Pass:
        early, gather = self._tricks.early, self._gather(layer)
        update = self._of_layer.get(layer)
        if not self._has_kernels(layer):
            return Torch(layer, update, gather, self._dtype)
        if isinstance(layer, MaxPool2d):
            return Pool(layer)
        assert update is not None
        if isinstance(layer, Conv2dReLU):
            return Convolution(layer, update, gather, early)
        assert isinstance(layer, (Linear, LinearReLUDropout))
        return FullyConnected(layer, update, gather, early)

    def _has_kernels(self, layer: nn.Module) -> bool:
        if not self._triton:
            return False
        if isinstance(layer, Conv2dReLU):
            first = layer is self._layers[0][1]
            return layer.stride == (1, 1) or (first and layer.groups == 1)
        if isinstance(layer, LRNMaxPool2d):
            widest = max(m.weight.shape[0] for _, m in self._layers if isinstance(m, nn.Conv2d))
            return widest // layer.groups <= MAX_CHANNELS
        linear = isinstance(layer, (Linear, LinearReLUDropout)) and getattr(layer, "groups", 1) == 1
        return linear or isinstance(layer, MaxPool2d)

    def _gather(self, layer: nn.Module) -> Gather | None:
        hook = _gather_hook(layer)
        return None if hook is None else Gather(self._exchange or hook.exchange, hook.summed)

    def _exchange_of(self) -> Exchange | None:
        hooks = [_gather_hook(layer) for _, layer in self._layers if layer is not None]
        return self._exchange or next((h.exchange for h in hooks if h is not None), None)

    def _update_of(self, layer: nn.Module) -> Update:
        """The updates of a layer's parameters, in the memory order that its kernels read."""
        has_kernels = self._has_kernels(layer)
        if has_kernels and isinstance(layer, Conv2dReLU) and layer.stride[0] == 1:
            layer.weight.data = pack_weight(layer.weight.data).permute(3, 2, 0, 1)
        rule, paths = update_rule(self.optimizer), {m: n for n, m in self.model.named_modules()}
        made = []
        for kind, parameter in layer.named_parameters(recurse=False):
            buffer = torch.zeros_like(parameter)
            given = self.optimizer.state[parameter].get(BUFFER)
            if given is not None:
                buffer.copy_(given)
            self.optimizer.state[parameter][BUFFER] = buffer
            rate = self._rates.of(parameter)
            update = momentum_update(
                parameter, buffer, rate, rule, self._dtype, layer if has_kernels else None
            )
            self._updates[f"{paths[layer]}.{kind}"] = update
            made.append(update)
        form = FusedUpdate if self._tricks.fused_update else StoredGradients
        return form(layer, Updates(*made))

    def _first_input(self, program: Program, images: Inputs) -> torch.Tensor:
        """What the first layer reads: HWNC maps, or blocks of pixels as their channels."""

        def made(make: Callable[..., torch.Tensor], *arguments: Any) -> torch.Tensor:
            out = make(None, self._dtype, *arguments)
            program.add(make, None, [out, self._dtype, *arguments], {})
            return out

        first = self._layers[0][1]
        strided = None
        if isinstance(first, Conv2dReLU) and self._has_kernels(first) and first.stride[0] > 1:
            strided = first
        source = images[0]
        if len(images) > 1:
            if not self._triton:
                return made(augmented_as_maps, self._augment, *images)
            blocks = strided if strided is not None and strided.stride[0] == _BLOCK else None
            out = self._augmented(images, blocks)
            if blocks is not None:
                return out
            source = out.permute(0, 3, 1, 2)
        if strided is not None:
            return made(images_as_blocks, source, strided)
        return made(images_as_maps, source)

    def _augmented(self, images: Sequence[Any], layer: Conv2dReLU | None) -> torch.Tensor:
        """The batch as the blocks that ``layer`` reads, or as images [N, H, W, 3]."""
        augment = self._augment
        assert augment is not None
        size, block, kernel_size = augment.size, 1, 1
        sides = ((0, 0), (0, 0))
        if layer is not None:
            block, kernel_size, sides = _BLOCK, layer.kernel_size[0], layer.sides(size, size)
        lines = padded_lines(size, sides, block, kernel_size)
        pixels, tops, lefts, mirrors, colors = images
        return augment_forward(
            pixels, tops, lefts, mirrors, colors, augment.mean, augment.scale, augment.centred,
            size, sides, block, lines, self._dtype,
        )  # fmt: skip

    def _loss(
        self, logits: torch.Tensor, labels: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The mean loss, and the gradient of the logits."""
        if self._triton:
            loss, gradient = cross_entropy_forward(logits, labels, self._one)
            assert gradient is not None
            return loss, gradient
        loss, gradient = self._one.new_empty(()), torch.empty_like(logits)
        call(_torch_loss, logits, labels, loss, gradient)
        return loss, gradient

    def _inputs(self, images: Any, labels: torch.Tensor) -> Inputs:
        """The tensors that the program reads: the images, or five of bytes; and the labels."""
        labels = labels.contiguous()
        if isinstance(images, torch.Tensor):
            return [images, labels]
        pixels, tops, lefts, mirrors, *colors = images
        if self._triton:
            mirrors = mirrors.contiguous().view(torch.uint8)
            pixels, tops, lefts = pixels.contiguous(), tops.contiguous(), lefts.contiguous()
        return [pixels, tops, lefts, mirrors, colors[0] if colors else None, labels]

    def _check(self, images: Any, labels: torch.Tensor) -> None:
        """Raise an error that names what is wrong with a batch of a form that did not come yet."""
        if isinstance(images, (tuple, list)):
            if self._augment is None:
                raise ValueError("images: bytes need augment=, which says what becomes of them")
            self._augment(*(x[:0] for x in images))
            count, device = len(images[0]), images[0].device
        elif not isinstance(images, torch.Tensor):
            raise TypeError(f"images: expected a tensor or bytes, got {type(images).__name__}")
        elif images.dim() != 4 or images.shape[1] != 3 or not images.is_floating_point():
            came = f"{images.dtype} {tuple(images.shape)}"
            raise ValueError(f"images: expected floats [N, 3, H, W], got {came}")
        else:
            self.model.check_image_size(images.shape[2], images.shape[3])
            count, device = len(images), images.device
        if device != self._device:
            raise ValueError(f"images: expected device {self._device}, got {device}")
        if labels.dtype != torch.int64 or labels.shape != (count,):
            came = f"{labels.dtype} {list(labels.shape)}"
            raise ValueError(f"labels: expected int64 [{count}], got {came}")
        if labels.device != device:
            raise ValueError(f"labels: expected device {device}, got {labels.device}")

    def _image_size(self, images: Inputs) -> tuple[int, int]:
        if len(images) > 1:
            assert self._augment is not None
            return self._augment.size, self._augment.size
        assert images[0] is not None
        return images[0].shape[2], images[0].shape[3]

    def _follow(self) -> None:
        """Take over what was changed since the last step."""
        if self.model.dropout_version() == self._counted:  # nobody seeds the masks but the step
            if self._seeds is None:
                self._seeds = int(torch.randint(2**62, ())), 0
            seed, number = self._seeds
            self.model.seed_dropout(seed, number)
            self._seeds = seed, number + 1
        if self.model.dropout_counters() is not self._counters or not self._same_model():
            self._build()
        self._rates.follow()
        state = self.optimizer.state
        for update, seen in zip(self._updates.values(), self._seen, strict=True):
            if state[update.parameter].get(BUFFER) is not update.buffer:
                self._take_buffer(update)
            if seen != (_address(update.parameter), update.parameter._version):
                update.refresh()

    @torch.no_grad()
    def _take_buffer(self, update: MomentumUpdate) -> None:
        """Go on with the momentum that the optimizer has now, in the memory of before."""
        held = self.optimizer.state[update.parameter]
        given = held.get(BUFFER)
        update.buffer.zero_() if given is None else update.buffer.copy_(given)
        held[BUFFER] = update.buffer

    def _same_model(self) -> bool:
        """Whether layers and parameters are the ones the step was built for, where they were."""
        here = _parts(self._places)
        return (
            len(here) == len(self._parts)
            and all(map(operator.is_, here, self._parts))
            and all(
                address in (0, _address(update.parameter))
                for update, (address, _) in zip(self._updates.values(), self._seen, strict=True)
            )
        )

    def _apply_stored(self) -> None:
        """What is outside of the recorded step where gradients are stored."""
        for form in self._of_layer.values():
            assert isinstance(form, StoredGradients)
            form.attach()
        if self._reduce is not None:
            self._reduce()
        self.optimizer.step()
        for update in self._updates.values():
            update.refresh()

    def _wrote(self) -> None:
        """Tell autograd what the kernels wrote, and remember it."""
        torch.autograd.graph.increment_version(self._written)
        self._seen = [(_address(u.parameter), u.parameter._version) for u in self._updates.values()]
        self._counted = self.model.dropout_version()


def _form(x: Any) -> object:
    """What of an input the recorded launches depend on."""
    if not isinstance(x, torch.Tensor):
        return type(x)
    return x.shape, x.stride(), x.dtype, x.device, aligned(x)


def _parts(places: Sequence[dict[str, Any]]) -> list[Any]:
    """The modules and parameters in ``places``, the dictionaries that modules keep them in."""
    return [part for place in places for part in place.values()]


def check(model: AlexNet, optimizer: torch.optim.Optimizer, precision: str) -> None:
    """Raise a ValueError that names what ``TrainStep`` can't run, and why."""
    if precision not in PRODUCTS:
        raise ValueError(
            f"precision: expected one of {', '.join(PRODUCTS)}, got {precision!r}: float16 needs "
            "its loss scaled, which autograd and torch.amp do"
        )
    for path, module in model.named_modules():
        what = f"model: {path or 'the model'} is a {type(module).__name__}"
        if type(module) not in _KNOWN:
            raise ValueError(f"{what}, which is no layer of fastalex's")
        hooks = [hook for kind in _HOOKS for hook in getattr(module, kind).values()]
        if any(not isinstance(hook, GatherInput) for hook in hooks):
            raise ValueError(f"{what} with a hook, and the step calls no module")
    update_rule(optimizer)
    owned = {p for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        what = f"model: {name}"
        if not parameter.requires_grad:
            raise ValueError(f"{what} is frozen, and the step updates every parameter")
        if parameter.dtype != torch.float32:
            raise ValueError(f"{what} is {parameter.dtype}, expected float32 for every precision")
        if parameter not in owned:
            raise ValueError(f"{what} is not among the optimizer's parameters")
    if len(owned) > len(list(model.parameters())):
        raise ValueError("optimizer: it has parameters that are not the model's")


def _chain(model: AlexNet) -> Iterator[tuple[str, nn.Module | None]]:
    """The layers in order, by name; None stands for the flattening before the first rows."""
    names = {module: name for name, module in layer_names(model).items()}
    last = ""
    for module in model.features.modules():
        if module in names:
            last = names[module]
            yield last, module
    yield last, model.avgpool
    yield last, None
    for module in model.classifier.modules():
        if module in names:
            yield names[module], module


def _address(x: torch.Tensor) -> int:
    """Where ``x`` begins; 0 of a tensor without data."""
    return 0 if isinstance(x, FakeTensor) else x.data_ptr()


def _gather_hook(layer: nn.Module) -> GatherInput | None:
    hooks = layer._forward_pre_hooks.values()
    return next((hook for hook in hooks if isinstance(hook, GatherInput)), None)


@contextlib.contextmanager
def _at(program: Program, layer: str, phase: str) -> Iterator[None]:
    """Whose launches follow; a profiler that listens sees each step's in a range of its name."""
    program.at(layer, phase)
    if not listening():
        yield
        return
    shown = nvtx_range(f"{layer} {phase}")
    call(shown.__enter__)
    yield
    call(shown.__exit__, None, None, None)


def augmented_as_maps(
    out: torch.Tensor | None, dtype: torch.dtype, augment: Augment, *pixels: Any
) -> torch.Tensor:
    """What ``augment`` makes of bytes, as ``images_as_maps`` does."""
    return images_as_maps(out, dtype, augment(*(x for x in pixels if x is not None)))


def _torch_loss(
    logits: torch.Tensor, labels: torch.Tensor, loss: torch.Tensor, gradient: torch.Tensor
) -> None:
    """The loss by torch's operators."""
    leaf = logits.detach().requires_grad_()
    with torch.enable_grad():
        mean = kernels.cross_entropy(leaf, labels)
    loss.copy_(mean.detach())
    gradient.copy_(torch.autograd.grad(mean, leaf)[0])
