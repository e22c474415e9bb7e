"""AlexNet as a user has it: drop-in for torchvision's, what it refuses, how it starts."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import nn

from fastalex import AlexNet
from fastalex.model.alexnet import ReferenceAlexNet
from fastalex.model.variants import Variant
from tests._nets import narrow

NAMES = ("paper", "source2012", "caffe", "owt")
LAYERS = [
    "features.0", "features.3", "features.6", "features.8", "features.10",
    "classifier.1", "classifier.4", "classifier.6",
]  # fmt: skip

# torchvision.models.alexnet().state_dict(), spelled out: torchvision would bring its own torch.
TORCHVISION = {
    "features.0.weight": (64, 3, 11, 11),
    "features.0.bias": (64,),
    "features.3.weight": (192, 64, 5, 5),
    "features.3.bias": (192,),
    "features.6.weight": (384, 192, 3, 3),
    "features.6.bias": (384,),
    "features.8.weight": (256, 384, 3, 3),
    "features.8.bias": (256,),
    "features.10.weight": (256, 256, 3, 3),
    "features.10.bias": (256,),
    "classifier.1.weight": (4096, 9216),
    "classifier.1.bias": (4096,),
    "classifier.4.weight": (4096, 4096),
    "classifier.4.bias": (4096,),
    "classifier.6.weight": (1000, 4096),
    "classifier.6.bias": (1000,),
}


def _model(variant: str | Variant = "paper", **arguments: Any) -> AlexNet:
    """With ten classes and weights that cost less to make than the published ones."""
    with torch.device("meta"):
        model = AlexNet(num_classes=10, variant=variant, **arguments)
    return _fill(model.to_empty(device="cpu"))


def _fill(model: AlexNet) -> AlexNet:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            spread = 1.0 if parameter.dim() == 1 else (6 / parameter[0].numel()) ** 0.5
            parameter.uniform_(-spread, spread, generator=generator)
    return model


def _images(size: int = 64, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def paper() -> AlexNet:
    """For tests that change nothing of it."""
    return _model().eval()


# Drop-in.


def test_owt_takes_torchvision_s_state_dict() -> None:
    state = {name: torch.full(shape, 0.5) for name, shape in TORCHVISION.items()}
    with torch.device("meta"):
        model = AlexNet(variant="owt")
    model.load_state_dict(state, strict=True, assign=True)
    assert list(model.state_dict()) == list(TORCHVISION)
    assert all(torch.equal(model.state_dict()[name], state[name]) for name in state)
    with torch.device("meta"):
        towers = AlexNet(variant="paper")
    with pytest.raises(RuntimeError, match=r"size mismatch for features\.0"):
        towers.load_state_dict(state, strict=True, assign=True)


@pytest.mark.parametrize("name", NAMES)
def test_modules_have_torchvision_s_indices(name: str) -> None:
    with torch.device("meta"):
        model = AlexNet(variant=name)
    assert (len(model.features), len(model.classifier)) == (13, 7)
    assert list(model.state_dict()) == list(TORCHVISION)
    found = [n for n, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    assert found == LAYERS
    absorbed = [i for i, m in enumerate(model.features) if isinstance(m, (nn.Identity, nn.ReLU))]
    assert absorbed == [1, 4, 7, 9, 11]


def test_the_last_layer_can_be_replaced() -> None:
    model = _model()
    model.classifier[6] = nn.Linear(4096, 4)
    model.seed_dropout(0, 0)
    model(_images()).sum().backward()
    assert model(_images()).shape == (2, 4)
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    model.init_parameters(generator=torch.Generator().manual_seed(0))
    assert float(model.classifier[6].weight.detach().std()) == pytest.approx(0.01, rel=0.05)


def test_features_can_be_sliced(paper: AlexNet) -> None:
    front, back = paper.features[:5], paper.features[5:]
    assert isinstance(front, nn.Sequential)
    maps = front(_images())
    assert maps.shape == (2, 256, 7, 7)  # 64 pixels: conv1 15, pool1 7, conv2 7
    assert torch.equal(back(maps), paper.features(_images()))


def test_a_copy_is_equal_and_apart() -> None:
    model = _model("owt")
    model.seed_dropout(3, 4)
    twin = copy.deepcopy(model)
    assert torch.equal(model(_images()), twin(_images()))
    with torch.no_grad():
        twin.features[0].bias.add_(1.0)
    twin.seed_dropout(3, 5)
    assert not torch.equal(model.features[0].bias, twin.features[0].bias)
    assert model.classifier[1].mask.rng.tolist() != twin.classifier[1].mask.rng.tolist()


@pytest.mark.parametrize(
    ("dtype", "bound"),
    # Eight layers of one rounding each, within what one may lose: in float32 sums of 9,216 terms
    # lose up to 3e-6 (1e-6 a thousand).
    [(torch.bfloat16, 8 * 8e-3), (torch.float16, 8 * 1e-3), (torch.float32, 8 * 3e-6)],
)
@pytest.mark.parametrize("name", NAMES)
def test_each_precision_is_as_close_as_it_can_be(
    name: str, dtype: torch.dtype, bound: float
) -> None:
    model = _model(name).eval().to(dtype)
    images = _images().to(dtype)
    with torch.device("meta"):
        reference = ReferenceAlexNet(num_classes=10, variant=name).eval()
    reference.load_state_dict(model.state_dict(), assign=True)
    with torch.no_grad():
        logits = model(images)
        expected = reference.double()(images.double())
    assert logits.dtype == dtype
    assert float((logits - expected).norm() / expected.norm()) < bound


def test_only_training_drops() -> None:
    model = _model("owt")
    assert not torch.equal(model.train()(_images()), model(_images()))
    assert torch.equal(model.eval()(_images()), model(_images()))


def test_no_dropout_makes_training_and_evaluation_equal() -> None:
    model = _model(dropout=0)
    assert torch.equal(model.train()(_images()), model.eval()(_images()))


def test_memory_order_of_images_changes_nothing(paper: AlexNet) -> None:
    images = _images()
    expected = paper(images)
    columns = images.mT.contiguous().mT
    for order in (images.contiguous(memory_format=torch.channels_last), columns):
        assert order.stride() != images.stride()
        torch.testing.assert_close(paper(order), expected, rtol=1e-5, atol=1e-5)


# What it refuses.


@pytest.mark.parametrize("value", [0, -1, 2.0, True, "10", None])
def test_num_classes_has_to_be_a_positive_int(value: Any) -> None:
    with pytest.raises(ValueError, match=f"num_classes: .*{value!r}"):
        AlexNet(num_classes=value)


@pytest.mark.parametrize("value", [-0.1, 1, 1.5, math.nan, True, "0.5", None])
def test_dropout_has_to_be_a_probability_below_one(value: Any) -> None:
    with pytest.raises(ValueError, match=f"dropout: .*{value!r}"):
        AlexNet(dropout=value)


@pytest.mark.parametrize(
    # By hand: conv1 and the pools have to leave one pixel each. Pools that round up need two
    # pixels, then 4 (caffe, paper), so conv1 has to give 8; owt's need 3, 7, 15.
    ("name", "smallest"),
    [("paper", 36), ("source2012", 36), ("caffe", 39), ("owt", 63)],
)
def test_images_have_a_smallest_size(name: str, smallest: int) -> None:
    model = _model(name).eval()
    assert model.smallest_image_size() == smallest
    with torch.no_grad():
        assert model(torch.zeros(1, 3, smallest, smallest)).shape == (1, 10)
        assert model(torch.zeros(1, 3, smallest, smallest + 30)).shape == (1, 10)
        for shape in ((smallest - 1, 300), (300, smallest - 1)):
            message = rf"{shape[0]} x {shape[1]} .*smallest .* {smallest} x {smallest}"
            with pytest.raises(ValueError, match=message):
                model(torch.zeros(1, 3, *shape))
        # The size is the layers' own, not a number of ours.
        with pytest.raises((RuntimeError, ValueError)):
            model.features(torch.zeros(1, 3, smallest - 1, smallest - 1))


@pytest.mark.parametrize("shape", [(1, 1, 64, 64), (2, 4, 64, 64), (3, 64, 64), (1, 1, 3, 64, 64)])
def test_images_have_to_be_a_batch_of_three_channels(
    paper: AlexNet, shape: tuple[int, ...]
) -> None:
    with pytest.raises(
        ValueError, match=rf"images: .*\[N, 3, H, W\].*\({', '.join(map(str, shape))}\)"
    ):
        paper(torch.zeros(shape))


def test_an_unknown_scheme_is_refused(paper: AlexNet) -> None:
    with pytest.raises(ValueError, match=r"scheme: .*'xavier'"):
        paper.init_parameters("xavier")


def test_an_empty_batch_gives_no_logits(paper: AlexNet) -> None:
    assert paper(torch.zeros(0, 3, 64, 64)).shape == (0, 10)


# How it starts.

# Deviation of the weights of conv1-5 and fc6-8, where torch's default is not taken, and biases.
DEVIATIONS = {
    "paper": [0.01] * 8,
    "source2012": [0.01, 0.01, 0.03, 0.03, 0.03, 0.01, 0.01, 0.01],
    "caffe": [0.01, 0.01, 0.01, 0.01, 0.01, 0.005, 0.005, 0.01],
}
BIASES = {
    "paper": [0, 1, 0, 1, 1, 1, 1, 0],
    "source2012": [0, 1, 0, 1, 1, 1, 1, 0],
    "caffe": [0, 0.1, 0, 0.1, 0.1, 0.1, 0.1, 0],
}


def _draws(model: AlexNet, scheme: str, seed: int) -> dict[str, torch.Tensor]:
    model.init_parameters(scheme, generator=torch.Generator().manual_seed(seed))
    return model.state_dict()


def _check_spread(values: torch.Tensor, std: float, kurtosis: float) -> None:
    """Mean and deviation within six deviations of what a sample of this size has."""
    n = values.numel()
    values = values.double()
    assert abs(float(values.mean())) < 6 * std / n**0.5
    assert abs(float(values.std()) / std - 1) < 6 * ((kurtosis - 1) / (4 * n)) ** 0.5


def _check_normal(values: torch.Tensor, std: float) -> None:
    _check_spread(values, std, kurtosis=3.0)
    assert float(values.abs().max()) > 3.5 * std  # 1 in 2,000: the smallest layer has 34,848


def _check_uniform(values: torch.Tensor, bound: float) -> None:
    _check_spread(values, bound / 3**0.5, kurtosis=1.8)
    assert float(values.abs().max()) <= bound


@pytest.mark.parametrize("name", list(DEVIATIONS))
def test_weights_start_as_published(name: str) -> None:
    state = _draws(_model(name), "published", seed=0)
    for layer, std, bias in zip(LAYERS, DEVIATIONS[name], BIASES[name], strict=True):
        _check_normal(state[f"{layer}.weight"], std)
        assert (state[f"{layer}.bias"] == bias).all()


def test_owt_starts_as_torch_s_layers_do() -> None:
    state = _draws(_model("owt"), "published", seed=0)
    for layer in LAYERS:
        bound = state[f"{layer}.weight"][0].numel() ** -0.5
        _check_uniform(state[f"{layer}.weight"], bound)
        _check_uniform(state[f"{layer}.bias"], bound)


def test_he_starts_with_variance_two_over_fan_in() -> None:
    state = _draws(_model("source2012"), "he", seed=0)
    for layer in LAYERS:
        weights = state[f"{layer}.weight"]
        _check_normal(weights, (2 / weights[0].numel()) ** 0.5)
        assert (state[f"{layer}.bias"] == 0).all()


def test_a_new_net_starts_as_published() -> None:
    torch.manual_seed(5)
    model = AlexNet()
    torch.manual_seed(5)
    twin = AlexNet(fused=False)
    for layer, std, bias in zip(LAYERS, DEVIATIONS["paper"], BIASES["paper"], strict=True):
        module = model.get_submodule(layer)
        _check_normal(module.weight.detach(), std)
        assert (module.bias == bias).all()
        assert torch.equal(module.weight, twin.get_submodule(layer).weight)


@pytest.mark.parametrize("name", ["paper", "owt"])
def test_a_seed_names_one_net_whatever_torch_s_generator_does(name: str) -> None:
    model, twin = _model(narrow(name)), _model(narrow(name))
    torch.manual_seed(1)
    state = _draws(model, "published", seed=7)
    torch.manual_seed(2)
    before = torch.get_rng_state()
    again = _draws(twin, "published", seed=7)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(state[key], again[key]) for key in state)
    other = _draws(twin, "published", seed=8)
    assert not any(
        torch.equal(state[f"{layer}.weight"], other[f"{layer}.weight"]) for layer in LAYERS
    )


def test_precision_does_not_change_which_weights_are_drawn() -> None:
    single, double = _model(narrow("owt")), _model(narrow("owt")).double()
    state, wide = _draws(single, "published", seed=1), _draws(double, "published", seed=1)
    assert all(torch.equal(state[key].double(), wide[key]) for key in state)
