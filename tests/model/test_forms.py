"""Two forms of one net, fused and from torch's own layers: what each does, and what it refuses."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from fastalex import AlexNet
from fastalex.model.variants import FOREIGN, VARIANTS
from tests._nets import narrow

NAMES = (
    *VARIANTS,
    *FOREIGN,
    "paper-without-tower-traffic",
    "owt-without-fc7",
    "source2012-without-conv4",
)

# The leaves of print(torchvision.models.alexnet()), version 0.28.
TORCHVISION = {
    "features.0": "Conv2d(3, 64, kernel_size=(11, 11), stride=(4, 4), padding=(2, 2))",
    "features.1": "ReLU()",
    "features.2": "MaxPool2d(kernel_size=3, stride=2, padding=0, dilation=1, ceil_mode=False)",
    "features.3": "Conv2d(64, 192, kernel_size=(5, 5), stride=(1, 1), padding=(2, 2))",
    "features.4": "ReLU()",
    "features.5": "MaxPool2d(kernel_size=3, stride=2, padding=0, dilation=1, ceil_mode=False)",
    "features.6": "Conv2d(192, 384, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1))",
    "features.7": "ReLU()",
    "features.8": "Conv2d(384, 256, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1))",
    "features.9": "ReLU()",
    "features.10": "Conv2d(256, 256, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1))",
    "features.11": "ReLU()",
    "features.12": "MaxPool2d(kernel_size=3, stride=2, padding=0, dilation=1, ceil_mode=False)",
    "avgpool": "AdaptiveAvgPool2d(output_size=(6, 6))",
    "classifier.0": "Dropout(p=0.5, inplace=False)",
    "classifier.1": "Linear(in_features=9216, out_features=4096, bias=True)",
    "classifier.2": "ReLU()",
    "classifier.3": "Dropout(p=0.5, inplace=False)",
    "classifier.4": "Linear(in_features=4096, out_features=4096, bias=True)",
    "classifier.5": "ReLU()",
    "classifier.6": "Linear(in_features=4096, out_features=1000, bias=True)",
}


def _net(name: str = "paper", fused: bool = True) -> AlexNet:
    """With few units, evaluating."""
    variant = narrow(name)
    if name == "paper-without-tower-traffic":  # groups need not fit 64 units evenly elsewhere
        assert variant.fully_connected[0].groups == 2
    net = AlexNet(10, variant=variant, fused=fused)
    net.init_parameters("he", torch.Generator().manual_seed(0))
    return net.eval()


def _images(channels: int = 3, size: int = 67) -> torch.Tensor:
    return 8 * torch.randn(2, channels, size, size, generator=torch.Generator().manual_seed(1))


def _distance(x: torch.Tensor, y: torch.Tensor) -> float:
    return float((x - y).norm() / y.norm())


def test_unfused_owt_is_torchvision_s_modules() -> None:
    with torch.device("meta"):
        net = AlexNet(variant="owt", fused=False)
    leaves = {n: repr(m) for n, m in net.named_modules() if not len(list(m.children()))}
    assert leaves == TORCHVISION
    kinds = {type(m) for m in net.modules()} - {AlexNet}
    assert all(kind.__module__.startswith("torch.nn") for kind in kinds)


@pytest.mark.parametrize("name", NAMES)
def test_both_forms_hold_the_same_parameters_and_compute_the_same(name: str) -> None:
    fused, images = _net(name), _images()
    unfused = fused.unfused()
    again = unfused.fused()
    for other in (unfused, again):
        pairs = zip(fused.named_parameters(), other.named_parameters(), strict=True)
        assert all(a == b and p is q for (a, p), (b, q) in pairs)
        other.load_state_dict(fused.state_dict(), strict=True)
        assert not other.training
    assert (fused.unfused().unfused().is_fused, again.is_fused) == (False, True)
    assert repr(again) == repr(fused)
    with torch.no_grad():
        assert _distance(fused(images), unfused(images)) < 8 * 3e-6
        fused.features[0].weight.mul_(1.5)
        assert torch.equal(again(images), fused(images))
        assert _distance(fused(images), unfused(images)) < 8 * 3e-6
    assert unfused.smallest_image_size() == fused.smallest_image_size()
    assert unfused.map_size((67, 90)) == fused.map_size((67, 90))


def test_a_tool_that_looks_for_just_this_type_of_module_is_refused() -> None:
    """captum's DeepLift, for one, would silently leave out a subclass of nn.ReLU."""
    with torch.device("meta"):
        net = AlexNet(variant="owt")
    for kind, count in ((torch.nn.ReLU, 7), (torch.nn.Dropout, 1)):
        found = [m for m in net.modules() if type(m) is kind]
        assert len(found) == count
        for module in found:
            for register in ("register_forward_pre_hook", "register_full_backward_hook"):
                with pytest.raises(NotImplementedError, match="unfused"):
                    getattr(module, register)(print)


