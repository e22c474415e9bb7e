"""``fastalex.load`` and ``fastalex.alexnet``: nets of files with their transforms and classes."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import fastalex
from fastalex.data import MeanImage, decode_size
from fastalex.data.decode import read_image
from fastalex.evaluation.ensemble import Ensemble
from tests import _pictures
from tests._nets import CLASSES, SIZE, random_weights


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("mean_image", [True, False])
def test_a_loaded_net_names_an_image_as_evaluation_does(
    mean_image: bool, fused: bool, tmp_path: Path
) -> None:
    side, weights = decode_size(SIZE), tmp_path / "w"
    pixels = np.random.default_rng(0).uniform(0, 255, (side, side, 3)).astype(np.float32)
    random_weights(weights, 1, MeanImage.of(pixels, side, False) if mean_image else None)
    path = _pictures.save(tmp_path / "p.png", _pictures.smooth(90, 70))
    expected = Ensemble([weights]).probabilities(read_image(path, side)[None], 1)
    net = fastalex.load(weights, fused=fused)
    assert (net.is_fused, net.training, net.classes) == (fused, False, CLASSES)
    with Image.open(path) as image:
        array = np.asarray(image)
        for given in (image, array, image.convert("RGBA")):
            x = net.transforms(given)
            assert (x.shape, x.dtype) == ((3, SIZE, SIZE), torch.float32)
            with torch.no_grad():
                found = net(x[None]).double().softmax(1)
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    assert net.transforms(array[..., 0]).shape == (3, SIZE, SIZE)
    for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net)), net.unfused(), net.fused()):
        assert torch.equal(twin.transforms(array), net.transforms(array))
        assert twin.classes == CLASSES
    with pytest.raises(TypeError, match="expected uint8, got float64"):
        net.transforms(np.zeros((9, 9, 3)))


def test_alexnet_is_made_by_torchvision_s_name(tmp_path: Path) -> None:
    random_weights(tmp_path / "w", 1)
    net = fastalex.alexnet(pretrained=tmp_path / "w")
    assert (net.num_classes, net.classes) == (len(CLASSES), CLASSES)
    other = fastalex.alexnet(str(tmp_path / "w"), num_classes=3)
    assert other(torch.zeros(1, 3, SIZE, SIZE)).shape == (1, 3)
    assert other.classes is None
    assert torch.equal(other.features[0].weight, net.features[0].weight)
    with torch.device("meta"):
        new = fastalex.alexnet()
    assert (new.variant.name, new.num_classes, new.transforms) == ("owt", 1000, None)
    with pytest.raises(ValueError, match="no such weights file"):
        fastalex.load(tmp_path / "none")
    assert {"AlexNet", "alexnet", "load"} <= set(dir(fastalex))
