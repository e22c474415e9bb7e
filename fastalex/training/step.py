"""One training step of AlexNet, in the open.

AlexNet is a chain, so its step is one too: augmentation where bytes come in, eight layers forward,
the loss, the same layers backward, and each parameter updated where its gradient is made. Two
towers exchange halves before three of the layers, and sums after the last. Nothing passes beside
the arguments, and autograd takes no part: the step is ``TrainStep._record``, the layers are in
passes.py.

It runs once as it is written. What it launches is recorded, with the memory that was allocated for
it, and later steps go through that list (fastalex_kernels.common.program). A CUDA graph holds the
same list; reports, benchmarks and the tuner walk it.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor

from fastalex.common.nvtx_ranges import listening, nvtx_range
from fastalex.data.augment import Augment
from fastalex.distributed.exchange import Exchange
from fastalex.model.alexnet import HOOKS, AlexNet
from fastalex.training.chain import Chain, Tricks, check
from fastalex.training.check import float32_precisions, parts_on_aten
from fastalex.training.cuda_graph import Graph
from fastalex.training.inputs import Inputs, check_batch, input_tensors, signature
from fastalex.training.optim import BUFFER, count_step, gradient_norms
from fastalex.training.passes import Pass, Sum
from fastalex.training.updates import StoredGradients
from fastalex_kernels.common.backend import interpreted
from fastalex_kernels.common.launch import call
from fastalex_kernels.common.program import Launch, Program

__all__ = ["TrainStep", "Tricks"]

PRODUCTS = {"float32": torch.float32, "bf16": torch.bfloat16}
_ALL = Tricks()


@dataclass
class _Recorded:
    """A step as recorded for inputs of one shape."""

    program: Program  # its first run was the recording
    loss: torch.Tensor  # or its parts
    squares: dict[str, torch.Tensor]  # of each gradient, by parameter
    run: Callable[[Inputs], None]


class TrainStep:
    """``loss = step(images, labels)``: forward, loss, backward and updates of one batch.

    Args:
        model: an AlexNet of which every parameter is trained, or one tower of it. Its convolutions'
            weights get the memory order that the kernels read; values and shapes stay.
        optimizer: ``torch.optim.SGD`` or ``PaperSGD`` over the model's parameters, whose rule the
            step applies. It reads the rates from ``param_groups`` at each call, and
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
        tricks: Tricks = _ALL,
        reduce: Callable[[], object] | None = None,
        tell: Callable[[str], object] = print,
    ) -> None:
        if precision not in PRODUCTS:
            raise ValueError(
                f"precision: expected one of {', '.join(PRODUCTS)}, got {precision!r}: float16 "
                "needs its loss scaled, which autograd and torch.amp do"
            )
        if reduce is not None and tricks.fused_update:
            raise ValueError("reduce: fused updates leave no gradient to reduce")
        self.model, self.optimizer, self.precision = model, optimizer, precision
        self.augment, self.tricks, self._exchange = augment, tricks, exchange
        self._reduce, self._tell = reduce, tell
        self._seeds: tuple[int, int] | None = None  # of a dropout that nobody else seeds
        self._aten: frozenset[str] = frozenset()  # parts that do not run on their kernels
        self._build()

    def _build(self) -> None:
        """Everything that is a function of the model and the optimizer as they are now."""
        check(self.model, self.optimizer)
        dtype = torch.float32 if interpreted() else self._product_dtype()
        self._chain = Chain(
            self.model, self.optimizer, dtype, self.tricks, self._exchange, self.augment,
            self._aten,
        )  # fmt: skip
        self._updates = list(self._chain.updates.values())
        self._written = [x for update in self._updates for x in (update.parameter, update.buffer)]
        self._versions = [-1] * len(self._updates)  # of the parameters, as the products read them
        kinds = ("_modules", "_parameters", *HOOKS)
        self._registries = [getattr(m, kind) for m in self.model.modules() for kind in kinds]
        self._built_of = self._identity()
        self._dropout_version = -1  # after the last step
        self._recorded: dict[Any, _Recorded] = {}
        self._last: _Recorded | None = None

    def _product_dtype(self) -> torch.dtype:
        return PRODUCTS[self.precision]

    @property
    def exchange(self) -> Exchange | None:
        """With the other tower; None of a whole net."""
        return self._chain.exchange

    @property
    def launches(self) -> list[Launch]:
        """What the last call launched, in order, with layer and arguments; see ``Launch``."""
        return [] if self._last is None else self._last.program.launches

    def gradient_norms(self) -> dict[str, torch.Tensor]:
        """The Euclidean norm of each parameter's last gradient, float64 scalars on the device."""
        if not self.tricks.fused_update:
            return gradient_norms(self.model)
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
        if self.tricks.fused_update:  # else the optimizer does
            count_step(self.optimizer)
        self._follow()
        images = getattr(images, "pixels", images)
        parts = images if isinstance(images, (tuple, list)) else (images,)
        key = (self.model.training, float32_precisions(), *map(signature, (*parts, labels)))
        recorded = self._recorded.get(key)
        if recorded is None:
            check_batch(images, labels, self.model, self.augment)
        inputs = input_tensors(images, labels, self._chain.has_kernels)
        if recorded is None:
            while self._chain.has_kernels and self._check_kernels(inputs):
                self._build()
                self._follow()
            recorded = self._recorded[key] = self._record(inputs)
        else:
            recorded.run(inputs)
        self._last = recorded
        if not self.tricks.fused_update:
            self._apply_stored()
        torch.autograd.graph.increment_version(self._written)  # kernels wrote, autograd did not see
        self._versions = [update.parameter._version for update in self._updates]
        self._dropout_version = self.model.dropout_version()
        return recorded.loss.sum()

    @property
    def uses_aten(self) -> bool:
        """Whether ATen computes a part, because its kernels are wrong or slow here."""
        return bool(self._aten)

    @torch.no_grad()
    def _check_kernels(self, inputs: Inputs) -> bool:
        """Check what was not checked before on this GPU; whether ATen takes over another part."""
        before, self._aten = self._aten, parts_on_aten(self._chain, inputs, self._tell)
        return self._aten != before

    @torch.no_grad()
    def _record(self, inputs: Inputs) -> _Recorded:
        """The step, as it is done for the first time."""
        *images, labels = inputs
        assert labels is not None
        program = Program(inputs, self.tricks.dependent_launch)
        layers = self._passes(images)
        with program.recording():
            with _at(program, "augment" if len(images) > 1 else layers[0][0], "forward"):
                x = self._chain.first_input(images)
            for name, layer in layers:
                with _at(program, name, "forward"):
                    x = layer.forward(x)
            with _at(program, "loss", "forward"):
                loss, dlogits = self._chain.loss(x, labels)
            dy: torch.Tensor | Sum | None = dlogits
            bias_partials = None
            for name, layer in reversed(layers):
                assert dy is not None
                with _at(program, name, "backward"):
                    dy, bias_partials = layer.backward(dy, bias_partials)
        updates = self._chain.updates.items()
        squares = {name: u.squares for name, u in updates if u.squares is not None}
        run: Callable[[Inputs], None] = program.run
        if self.tricks.graph and labels.is_cuda:
            run = Graph(program, self.exchange, self._tell).run
        return _Recorded(program, loss, squares, run)

    def _passes(self, images: Inputs) -> list[tuple[str, Pass]]:
        return self._chain.passes(images)

    def _follow(self) -> None:
        """Take over what was changed since the last step."""
        if self.model.dropout_version() == self._dropout_version:  # nobody else seeds the masks
            if self._seeds is None:
                self._seeds = int(torch.randint(2**62, ())), 0
            seed, number = self._seeds
            self.model.seed_dropout(seed, number)
            self._seeds = seed, number + 1
        if not self._is_same_model():
            self._build()
        self._chain.rates.follow()
        for update, version in zip(self._updates, self._versions, strict=True):
            state = self.optimizer.state[update.parameter]
            if state.get(BUFFER) is not update.buffer:  # go on with it, in the memory of before
                update.load_buffer(state.get(BUFFER))
                state[BUFFER] = update.buffer
            if version != update.parameter._version:
                update.refresh()

    def _identity(self) -> tuple[list[Any], list[Any]]:
        """What the launches were recorded for: modules, parameters and hooks; and their memory."""
        parts = [part for registry in self._registries for part in registry.values()]
        memory = [(u.parameter.requires_grad, _address(u.parameter)) for u in self._updates]
        return [*parts, self.model.dropout_counters()], memory

    def _is_same_model(self) -> bool:
        (parts, memory), (built, built_memory) = self._identity(), self._built_of
        same = len(parts) == len(built) and memory == built_memory
        return same and all(map(operator.is_, parts, built))

    def _apply_stored(self) -> None:
        """What is outside of the recorded step where gradients are stored."""
        for stored in self._chain.by_layer.values():
            assert isinstance(stored, StoredGradients)
            stored.attach()
        if self._reduce is not None:
            self._reduce()
        self.optimizer.step()
        for update in self._updates:
            update.refresh()


def _address(x: torch.Tensor) -> int:
    """Where ``x`` begins; 0 of a tensor without data."""
    return 0 if isinstance(x, FakeTensor) else x.data_ptr()


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
