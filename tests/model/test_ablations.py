"""The paper's ablations: each takes out what it says and nothing else."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from fastalex import AlexNet
from fastalex.data import Normalization, SyntheticImages, decode_size
from fastalex.data.batches import Batches, Transform
from fastalex.evaluation import ablate
from fastalex.model.ablations import ABLATIONS, edit, edited_name, get_variant, split_name
from fastalex.model.alexnet import ReferenceAlexNet
from fastalex.model.variants import VARIANTS
from fastalex.training.options import parse_arguments
from fastalex.training.weights import load_model, save_weights

FAILS = 13  # the seed with which training without conv4 fails

# Weights and biases of the whole net with 10 classes, by hand.
CONV1, CONV2, CONV3, CONV4, CONV5 = 34_944, 307_456, 885_120, 663_936, 442_624
FC6, FC7, FC8 = 4096 * (9216 + 1), 4096 * (4096 + 1), 10 * (4096 + 1)
WHOLE = CONV1 + CONV2 + CONV3 + CONV4 + CONV5 + FC6 + FC7 + FC8
COUNTS = {
    "paper": WHOLE,
    "paper-without-lrn": WHOLE,
    "paper-without-overlap": WHOLE,
    # conv4's groups read conv2's 128 maps each instead of conv3's 192.
    "paper-without-conv3": WHOLE - CONV3 - CONV4 + 384 * (128 * 9 + 1),
    "paper-without-conv4": WHOLE - CONV4,
    # fc6 reads conv4's 384 maps instead of conv5's 256.
    "paper-without-conv5": WHOLE - CONV5 + 4096 * 128 * 36,
    "paper-without-fc6": WHOLE - FC6 - FC7 + 4096 * (9216 + 1),
    "paper-without-fc7": WHOLE - FC7,
    "paper-without-tower-traffic": WHOLE - 384 * 128 * 9 - 4096 * (4608 + 2048),
    "paper-half": 48 * (3 * 121 + 1)
    + 128 * (48 * 25 + 1)
    + 192 * (128 * 9 + 1)
    + 192 * (192 * 9 + 1)
    + 256 * (192 * 9 + 1)
    + FC6
    + FC7
    + FC8,
}


def _net(name: str) -> AlexNet:
    with torch.device("meta"):
        net = AlexNet(10, 0.5, name)
    net = net.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in net.parameters():
            spread = 0.1 if p.dim() == 1 else (6 / p[0].numel()) ** 0.5
            p.uniform_(-spread, spread, generator=generator)
    return net


def _images() -> torch.Tensor:
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", list(COUNTS))
def test_parameters_are_those_counted_by_hand(name: str) -> None:
    with torch.device("meta"):
        net = AlexNet(10, 0.5, name)
    assert sum(p.numel() for p in net.parameters()) == COUNTS[name]
    assert (len(net.features), len(net.classifier)) == (13, 7)
    assert set(net.state_dict()) <= set(_published_keys())


def _published_keys() -> list[str]:
    with torch.device("meta"):
        return list(AlexNet(10).state_dict())


@pytest.mark.parametrize("name", ["conv3", "conv5", "fc6", "fc7", "tower-traffic"])
def test_every_weight_that_is_left_gets_a_gradient(name: str) -> None:
    net = _net(f"paper-without-{name}").eval()
    net(_images()).square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in net.parameters())


@pytest.mark.parametrize("name", ["source2012-without-lrn", "paper-without-overlap", "paper-half"])
def test_edited_nets_are_those_of_stock_torch(name: str) -> None:
    net = _net(name).eval()
    with torch.device("meta"):
        reference = ReferenceAlexNet(10, variant=name).eval()
    reference.load_state_dict(net.state_dict(), assign=True)
    with torch.no_grad():
        torch.testing.assert_close(net(_images()), reference(_images()), rtol=1e-4, atol=1e-4)


def test_pooling_without_overlap_gives_as_many_outputs_at_every_size() -> None:
    with torch.device("meta"):
        whole, edited = AlexNet(10).eval(), AlexNet(10, variant="paper-without-overlap").eval()
    for size in (36, 40, 41, 47, 64, 224):
        images = torch.empty(1, 3, size, size, device="meta")
        assert whole.features(images).shape == edited.features(images).shape
    pools = [
        m.kernel_size
        for m in edited.features
        if hasattr(m, "ceil_mode") and not isinstance(m, nn.Conv2d)
    ]
    assert pools == [2, 2, 2]


@pytest.mark.parametrize("base", ["paper", "source2012", "caffe"])
def test_without_traffic_no_tower_sees_the_other(base: str) -> None:
    for name, meets in ((base, True), (f"{base}-without-tower-traffic", False)):
        net = _net(name).train()
        net.seed_dropout(3, 1)
        seen: list[torch.Tensor] = []
        net.classifier[4].register_forward_hook(lambda _, __, y, seen=seen: seen.append(y))
        with torch.no_grad():
            net(_images())
            net.features[0].weight[:48].mul_(1.5)  # tower 0 alone
            net(_images())
        assert not torch.equal(seen[0][:, :2048], seen[1][:, :2048])
        assert torch.equal(seen[0][:, 2048:], seen[1][:, 2048:]) != meets


def test_half_a_net_is_one_tower_throughout() -> None:
    variant = edit(VARIANTS["paper"], half=True)
    assert variant.towers == 1
    assert [c.groups for c in variant.convolutions] == [1] * 5
    norms = [c.norm for c in variant.convolutions if c.norm is not None]
    assert [norm.groups for norm in norms] == [1, 1]


def test_grouped_units_drop_as_the_whole_layer_s_do() -> None:
    net = _net("paper-without-tower-traffic").train()
    layer = net.classifier[4]
    with torch.no_grad():
        layer.weight.zero_()
        layer.bias.fill_(1.0)
    net.seed_dropout(1, 1)
    dropped = layer(torch.ones(4, 4096)) == 0
    assert 0.4 < float(dropped.float().mean()) < 0.6
    assert not torch.equal(dropped[:, :2048], dropped[:, 2048:])


@pytest.mark.parametrize("without", [(), ("lrn",), ("lrn", "conv4"), ("fc7", "tower-traffic")])
@pytest.mark.parametrize("half", [False, True])
def test_a_name_holds_every_edit(without: tuple[str, ...], half: bool) -> None:
    if half and "tower-traffic" in without:
        with pytest.raises(ValueError, match="one tower"):
            edit(VARIANTS["paper"], without, half)
        return
    name = edited_name("paper", without, half)
    assert split_name(name) == ("paper", without, half)
    assert get_variant(name) == edit(VARIANTS["paper"], without, half)
    assert get_variant(name).name == name


def test_what_a_variant_lacks_cannot_be_taken_out() -> None:
    with pytest.raises(ValueError, match="--without lrn: variant owt"):
        get_variant("owt-without-lrn")
    with pytest.raises(ValueError, match="--without tower-traffic: owt"):
        get_variant("owt-without-tower-traffic")
    with pytest.raises(ValueError, match=r"--without: expected lrn, .*'conv9'"):
        get_variant("paper-without-conv9")


def test_weights_of_an_edited_net_come_back(tmp_path: Path) -> None:
    net = _net("paper-without-lrn+fc6").eval()
    metadata = {"variant": "paper-without-lrn+fc6", "num_classes": 10, "dropout": 0.5}
    save_weights(tmp_path / "w", net.state_dict(), metadata)
    loaded, _ = load_model(tmp_path / "w")
    with torch.no_grad():
        assert torch.equal(loaded(_images()), net(_images()))


def test_the_command_line_turns_parts_into_settings() -> None:
    assert parse_arguments([])["variant"] is None, "left to the recipe"
    edited = parse_arguments(["--recipe", "caffe", "--without", "lrn"])
    assert edited["variant"] == "caffe-without-lrn"
    options = parse_arguments(["--without", "lrn", "dropout", "augmentation", "--half"])
    assert options["variant"] == "paper-half-without-lrn"
    assert (options["dropout"], options["augmentation"]) == (0.0, "none")
    with pytest.raises(SystemExit):
        parse_arguments(["--without", "conv9"])
    assert {"dropout", "augmentation"} < set(ABLATIONS)


def test_without_augmentation_every_epoch_has_the_centre_crops() -> None:
    source = SyntheticImages("train", 12)
    scale = Normalization((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    batches = Batches(source, 12, Transform(40, scale, "none"), 0, train=True)
    batch = next(batches.epoch(3))
    assert batch.indices.tolist() != list(range(12))
    side = decode_size(40)
    first = (side - 40) // 2
    images = batches.augment(*batch.inputs)
    for image, index in zip(images, batch.indices.tolist(), strict=True):
        crop = source.image(index, side)[first : first + 40, first : first + 40]
        assert torch.equal(image, torch.from_numpy(crop).permute(2, 0, 1).float())


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The training commands that ablate gives; each leaves a finished run of a random net."""
    commands: list[list[str]] = []

    def train(command: list[str]) -> int:
        commands.append(command)
        options = parse_arguments(command[3:])
        if options["seed"] == FAILS and "conv4" in options["variant"]:
            return 1
        if options["data"] is not None:  # none of these tests has any
            return 2
        folder = options["output"]
        folder.mkdir(parents=True, exist_ok=True)
        metadata: dict[str, Any] = {"classes": list("abcdefghij"), "num_classes": 10}
        metadata |= {"variant": options["variant"], "dropout": 0.5, "top1": 0.5, "top5": 0.75}
        if options["variant"] != "paper":
            metadata |= {"top1": 0.375, "top5": 0.8125}
        save_weights(folder / "model.safetensors", _net(options["variant"]).state_dict(), metadata)
        return 0

    def start(command: list[str]) -> SimpleNamespace:
        code = train(command)
        return SimpleNamespace(wait=lambda: code)

    monkeypatch.setattr(ablate.subprocess, "Popen", start)
    return commands