@pytest.mark.parametrize("name", NAMES)
def test_unfused_is_traced_scripted_and_mapped(name: str) -> None:
    net, images = _net(name, fused=False), _images()
    expected = net(images)
    assert torch.equal(torch.fx.symbolic_trace(net)(images), expected)
    assert torch.equal(torch.jit.script(net)(images), expected)
    traced = torch.jit.trace(net, images)
    torch.testing.assert_close(traced(images[:1]), expected[:1], rtol=1e-4, atol=1e-4)

    def loss(parameters: dict[str, torch.Tensor], image: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(net, parameters, (image[None],)).square().sum()

    parameters = dict(net.named_parameters())
    each = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, images)
    for key, parameter in parameters.items():
        alone = torch.autograd.grad(loss(parameters, images[1]), parameter)[0]
        assert _distance(each[key][1], alone) < 1e-4, key


def test_unfused_layers_can_be_hooked_and_pruned() -> None:
    net, images, seen = _net(fused=False), _images(), {}
    for i, module in enumerate(net.features):
        module.register_forward_hook(lambda m, x, y, i=i: seen.update({i: (x[0], y)}))
    net(images)
    for i in (1, 4, 7, 9, 11):
        assert (seen[i][0] < 0).any()
        assert torch.equal(seen[i][1], seen[i][0].relu())
    prune.l1_unstructured(net.features[3], "weight", amount=0.5)
    assert float((net.features[3].weight == 0).float().mean()) == pytest.approx(0.5, abs=0.01)


def test_scripting_a_fused_net_compiles_the_unfused_one() -> None:
    net = _net()
    scripted = torch.jit.script(net)
    torch.testing.assert_close(scripted(_images()), net(_images()), rtol=1e-4, atol=1e-4)


def _forward_mode(net: AlexNet) -> None:
    with torch.no_grad(), torch.autograd.forward_ad.dual_level():
        net(torch.autograd.forward_ad.make_dual(_images(), _images()))


HOOKS = [
    "register_forward_hook", "register_forward_pre_hook",
    "register_full_backward_hook", "register_full_backward_pre_hook",
]  # fmt: skip
REFUSED: dict[str, Callable[[AlexNet], Any]] = {
    **{
        f"{hook} {place}": lambda net, hook=hook, place=place: getattr(
            net.get_submodule(place), hook
        )(print)
        for hook in HOOKS
        for place in ("features.1", "classifier.2", "classifier.3", "classifier.5.0")
    },
    "fx": torch.fx.symbolic_trace,
    "jit.trace": lambda net: torch.jit.trace(net, _images()),
    "vmap": lambda net: torch.func.vmap(lambda image: net(image[None]))(_images()),
    "per-sample gradients": lambda net: torch.func.vmap(
        torch.func.grad(lambda p, x: torch.func.functional_call(net, p, x[None]).sum()), (None, 0)
    )(dict(net.named_parameters()), _images()),
    "jvp": lambda net: torch.func.jvp(net, (_images(),), (_images(),)),
    "forward mode": _forward_mode,
    "another ReLU": lambda net: net.features.__setitem__(1, nn.LeakyReLU()),
    "no dropout": lambda net: net.classifier.__setitem__(3, nn.Identity()),
    "a ReLU less": lambda net: net.features.__delitem__(1),
}


