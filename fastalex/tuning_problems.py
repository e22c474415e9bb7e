"""Which problems the layers of a net pose to kernels that can be tuned, each with candidates."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from fastalex_kernels._begun import HALVES, carry
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from fastalex import layer_pairs, offline
from fastalex.layer_pairs import LayerPair, WrongResult
from fastalex.layers import Linear, LinearReLUDropout
from fastalex.recorded_step import Layer, default_dtype
from fastalex.tuning_candidates import candidates, follows_tile
from fastalex_kernels import backend
from fastalex_kernels._launch import record_launches, run
from fastalex_kernels._linear_update import linear_backward_weight_update
from fastalex_kernels._tuned import Key, Tile, choosing
from fastalex_kernels.linear_relu_dropout import begin_linear
from fastalex_kernels.momentum import MomentumUpdate
from fastalex_kernels.reference import relative_error, tolerance

Prepare = Callable[[torch.Tensor], torch.Tensor]
_RATE = (1.0, 0.0, 0.0)  # learning rate, momentum, decay: the velocity becomes the gradient


@dataclass(frozen=True)
class Task:
    """A pass through a layer that launches kernels, and its comparison with float64."""

    layer: str
    direction: str
    run: Callable[[], object]
    check: Callable[[], object]


@dataclass
class Candidate:
    """A choice for one problem, and what became of it."""

    tile: Tile
    skipped: str | None = None
    seconds: float | None = None
    score: float | None = None  # share of the GPU's time, at best; computed
    launches: list[offline.Launch] = field(default_factory=list)


@dataclass
class Problem:
    """What one kernel is asked in one pass; the first candidate is the package's own choice."""

    layer: str
    direction: str
    key: Key
    candidates: list[Candidate]

    @property
    def own(self) -> Candidate:
        return self.candidates[0]

    def left(self) -> list[Candidate]:
        return [c for c in self.candidates if c.skipped is None]


def tasks(pairs: Mapping[str, LayerPair], towers: int = 1) -> list[Task]:
    """The passes of the layers, of ``Subject.pairs``."""
    found = []
    for name, pair in pairs.items():
        connected = isinstance(pair.ours, (Linear, LinearReLUDropout))
        prepare = _beginning(pair.ours) if connected and towers > 1 else layer_pairs.as_it_is
        check = _checker(pair, prepare)
        for direction in ("forward", "backward"):
            found.append(Task(name, direction, _runner(pair, direction, prepare), check))
        if connected and pair.ours.bias is not None:
            found.append(_update_task(pair))
    return found


def _checker(pair: LayerPair, prepare: Prepare) -> Callable[[], object]:
    return lambda: layer_pairs.check(pair, "triton", prepare)


def _beginning(layer: nn.Module) -> Prepare:
    """Begins a fully connected layer with tower 0's half of its input, as an exchange does."""

    def prepare(x: torch.Tensor) -> torch.Tensor:
        half = x.detach().chunk(HALVES, 1)[0].contiguous()
        return carry(x, begin_linear(half, layer.weight, 0))  # type: ignore[arg-type]

    return prepare


def _runner(pair: LayerPair, direction: str, prepare: Prepare) -> Callable[[], object]:
    """One pass, made anew each time: what it launches depends on the tiles at that moment."""
    x = layer_pairs.laid_out(pair.input, "triton")

    def forward() -> torch.Tensor:
        with backend("triton"):
            return pair.ours(prepare(x))  # type: ignore[no-any-return]

    if direction == "forward":
        return forward
    made: list[Any] = []

    def backward() -> object:
        if not made:
            output = forward()
            made.extend((output, layer_pairs.gradient_like(output)))
        output, dy = made
        return torch.autograd.grad(output, pair.tensors(x, pair.ours), dy, retain_graph=True)

    return backward


def _update_task(pair: LayerPair) -> Task:
    """The weight's gradient and update in one kernel, as training on a GPU has it."""
    x, outputs = pair.input.detach(), pair.ours.weight.shape[0]  # type: ignore[index, union-attr]
    dz = torch.randn(len(x), int(outputs)).to(x.device, x.dtype)
    weight = torch.zeros(int(outputs), x.shape[1], dtype=torch.float32, device=x.device)
    rate = torch.tensor(_RATE, dtype=torch.float32, device=x.device)
    narrow = torch.empty_like(weight, dtype=x.dtype) if x.dtype != torch.float32 else None

    def update() -> torch.Tensor:
        velocity = torch.zeros_like(weight)
        linear_backward_weight_update(dz, x, MomentumUpdate(weight, velocity, rate, operand=narrow))
        return velocity

    def check() -> None:
        error = relative_error(update(), dz.double().t() @ x.double())
        bound = tolerance(x.dtype, len(x))
        if not error <= bound:
            raise WrongResult(f"{pair.name}: update is {error:.1e} away, allowed are {bound:.1e}")

    return Task(pair.name, "update", update, check)


