"""What AlexNet drops in training: where, how much, and which units a seed names."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastalex import AlexNet
from fastalex.model.layers import CounterDropout

NAMES = ("paper", "source2012", "caffe", "owt")


def _probe(name: str = "paper", dropout: float = 0.5, fused: bool = True) -> AlexNet:
    """fc6 and fc7 give one everywhere, so that what is dropped and how it is scaled shows."""
    with torch.device("meta"):
        model = AlexNet(10, dropout, name, fused)
    model = model.to_empty(device="cpu")
    with torch.no_grad():
        for key, parameter in model.classifier.named_parameters():
            parameter.fill_(1.0 if key.endswith("bias") else 0.0)
    return model


def _activations(model: AlexNet, rows: int = 2) -> list[torch.Tensor]:
    """The inputs of fc6, fc7 and fc8."""
    with torch.no_grad():
        x = torch.ones(rows, 9216)
        found = []
        for index, layer in enumerate(model.classifier):
            if index in (1, 4, 6):
                found.append(x)
            x = layer(x)
    return found


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("p", "fused"), [(0.5, True), (0.2, True), (0.3, False)])
def test_units_are_dropped_where_the_variant_says(name: str, p: float, fused: bool) -> None:
    model = _probe(name, p, fused)
    model.seed_dropout(0, 0)
    dropping = [True, True, False] if name == "owt" else [False, True, True]
    for x, drops in zip(_activations(model), dropping, strict=True):
        if not drops:
            assert (x == 1).all()
            continue
        rate = float((x == 0).double().mean())
        assert abs(rate - p) < 6 * (p * (1 - p) / x.numel()) ** 0.5
        kept = x[x != 0]
        torch.testing.assert_close(kept, torch.full_like(kept, 1 / (1 - p)))
    assert all((x == 1).all() for x in _activations(model.eval()))


def _masks(model: AlexNet, seed: int, step: int) -> list[torch.Tensor]:
    model.seed_dropout(seed, step)
    return [x == 0 for x in _activations(model)]


@pytest.mark.parametrize(("name", "first"), [("paper", 1), ("owt", 0)])
def test_seed_and_step_fix_what_is_dropped(name: str, first: int) -> None:
    model, twin = _probe(name), _probe(name)
    masks = _masks(model, 11, 5)[first : first + 2]
    expected = _masks(twin, 11, 5)[first : first + 2]
    assert all(torch.equal(a, b) for a, b in zip(masks, expected, strict=True))
    for seed, step in ((11, 6), (12, 5), (11, 5 + 2**32), (-1, 5)):
        for mask, other in zip(masks, _masks(twin, seed, step)[first : first + 2], strict=True):
            # Independent masks of one half agree on half of at least 8,192 units.
            agreement = float((mask == other).double().mean())
            assert abs(agreement - 0.5) < 6 * (0.25 / mask.numel()) ** 0.5


def test_layers_and_rows_drop_apart() -> None:
    _, fc6, fc7 = _masks(_probe(), 11, 5)
    bound = 6 * (0.25 / 4096) ** 0.5
    for a, b in ((fc6, fc7), (fc6[0], fc6[1]), (fc7[0], fc7[1])):
        assert abs(float((a == b).double().mean()) - 0.5) < bound


class _Writes(TorchDispatchMode):
    """Counts what would be launches on a GPU."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func._schema.name == "aten::fill_"
        return func(*args, **(kwargs or {}))


def test_the_next_step_is_written_where_a_captured_graph_reads_it() -> None:
    model = _probe()
    model.seed_dropout(1, 2)
    states = [model.classifier[i].mask.rng for i in (1, 4)]
    seeds = [int(state[0]) for state in states]
    with _Writes() as writes:
        model.seed_dropout(1, 3)
    assert writes.count == 1
    for index, state, seed in zip((1, 4), states, seeds, strict=True):
        assert model.classifier[index].mask.rng is state
        assert state.tolist() == [seed, 3]
    model.seed_dropout(2, 3)
    assert all(int(state[0]) == seed + 1 for state, seed in zip(states, seeds, strict=True))


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.classifier[1].mask.rng.fill_(7),
        lambda model: model.classifier[4].set_mask(rng=torch.tensor([7, 7])),
        lambda model: model.classifier[4].set_mask(rng=None),
        lambda model: model.classifier.__setitem__(4, copy.deepcopy(model.classifier[4])),
        lambda model: model.classifier.__setitem__(1, torch.nn.Identity()),
    ],
    ids=["written", "another", "none", "another layer", "a layer less"],
)
def test_what_was_changed_from_outside_is_seeded_again(change: Any) -> None:
    model, twin = _probe(), _probe()
    model.seed_dropout(1, 2)
    change(model)
    if isinstance(model.classifier[1], torch.nn.Identity):
        change(twin)
    for net in (model, twin):
        net.seed_dropout(1, 3)
    layers = [net.classifier[i] for net in (model, twin) for i in (1, 4)]
    found = [x.mask.rng if isinstance(x, CounterDropout) else None for x in layers]
    values = [None if x is None else x.tolist() for x in found]
    assert values[:2] == values[2:]


def test_seeded_while_it_is_evaluated_it_can_train() -> None:
    model = _probe()
    with torch.inference_mode():
        model.seed_dropout(1, 2)
    assert not model.classifier[1].mask.rng.is_inference(), "backward could not save it"
    model.seed_dropout(1, 3)
    assert int(model.classifier[1].mask.rng[1]) == 3


def test_unseeded_masks_come_from_torch_s_generator() -> None:
    model = _probe()
    torch.manual_seed(0)
    first, second = _activations(model), _activations(model)
    torch.manual_seed(0)
    again = _activations(model)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[1], second[1])