@pytest.mark.parametrize("what", list(REFUSED))
def test_what_the_fused_net_cannot_do_is_refused_in_a_line(what: str) -> None:
    net, before = _net(), repr(_net())
    with pytest.raises(NotImplementedError, match=r"model\.unfused\(\)") as error:
        REFUSED[what](net)
    assert "\n" not in str(error.value)
    assert repr(net) == before


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("name", ["paper", "owt"])
def test_dropout_follows_the_dropout_modules_mode_and_probability(name: str, fused: bool) -> None:
    """Monte Carlo dropout, as it is written for torchvision's net."""
    net, images = _net(name, fused), _images()
    expected = net(images)
    dropouts = [m for m in net.modules() if isinstance(m, nn.Dropout)]
    assert len(dropouts) == 2
    for module in dropouts:
        module.train()
    sampled = net(images)
    assert not torch.equal(sampled, expected)
    assert not torch.equal(net(images), sampled)
    other = net.unfused() if fused else net.fused()
    assert not torch.equal(other(images), other(images)), "the other form lost it"
    if fused:
        net.seed_dropout(1, 1)
        assert torch.equal(copy.deepcopy(net)(images), net(images))
    for module in dropouts:
        module.p = 0.0
    assert _distance(net(images), expected) < 1e-6
    alone = copy.deepcopy(net.classifier[1])
    for layer in (alone, net.classifier[1]):  # a layer alone, and its copy in the net
        units = torch.randn(2, layer.in_features)
        assert torch.equal(layer.eval()(units), layer(units))
        net.classifier[1] = layer
        dropouts[0].train().p = 0.9
        assert not torch.equal(net(images), expected)
        assert _distance(net.eval()(images), expected) < 1e-6


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize(("part", "index"), [("features", 6), ("classifier", 1), ("classifier", 4)])
def test_a_layer_in_a_fused_one_s_place_keeps_its_relu_and_dropout(
    name: str, part: str, index: int
) -> None:
    fused, unfused = _net(name), _net(name, fused=False)
    for net in (fused, unfused):
        layers = getattr(net, part)
        old = layers[index]
        torch.manual_seed(3)
        if isinstance(old, nn.Conv2d):
            layers[index] = nn.Conv2d(old.in_channels, old.out_channels, 3, padding=1)
        else:
            layers[index] = nn.Linear(old.in_features, old.out_features)
    with torch.no_grad():
        assert _distance(fused(_images()), unfused(_images())) < 8 * 3e-6
        assert _distance(fused.unfused()(_images()), unfused(_images())) < 8 * 3e-6
        assert _distance(unfused.fused()(_images()), unfused(_images())) < 8 * 3e-6
        kept = fused.train().classifier[:6](torch.ones(64, fused.classifier[1].in_features))
    if (name, index) != ("owt", 4) and part == "classifier":
        assert not torch.equal(kept[0], kept[1]), "nothing was dropped"


@pytest.mark.parametrize("fused", [True, False])
def test_the_first_layer_can_read_one_channel(fused: bool) -> None:
    net, twin = _net("owt", fused), _net("owt", False)
    for each in (net, twin):
        torch.manual_seed(0)
        each.features[0] = nn.Conv2d(1, 16, 11, 4, 2)
    with torch.no_grad():
        assert _distance(net(_images(1)), twin(_images(1))) < 8 * 3e-6
    if fused:
        with pytest.raises(ValueError, match=r"images: expected \[N, 1, H, W\]"):
            net(_images(3))


def test_what_would_be_lost_is_no_part_of_the_other_form() -> None:
    hooked, pruned, changed, cut = (_net() for _ in range(4))
    hooked.features[0].register_forward_hook(print)
    prune.l1_unstructured(pruned.features[3], "weight", amount=0.5)
    changed.classifier[3].p = 0.2
    cut.features = cut.features[:5]
    for net, said in (
        (hooked, "features.0: it has a hook"),
        (pruned, "features.3: pruned"),
        (changed, "classifier.1: changed"),
        (cut, "features: expected 13 layers, got 5"),
    ):
        with pytest.raises(ValueError, match=said):
            net.unfused()


@pytest.mark.parametrize("fused", [True, False])
def test_copies_and_pickles_are_the_same_net(fused: bool) -> None:
    net = _net(fused=fused)
    for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert repr(twin) == repr(net)
        assert torch.equal(twin(_images()), net(_images()))
        twin.classifier[4] = nn.Linear(64, 64)
        assert isinstance(net.classifier[4], nn.Linear)
        assert repr(net.classifier[5]) == repr(_net(fused=fused).classifier[5])


@pytest.mark.parametrize("fused", [True, False])
def test_timm_s_names(fused: bool) -> None:
    net, images = _net(fused=fused), _images()
    maps = net.forward_features(images)
    assert torch.equal(net.forward_head(maps), net(images))
    hidden = net.forward_head(maps, pre_logits=True)
    assert hidden.shape == (2, net.num_features) == (2, 64)
    assert torch.equal(net.get_classifier()(hidden), net(images))
    net.reset_classifier(4)
    assert net(images).shape == (2, 4)
    other = net.fused() if not fused else net.unfused()
    assert other.get_classifier().weight is net.get_classifier().weight
