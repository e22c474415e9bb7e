"""The ONNX files of ``fastalex.export`` in OpenVINO, whose reader and kernels are its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy.typing as npt
import pytest
import torch

from fastalex.data import decode_size
from fastalex.formats.export import main
from fastalex.model.variants import VARIANTS
from tests.formats._writers import SMALL
from tests.formats.test_export import BOUND, _expected, _pictures, _weights

pytest.importorskip("onnx")
openvino = pytest.importorskip("openvino", reason="OpenVINO is not installed")

CASES = [
    *((name, False, 0) for name in VARIANTS),
    *((name, True, 0) for name in VARIANTS),
    ("paper", True, 54),
]


def _run(path: Path, images: npt.NDArray[Any]) -> torch.Tensor:
    """The file's logits, on the CPU in float32, which is not its default on every CPU."""
    exact = {"INFERENCE_PRECISION_HINT": "f32"}
    model = openvino.Core().compile_model(str(path), "CPU", exact)
    return torch.from_numpy(model({"images": images})["logits"].copy())


@pytest.mark.parametrize(("variant", "pixels", "larger"), CASES)
def test_openvino_computes_what_evaluate_does(
    variant: str, pixels: bool, larger: int, tmp_path: Path
) -> None:
    weights, file = tmp_path / "w.safetensors", tmp_path / "f.onnx"
    net = _weights(weights, variant + SMALL)
    options = ["--preprocess"] if pixels else []
    assert main(["--weights", str(weights), "--to", "onnx", "--output", str(file), *options]) == 0
    side = decode_size(net.variant.image_size) + larger
    paths, photographs = _pictures(tmp_path, (side + 90, side))
    _, images = _expected(weights, paths)
    with torch.no_grad():
        exact = net.double()(torch.from_numpy(images).double())
    found = _run(file, photographs if pixels else images)
    assert float((found - exact).norm()) <= BOUND[larger > 0] * float(exact.norm())
    best = exact.topk(5).values  # of two nearly equal ones either may come first
    atol = 2 * float((found - exact).abs().max())
    torch.testing.assert_close(exact.gather(1, found.topk(5).indices), best, rtol=0, atol=atol)
