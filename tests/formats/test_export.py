"""``python -m fastalex.export``: what other programs make of the file, and what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image
from safetensors import safe_open

from fastalex import AlexNet
from fastalex.data import Normalization
from fastalex.data.normalization import MeanImage
from fastalex.evaluation.ensemble import Ensemble
from fastalex.evaluation.predict import read_files
from fastalex.formats import convert
from fastalex.formats.export import main
from fastalex.model.variants import FOREIGN, VARIANTS
from fastalex.training.weights import load_model, save_weights
from tests.formats._writers import SMALL, make_net

NAMES = ["ant", "bee", "cat", "dog", "eel", "fox", "gnu"]
# Images of bytes in the graph go through another program's resizing, which rounds a pixel in
# thousands the other way: logits then differ by 1e-3 of their size at most.
BOUND = {False: 1e-5, True: 2e-3}
# Logits by the file at argv[1] of the images at argv[2], where no fastalex is to be found.
ELSEWHERE = """
import sys, numpy, torch
program = torch.export.load(sys.argv[1]).module()
numpy.save(sys.argv[3], program(torch.from_numpy(numpy.load(sys.argv[2]))).detach().numpy())
assert not [name for name in sys.modules if name.startswith("fastalex")]
"""


def _weights(path: Path, variant: str, image: MeanImage | None = None, size: int = 0) -> AlexNet:
    net = make_net(variant)
    scale = Normalization((120.0, 110.0, 100.0), (60.0, 61.0, 62.0), image)
    metadata = {
        "variant": net.variant.name, "num_classes": 7, "dropout": 0.5, "classes": NAMES,
        "image_size": size or net.variant.image_size, "normalization": scale.to_dict(),
    }  # fmt: skip
    save_weights(path, net.state_dict(), metadata, image)
    return net


def _pictures(folder: Path, size: tuple[int, int] = (400, 310)) -> tuple[list[Path], Any]:
    random = np.random.default_rng(0)
    coarse = random.integers(0, 256, (3, 31, 40, 3), dtype=np.uint8)
    images = [Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC) for pixels in coarse]
    paths = [folder / f"{i}.png" for i in range(len(images))]
    for image, path in zip(images, paths, strict=True):
        image.save(path)
    return paths, np.stack([np.asarray(image) for image in images])


def _expected(weights: Path, paths: list[Path]) -> tuple[torch.Tensor, npt.NDArray[np.float32]]:
    """What evaluation says of the centre crops, as softmax, and the images that the net got."""
    ensemble, kept = Ensemble([weights]), []
    model = ensemble.members[0].model
    model.register_forward_pre_hook(lambda _, inputs: kept.append(inputs[0].clone()))
    side = round(ensemble.image_size * 256 / 224)
    pixels = np.stack([p for p in read_files(paths, side) if not isinstance(p, str)])
    return ensemble.probabilities(pixels, 1), kept[0].numpy()


def _run(path: Path, images: npt.NDArray[Any], folder: Path) -> torch.Tensor:
    """The file's logits, computed by a program that is not ours."""
    if path.suffix == ".onnx":
        runtime = pytest.importorskip("onnxruntime")
        session = runtime.InferenceSession(str(path))
        return torch.from_numpy(session.run(["logits"], {"images": images})[0])
    np.save(folder / "in.npy", images)
    command = [sys.executable, "-I", "-c", ELSEWHERE, path.name, "in.npy", "out.npy"]
    subprocess.run(command, cwd=folder, check=True, capture_output=True, timeout=300)
    return torch.from_numpy(np.load(folder / "out.npy"))


SLOW = pytest.mark.slow
CASES = [
    *((name, "onnx", name != "owt") for name in (*VARIANTS, *FOREIGN)),
    *(pytest.param(name, "onnx", name == "owt", marks=SLOW) for name in (*VARIANTS, *FOREIGN)),
    *(pytest.param(name, "pt2", False, marks=SLOW) for name in (*VARIANTS, *FOREIGN)),
    *(pytest.param(name, "pt2", True, marks=SLOW) for name in ("paper", "owt", "caffe")),
]