@pytest.mark.slow
def test_ablate_sets_what_each_edit_cost_beside_what_was_published(
    tmp_path: Path, trained: list[list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    arguments = ["--set", "conv4", "half", "--output", str(out), "--epochs", "1"]
    assert ablate.main(arguments) == 0
    said = capsys.readouterr().out
    assert "The published losses are of ImageNet; these images are another data set." in said
    rows = [line.split() for line in said.splitlines()]
    assert ["whole", f"{COUNTS['paper']:,}", "50.0%", "25.0%"] in rows
    conv4, half = (f"{COUNTS[f'paper-{n}']:,}" for n in ("without-conv4", "half"))
    errors = ["62.5%", "18.8%", "+12.5", "-6.2"]
    assert ["without", "conv4", conv4, *errors, "+2.0", "-"] in rows
    assert ["half", half, *errors, "+1.7", "+1.2"] in rows
    assert [c[-4:-2] for c in trained[1:]] == [["--without", "conv4"], ["1", "--half"]]


def _without_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither write nets nor read them for the table; they are large."""
    monkeypatch.setattr(sys.modules[__name__], "save_weights", lambda *_: None)
    monkeypatch.setattr(sys.modules[__name__], "_net", lambda _: nn.Identity())
    monkeypatch.setattr(ablate, "report", lambda *_: [])


def test_ablate_again_gives_the_same_commands(
    tmp_path: Path, trained: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training with them goes on with a stopped run, skips a finished one, keeps all weights."""
    _without_weights(monkeypatch)
    arguments = ["--set", "conv4", "--output", str(tmp_path / "out"), "--epochs", "1"]
    assert ablate.main(arguments) == 0
    assert ablate.main(arguments) == 0
    assert trained[:2] == trained[2:]
    assert all("--resume" not in command for command in trained)


def test_ablate_lets_training_save_after_ctrl_c(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ends = iter([KeyboardInterrupt, KeyboardInterrupt, 130])  # a second one, too

    def wait() -> int:
        end = next(ends)
        if end is KeyboardInterrupt:
            raise KeyboardInterrupt
        return end

    monkeypatch.setattr(ablate.subprocess, "Popen", lambda _: SimpleNamespace(wait=wait))
    assert ablate.main(["--set", "conv4", "--output", str(tmp_path / "out")]) == 130
    assert next(ends, None) is None
    assert "interrupted, give the same command again to go on" in capsys.readouterr().err


def test_ablate_takes_the_recipe_s_variant(
    tmp_path: Path, trained: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    _without_weights(monkeypatch)
    arguments = ["--set", "augmentation", "--output", str(tmp_path / "out")]
    assert ablate.main([*arguments, "--recipe", "torchvision"]) == 0
    assert [parse_arguments(c[3:])["variant"] for c in trained] == ["owt", "owt"]


@pytest.mark.parametrize("wrong", [["--bogus"], ["--epochs", "0"], ["--data", "nowhere"]])
def test_ablate_keeps_nothing_of_options_that_training_refuses(
    tmp_path: Path, trained: list[list[str]], wrong: list[str]
) -> None:
    out = tmp_path / "out"
    try:
        code: object = ablate.main(["--set", "conv4", "--output", str(out), *wrong])
    except SystemExit as error:
        code = error.code
    assert code == 2
    assert not out.exists()


def test_ablate_refuses_before_it_trains(
    tmp_path: Path, trained: list[list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments in (
        ["--set", "lrn", "--variant", "owt", "--output", str(tmp_path / "out")],
        ["--set", "lrn", "--recipe", "torchvision", "--output", str(tmp_path / "out")],
        ["--set", "lrn", "--half", "--output", str(tmp_path / "out")],
    ):
        assert ablate.main(arguments) == 2
        assert capsys.readouterr().err.count("\n") == 1
    assert trained == []
    assert not (tmp_path / "out").exists()
    arguments = ["--set", "conv4", "--output", str(tmp_path / "new"), "--seed", str(FAILS)]
    assert ablate.main(arguments) == 1
    assert "training conv4 ended with code 1" in capsys.readouterr().err
