"""The training step as the tuner sees it: passes that can be run again with other configs."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch.utils._pytree import tree_leaves

from fastalex.distributed.exchange import LoopbackExchange
from fastalex.distributed.towers import cut_to_tower
from fastalex.model.alexnet import AlexNet
from fastalex.model.variants import Variant
from fastalex.training.chain import Chain, Tricks
from fastalex.training.layer_check import has_kernels
from fastalex.training.passes import Sum
from fastalex_kernels.common.program import Launch, Program
from fastalex_kernels.common.tuned import Key, Tile, choosing, dot_precision
from fastalex_kernels.reference import tolerance

_LOSS_SCALE = 1024.0  # in float16


class Trace(NamedTuple):
    """What a pass did."""

    own: dict[Key, Tile]  # the package's own config, by the key that was looked up
    launches: dict[Key, list[Launch]]  # of kernels, by the key looked up right before them
    results: list[torch.Tensor]  # made and changed; of partial sums their total


class Workload(NamedTuple):
    """A pass of a layer in a step, ``phase`` forward or backward, and what it was given."""

    layer: str
    phase: str
    one: Any
    given: tuple[torch.Tensor | Sum | None, ...]

    @property
    def inputs(self) -> list[torch.Tensor]:
        """The tensors that it was given."""
        return [x for x in tree_leaves(self.given) if x is not None]

    @property
    def bits(self) -> int:
        """Of an operand."""
        return 8 * self.inputs[0].element_size()

    @torch.no_grad()
    def run(self, tiles: Mapping[Key, Tile]) -> Trace:
        """Run the pass once more, with ``tiles`` in place of the package's own.

        It reads the step's tensors and writes new ones, but for those of ``changed``.
        """
        program, one = self.program(), copy.copy(self.one)
        own: dict[Key, Tile] = {}
        places: dict[Key, int] = {}

        def choose(key: Key, tile: Tile) -> Tile:
            own[key], places[key] = tile, len(program.launches)
            return tiles.get(key, tile)

        with choosing(choose), program.recording():
            made = getattr(one, self.phase)(*self.given)
        ends = dict(itertools.pairwise(sorted({*places.values(), len(program.launches)})))
        launches = {
            key: [x for x in program.launches[first : ends.get(first)] if x.grid is not None]
            for key, first in places.items()
        }
        if self.phase == "forward":
            results = [made, getattr(one, "_argmax", None)]
        else:
            results = [*tree_leaves(made[0]), None if made[1] is None else made[1].sum(0)]
        results += [x.clone() for x in self.changed()]
        return Trace(own, launches, [x for x in results if x is not None])

    def program(self) -> Program:
        """An empty one on the device of the pass."""
        program = Program(self.inputs)
        program.at(self.layer, self.phase)
        return program

    def changed(self) -> list[torch.Tensor]:
        """What the pass changes in place: parameters, their copies, momentum, gradients."""
        update = None if self.phase == "forward" else getattr(self.one, "update", None)
        tensors = [
            x
            for of in (update.updates if update else ())
            if of is not None
            for x in (of.parameter.data, of.operand, of.buffer, of.parameter.grad)
        ]
        return [x for x in tensors if x is not None]

    def tolerance(self) -> float:
        """The relative error that the results may have, for the longest of their sums."""
        x, w = self.inputs[0], getattr(self.one.module, "weight", None)
        rows = x.numel() // x.shape[-1]
        longest = 0 if w is None else max(w[0].numel(), w.numel() // w.shape[1], rows)
        kernel = "linear" if w is None or w.dim() == 2 else "conv2d"
        return tolerance(x.dtype, longest, dot_precision(x, kernel))


class Recorded(NamedTuple):
    """A step that was done once, on random images."""

    model: AlexNet
    workloads: list[Workload]  # the passes of the layers with kernels, in order
    launches: list[Launch]  # of kernels


@torch.no_grad()
def record_workloads(
    variant: str | Variant,
    batch: int,
    dtype: torch.dtype,
    image_size: int | None,
    towers: int,
    device: torch.device | str,
) -> Recorded:
    """Do a training step, and keep what its layers were given.

    Its rates make the momentum buffers the gradients. In float16, which autograd trains, gradients
    are stored as autograd's are.

    Args:
        variant: of ``AlexNet``.
        batch: images.
        dtype: of the products.
        image_size: side in pixels; None is the variant's own.
        towers: 2 takes one of the two towers.
        device: ``"meta"``, on which launches are to be recorded, takes no memory.
    """
    fused, found = dtype != torch.float16, []
    torch.manual_seed(0)
    with torch.device(device), choosing(lambda key, own: own):
        model = AlexNet(variant=variant)
        model.init_parameters("he")
        if towers > 1:
            cut_to_tower(model, LoopbackExchange())
        model.seed_dropout(seed=0, step=0)
        side = image_size or model.variant.image_size
        images, labels = torch.randn(batch, 3, side, side), torch.randint(1000, (batch,))
        optimizer = torch.optim.SGD(model.parameters(), lr=float(fused))
        chain = Chain(model, optimizer, dtype, Tricks(fused_update=fused), None, None)
        chain.one.fill_(1.0 if fused else _LOSS_SCALE)
        chain.rates.follow()
        for update in chain.updates.values():
            update.refresh()
        passes = chain.passes([images])
        program = Program([labels])
        with program.recording():
            x = chain.first_input([images])
            for name, one in passes:
                found.append(Workload(name, "forward", one, (x,)))
                x = one.forward(x)
            dy: torch.Tensor | Sum | None = chain.loss(x, labels)[1]
            partials = None
            for name, one in reversed(passes):
                found.append(Workload(name, "backward", one, (dy, partials)))
                assert dy is not None
                dy, partials = one.backward(dy, partials)
    launches = [launch for launch in program.launches if launch.grid is not None]
    return Recorded(model, [w for w in found if has_kernels(w.one)], launches)