class Recording:
    """The launches of a pass, by the choices that were looked up before them.

    Several that were looked up in a row, such as a tile and the parts of its reduction, share what
    is launched until another is looked up.
    """

    def __init__(self, task: Task, target: str, tile: Mapping[Key, Tile], launching: bool) -> None:
        self.own: dict[Key, Tile] = {}
        self.launches: dict[Key, list[offline.Launch]] = {}
        self._current: list[Key] = []
        self._launched_since = False
        self._tile, self._launching = tile, launching
        with choosing(self._choose), record_launches(target, self._launched):
            task.run()

    def _choose(self, key: Key, tile: Tile) -> Tile:
        if self._launched_since and key not in self._current:
            self._current, self._launched_since = [], False
        if key not in self._current:
            self._current.append(key)
        self.own[key] = tile
        return self._tile.get(key, tile)

    def _launched(self, kernel: Any, grid: Any, args: Any, kwargs: Any) -> None:
        self._launched_since = True
        for key in self._current:
            launch = offline.Launch(kernel, grid, args, kwargs)
            self.launches.setdefault(key, []).append(launch)
        if self._launching:
            run(kernel, grid, args, kwargs)


@dataclass(frozen=True)
class Subject:
    """The layers that are tuned.

    Args:
        variant: of ``fastalex.AlexNet``.
        batch: images.
        dtype: of weights and activations.
        names: of the layers.
        image_size: side in pixels; None is the variant's own.
        towers: 2 takes one of the two towers.
    """

    variant: str
    batch: int
    dtype: torch.dtype
    names: list[str]
    image_size: int | None = None
    towers: int = 1

    def pairs(self, device: torch.device | str) -> dict[str, LayerPair]:
        """The layers on ``device``, each with its reference and an input."""
        nets = layer_pairs.make_nets(self.variant, device, self.dtype, self.towers)
        pairs = layer_pairs.make_pairs(self.batch, nets, self.image_size)
        return {name: pair for name, pair in pairs.items() if name in self.names}


def find_problems(
    todo: Iterable[Task],
    target: str,
    bits: int,
    shared: int,
    limit: int,
    settled: Mapping[Key, Tile],
) -> list[Problem]:
    """The problems that passes on tensors without data pose, each with up to ``limit`` candidates.

    A tile that comes to the same launches as one before it is left out, and so is a reduction too
    short to be split.
    """
    problems: dict[Key, Problem] = {}
    for task in todo:
        for key, own in Recording(task, target, settled, False).own.items():
            tiles = list(dict.fromkeys(candidates(key, own, target, bits, shared)))
            if key in problems or (follows_tile(key) and len(tiles) == 1):
                continue
            seen: set[str] = set()
            problem = problems[key] = Problem(task.layer, task.direction, key, [])
            for tile in tiles:
                if len(problem.candidates) == limit:
                    break
                recording = Recording(task, target, {**settled, key: tile}, False)
                launches = recording.launches.get(key, [])
                what = repr([_identity(launch) for launch in launches])
                if what not in seen:
                    seen.add(what)
                    problem.candidates.append(Candidate(tile, launches=launches))
    return list(problems.values())


def _identity(launch: offline.Launch) -> tuple[Any, ...]:
    numbers = [x for x in launch.args if isinstance(x, int)]
    return launch.name, launch.grid, numbers, launch.kwargs


def fake_problems(
    subject: Subject,
    target: str,
    shared: int,
    limit: int,
    settled: Mapping[Key, Tile] | None = None,
) -> tuple[list[Problem], dict[str, Layer]]:
    """``find_problems`` for layers that take no memory, and these layers.

    Args:
        subject: what is tuned.
        target: as ``fastalex_kernels`` names it.
        shared: bytes of shared memory that a program can have.
        limit: candidates of a problem.
        settled: tiles that are taken; what follows from a tile is found for these.
    """
    with FakeTensorMode(allow_non_fake_inputs=True), default_dtype(subject.dtype):
        pairs = subject.pairs("cpu")
        todo, bits = tasks(pairs, subject.towers), 8 * subject.dtype.itemsize
        found = find_problems(todo, target, bits, shared, limit, settled or {})
        layers = {name: layer_pairs.as_layer(pair) for name, pair in pairs.items()}
    for candidate in (c for problem in found for c in problem.candidates):
        candidate.launches = [
            replace(launch, args=tuple(map(offline.without_data, launch.args)))
            for launch in candidate.launches
        ]
    return found, layers