@pytest.mark.parametrize(("variant", "to", "pixels"), CASES)
def test_other_programs_compute_what_evaluate_does(
    variant: str, to: str, pixels: bool, tmp_path: Path
) -> None:
    if to == "onnx":
        pytest.importorskip("onnx")
    weights, file = tmp_path / "w.safetensors", tmp_path / f"f.{to}"
    net = _weights(weights, variant + SMALL)
    options = ["--preprocess"] if pixels else []
    assert main(["--weights", str(weights), "--to", to, "--output", str(file), *options]) == 0
    paths, photographs = _pictures(tmp_path)
    probabilities, images = _expected(weights, paths)
    with torch.no_grad():
        exact = net.double()(torch.from_numpy(images).double())
    torch.testing.assert_close(exact.softmax(1), probabilities, rtol=0, atol=1e-5)
    found = _run(file, photographs if pixels else images, tmp_path)
    assert float((found - exact).norm()) <= BOUND[pixels] * float(exact.norm())
    best = exact.topk(5).values  # of two nearly equal ones either may come first
    atol = 2 * float((found - exact).abs().max())
    torch.testing.assert_close(exact.gather(1, found.topk(5).indices), best, rtol=0, atol=atol)


@pytest.mark.parametrize("centred", [True, False])
def test_a_mean_image_is_in_the_graph(centred: bool, tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    pixels = np.random.default_rng(1).uniform(60, 200, (114, 114, 3)).astype(np.float32)
    weights, file = tmp_path / "w", tmp_path / "f.onnx"
    _weights(weights, "owt" + SMALL, MeanImage.of(pixels, 114, centred), 100)
    assert main(["--weights", str(weights), "--to", "onnx", "--output", str(file),
                 "--preprocess"]) == 0  # fmt: skip
    paths, photographs = _pictures(tmp_path)
    probabilities, _ = _expected(weights, paths)
    found = _run(file, photographs, tmp_path).double().softmax(1)
    torch.testing.assert_close(found, probabilities, rtol=0, atol=2e-3)


@pytest.mark.parametrize("to", ["onnx", "safetensors"])
@pytest.mark.parametrize("variant", ["paper", "owt", "caffenet"])
def test_what_was_exported_comes_back_whole(variant: str, to: str, tmp_path: Path) -> None:
    if to == "onnx":
        pytest.importorskip("onnx")
    weights, file, again = (tmp_path / name for name in ("w", "f", "again"))
    _weights(weights, variant + SMALL, size=150)
    assert main(["--weights", str(weights), "--to", to, "--output", str(file)]) == 0
    assert convert.main([str(file), "--output", str(again)]) == 0
    (net, before), (twin, after) = load_model(weights), load_model(again)
    assert all(map(torch.equal, net.state_dict().values(), twin.state_dict().values()))
    for key in ("variant", "classes", "image_size", "normalization"):
        assert after[key] == before[key]


def test_labels_stand_in_the_file(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    weights = tmp_path / "w"
    _weights(weights, "paper" + SMALL)
    for to in ("onnx", "pt2", "safetensors"):
        assert main(["--weights", str(weights), "--to", to, "--output", str(tmp_path / to)]) == 0
    model = onnx.load(tmp_path / "onnx")
    found = {pair.key: pair.value for pair in model.metadata_props}
    assert json.loads(found["classes"]) == NAMES
    kinds = [node.op_type for node in model.graph.node]
    assert kinds.count("LRN") == 4  # two in each tower
    extra = {"fastalex.json": ""}
    torch.export.load(tmp_path / "pt2", extra_files=extra)
    assert json.loads(extra["fastalex.json"]) == found
    with safe_open(tmp_path / "safetensors", "pt") as file:
        assert {k: v for k, v in file.metadata().items() if k != "format"} == found


@pytest.mark.slow
def test_torchvision_s_alexnet_loads_owt(tmp_path: Path) -> None:
    weights, file = tmp_path / "w", tmp_path / "f.pth"
    net = _weights(weights, "owt")
    arguments = ["--weights", str(weights), "--output", str(file), "--to"]
    assert main([*arguments, "torchvision"]) == 0
    found = torch.load(file, weights_only=True)
    stock = AlexNet(7, variant="owt", fused=False)  # its modules are torchvision's: test_forms
    stock.load_state_dict(found, strict=True)
    assert all(torch.equal(found[name], tensor) for name, tensor in net.state_dict().items())


def test_any_image_size_is_averaged_as_in_torch(tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    weights, file = tmp_path / "w", tmp_path / "f.onnx"
    for size in (63, 300):
        net = _weights(weights, "source2012" + SMALL, size=size)
        assert main(["--weights", str(weights), "--to", "onnx", "--output", str(file)]) == 0
        images = 2 * torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            exact = net.double()(images.double())
        found = _run(file, images.numpy(), tmp_path)
        assert float((found - exact).norm()) <= 1e-5 * float(exact.norm())


def test_wrong_arguments_are_a_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    weights, out = tmp_path / "w", tmp_path / "f"
    _weights(weights, "paper" + SMALL)
    (tmp_path / "text").write_text("no weights")
    good = ["--weights", str(weights), "--to", "onnx", "--output", str(out)]
    for changed, said in (
        ({1: str(tmp_path / "none")}, "no such weights file"),
        ({1: str(tmp_path)}, "no such weights file"),
        ({1: str(tmp_path / "text")}, "not a safetensors file"),
        ({3: "torchvision"}, "its alexnet is variant owt, and this is paper-without-fc6+fc7"),
        ({5: str(tmp_path)}, "a folder, name a file"),
        ({5: str(tmp_path / "no" / "f")}, "its folder does not exist"),
        ({3: "safetensors", 6: "--preprocess"}, "holds no graph"),
    ):
        arguments = dict(enumerate(good)) | changed
        assert main([arguments[i] for i in sorted(arguments)]) == 2
        out_text, err = capsys.readouterr()
        assert (out_text, err.count("\n")) == ("", 1)
        assert said in err, err
    monkeypatch.setitem(sys.modules, "onnx", None)
    assert main(good) == 2
    assert capsys.readouterr().err == (
        "export: error: ONNX files need onnx: pip install 'fastalex[export]'\n"
    )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["text", "w"]


@pytest.mark.parametrize("strict", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("variant", list(VARIANTS))
def test_a_program_of_the_fused_net_holds_torch_s_own_operators(variant: str, strict: bool) -> None:
    net = AlexNet(7, variant=variant + SMALL).eval()
    images = torch.randn(2, 3, 227, 227)
    program = torch.export.export(net, (images,), strict=strict)
    targets = {str(n.target) for n in program.graph.nodes if n.op == "call_function"}
    assert {t.split(".")[0] for t in targets} <= {"aten"} | {"<built-in function getitem>"}
    with torch.no_grad():
        found, expected = program.module()(images), net(images)
    assert float((found - expected).norm()) <= 1e-5 * float(expected.norm())


@pytest.mark.slow
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("variant", list(VARIANTS))
def test_torch_s_own_exporter_takes_both_forms(variant: str, fused: bool, tmp_path: Path) -> None:
    for module in ("onnx", "onnxscript"):
        pytest.importorskip(module)
    net = AlexNet(7, variant=variant + SMALL, fused=fused).eval().requires_grad_(False)
    images, file = torch.randn(1, 3, 227, 227), tmp_path / "f.onnx"
    torch.onnx.export(net, (images,), file, input_names=["images"], output_names=["logits"],
                      dynamo=True, verbose=False)  # fmt: skip
    found, expected = _run(file, images.numpy(), tmp_path), net(images)
    assert float((found - expected).norm()) <= 1e-5 * float(expected.norm())
