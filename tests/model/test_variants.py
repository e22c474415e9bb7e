"""The four published nets: their sizes, counts and rules, against the numbers of their sources."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

from fastalex import AlexNet
from fastalex.model.ablations import get_variant
from fastalex.model.alexnet import ReferenceAlexNet
from fastalex.model.variants import VARIANTS

NAMES = ("paper", "source2012", "caffe", "owt")

# Weights and biases of conv1-5 and fc6-8, counted by hand: outputs * (inputs / groups * area + 1).
TOWERS = [34_944, 307_456, 885_120, 663_936, 442_624, 37_752_832, 16_781_312, 4_097_000]
ONE_TOWER = [23_296, 307_392, 663_936, 884_992, 590_080, 37_752_832, 16_781_312, 4_097_000]

# Channels and side of the maps after each convolution and each pooling, at the published size.
TWO_TOWER_MAPS = [
    (96, 55), (96, 27), (256, 27), (256, 13), (384, 13), (384, 13), (256, 13), (256, 6),
]  # fmt: skip
OWT_MAPS = [(64, 55), (64, 27), (192, 27), (192, 13), (384, 13), (256, 13), (256, 13), (256, 6)]


def _meta(name: str, model: type[nn.Module] = AlexNet) -> nn.Module:
    with torch.device("meta"):
        return model(variant=name)


def _layers(model: nn.Module) -> list[nn.Conv2d | nn.Linear]:
    return [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]


@pytest.mark.parametrize("model", [AlexNet, ReferenceAlexNet])
@pytest.mark.parametrize(
    ("name", "total"),
    [
        ("paper", 60_965_224),
        ("source2012", 60_965_224),
        ("caffe", 60_965_224),
        ("owt", 61_100_840),
    ],
)
def test_the_parameters_are_counted_exactly(name: str, total: int, model: type[nn.Module]) -> None:
    net = _meta(name, model)
    counts = [sum(p.numel() for p in layer.parameters()) for layer in _layers(net)]
    assert counts == (ONE_TOWER if name == "owt" else TOWERS)
    assert sum(p.numel() for p in net.parameters()) == total


@pytest.mark.parametrize("name", NAMES)
def test_every_layer_has_the_published_output(name: str) -> None:
    model = _meta(name).eval()
    maps: list[tuple[int, int]] = []

    def record(_: nn.Module, __: object, output: torch.Tensor) -> None:
        assert output.shape[2] == output.shape[3]
        maps.append((output.shape[1], output.shape[2]))

    for layer in model.features:
        if not isinstance(layer, (nn.Identity, nn.ReLU)):
            layer.register_forward_hook(record)
    model.avgpool.register_forward_hook(record)
    size = 227 if name == "caffe" else 224
    assert get_variant(name).image_size == size
    logits = model(torch.empty(2, 3, size, size, device="meta"))
    assert logits.shape == (2, 1000)
    # The last maps are 6 x 6 already: averaging changes nothing at the published size.
    expected = OWT_MAPS if name == "owt" else TWO_TOWER_MAPS
    assert maps == [*expected, expected[-1]]


def test_the_paper_has_659272_neurons() -> None:
    model = _meta("paper").eval()
    neurons = [0]

    def count(_: nn.Module, __: object, output: torch.Tensor) -> None:
        neurons[0] += output[0].numel()

    for layer in _layers(model):
        layer.register_forward_hook(count)
    model(torch.empty(1, 3, 224, 224, device="meta"))
    assert neurons[0] == 659_272


def test_response_norms_are_those_of_the_sources() -> None:
    def norms(name: str) -> list[tuple[float, float, float, int, int]]:
        found = [c.norm for c in get_variant(name).convolutions if c.norm is not None]
        return [(n.k, n.alpha / n.size, n.beta, n.size, n.groups) for n in found]

    assert norms("paper") == [(2.0, 1e-4, 0.75, 5, 2)] * 2  # printed: alpha is not divided
    assert norms("source2012") == [(2.0, 2e-5, 0.75, 5, 2)] * 2
    assert norms("caffe") == [(1.0, 2e-5, 0.75, 5, 1)] * 2
    assert norms("owt") == []


def test_only_net_145_normalises_within_maps_and_pools_before_its_first_relu() -> None:
    for name in NAMES:
        convolutions = get_variant(name).convolutions
        spatial = [c.spatial_norm for c in convolutions]
        late = [c.relu_after_pool for c in convolutions]
        if name == "source2012":
            norm = spatial.pop(1)
            assert norm is not None
            assert (norm.k, norm.alpha, norm.beta, norm.size) == (1.0, 1e-3, 0.75, 5)
            assert late.pop(0)
        assert spatial.count(None) == len(spatial)
        assert not any(late)


def test_training_rules_are_those_of_the_sources() -> None:
    rules = {
        name: (v.towers, v.bias_lr_multiplier, v.bias_weight_decay, v.dropout_on_input)
        for name, v in VARIANTS.items()
    }
    assert rules == {
        "paper": (2, 1.0, True, False),
        "source2012": (2, 2.0, False, False),
        "caffe": (1, 2.0, False, False),
        "owt": (1, 1.0, True, True),
    }


def test_a_variant_cannot_be_changed_by_accident() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        get_variant("paper").towers = 1  # type: ignore[misc]


@pytest.mark.parametrize("name", ["Paper", "alexnet", ""])
def test_an_unknown_name_is_answered_with_the_known_ones(name: str) -> None:
    with pytest.raises(ValueError, match=rf"variant: .*{', '.join(NAMES)}.*{name!r}"):
        get_variant(name)
