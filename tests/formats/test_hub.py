"""Nets on the Hugging Face Hub, as its own library reads and writes them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import fastalex
from fastalex.data import Normalization
from fastalex.formats.export import main
from fastalex.training.weights import save_weights

hub = pytest.importorskip("huggingface_hub", reason="needs huggingface_hub")
NAMES = ["no", "yes: [a]", '"quoted" | # name']


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    net = fastalex.AlexNet(len(NAMES), variant="caffe")
    scale = Normalization((120.0, 110.0, 100.0), (60.0, 61.0, 62.0))
    metadata = {
        "variant": "caffe", "num_classes": len(NAMES), "dropout": 0.5, "classes": NAMES,
        "image_size": 67, "normalization": scale.to_dict(), "top1": 0.125, "top5": 1.0,
        "epoch": 3, "step": 12, "precision": "float32", "seed": 5,
    }  # fmt: skip
    save_weights(tmp_path / "model.safetensors", net.state_dict(), metadata)
    return tmp_path / "model.safetensors"


def test_a_folder_for_the_hub_is_the_net_and_a_card(weights: Path, tmp_path: Path) -> None:
    folder = tmp_path / "new" / "folder"
    assert main(["--weights", str(weights), "--to", "hub", "--output", str(folder)]) == 0
    card = hub.ModelCard.load(folder / "README.md")
    assert (card.data.library_name, card.data.pipeline_tag) == ("fastalex", "image-classification")
    assert "12.5%" in card.text
    assert all(name in card.text for name in NAMES)
    images = torch.randn(2, 3, 67, 67)
    before, after = (fastalex.load(path) for path in (weights, folder / "model.safetensors"))
    assert after.classes == NAMES
    assert torch.equal(before(images), after(images))
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "model.safetensors"]


def test_the_hub_s_mixin_keeps_a_net(tmp_path: Path) -> None:
    class HubAlexNet(fastalex.AlexNet, hub.PyTorchModelHubMixin, library_name="fastalex"):
        pass

    net = HubAlexNet(num_classes=10, variant="caffe").eval()
    net.save_pretrained(tmp_path)
    again = HubAlexNet.from_pretrained(tmp_path).eval()
    assert again.variant == net.variant
    images = torch.randn(2, 3, 67, 67)
    assert torch.equal(net(images), again(images))
