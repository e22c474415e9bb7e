"""``python -m fastalex.convert``: weights of other programs, and files that are none."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import signal
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastalex import AlexNet
from fastalex.evaluation.predict import main as predict
from fastalex.formats.convert import main, read_foreign
from fastalex.formats.layers import ForeignNet, find_variant
from fastalex.model.variants import FOREIGN, VARIANTS
from fastalex.training.weights import load_mean_image, load_model
from tests import _commands, _pictures
from tests.formats import _writers
from tests.formats._writers import FORMATS, SMALL, make_net


def _file(name: str, folder: Path) -> tuple[Path, Any]:
    """A file of the format ``name``, and the net that is in it."""
    write, variant = FORMATS[name]
    net, path = make_net(variant + SMALL), folder / f"{name}.bin"
    write(path, net)
    return path, net


@pytest.mark.parametrize("name", list(FORMATS))
def test_each_format_holds_the_net_that_was_written(name: str, tmp_path: Path) -> None:
    path, net = _file(name, tmp_path)
    weights = tmp_path / "w.safetensors"
    arguments = [str(path), "--output", str(weights), "--variant", net.variant.name]
    assert main(arguments) == 0
    found, metadata = load_model(weights)
    expected = net.state_dict()
    assert list(found.state_dict()) == list(expected)
    assert all(torch.equal(t, expected[name]) for name, t in found.state_dict().items())
    assert metadata["image_size"] == net.variant.image_size
    assert metadata["classes"] == [str(i) for i in range(7)]
    mean = 0.485 * 255 if "owt" in net.variant.name else 122.68
    assert metadata["normalization"]["mean"][0] == pytest.approx(mean, abs=0.01)


@pytest.mark.parametrize("variant", ["caffe", "caffenet"])
def test_logits_are_those_of_the_file_s_own_runtime(variant: str, tmp_path: Path) -> None:
    runtime = pytest.importorskip("onnxruntime")
    net, path, weights = make_net(variant + SMALL), tmp_path / "n.onnx", tmp_path / "w.safetensors"
    _writers.onnx_zoo(path, net, 224)
    assert main([str(path), "--output", str(weights), "--variant", net.variant.name]) == 0
    found, metadata = load_model(weights)
    assert metadata["image_size"] == 224
    images = 50 * torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(1))
    (theirs,) = runtime.InferenceSession(str(path)).run(None, {"data_0": images.flip(1).numpy()})
    with torch.no_grad():
        exact = found.unfused().double()(images.double())
    assert float((torch.from_numpy(theirs) - exact).norm()) <= 1e-5 * float(exact.norm())


def _shaped(variant: str, told: str | None = None) -> ForeignNet:
    """A net of full size that takes no memory."""
    with torch.device("meta"):
        net = AlexNet(1000, variant=variant)
    parameters = [tuple(p.shape) for p in net.parameters()]
    arrays = [np.broadcast_to(np.float32(0), shape) for shape in parameters]
    return ForeignNet("a file", list(zip(arrays[::2], arrays[1::2], strict=True)), told)


def test_the_variant_is_told_by_file_or_shapes_or_asked_for() -> None:
    for variant in (*VARIANTS, *FOREIGN):
        assert find_variant(_shaped(variant, told=variant)) == variant
        assert find_variant(_shaped(variant), asked=variant) == variant
    assert find_variant(_shaped("owt")) == "owt"
    with pytest.raises(ValueError, match="fit paper, source2012, caffe, caffenet: say which"):
        find_variant(_shaped("paper"))
    with pytest.raises(ValueError, match="fit variant owt"):
        find_variant(_shaped("paper"), asked="owt")


@pytest.mark.parametrize(("name", "variant"), [("CaffeNet", "caffenet"), ("ONNX zoo", "caffe")])
def test_files_of_caffe_say_which_variant_they_are(name: str, variant: str, tmp_path: Path) -> None:
    net = read_foreign(_file(name, tmp_path)[0])
    assert (net.variant, net.bgr) == (variant, True)


def test_classes_mean_and_channels_are_taken(tmp_path: Path) -> None:
    path, net = _file("caffemodel", tmp_path)
    names = ["tench", "shark", "ray", "cock", "hen", "finch", "junco"]
    (tmp_path / "names.txt").write_text("\n".join(names) + "\n")
    for name in names:
        (tmp_path / "train" / name).mkdir(parents=True)
    image = np.random.default_rng(0).uniform(0, 255, (3, 259, 259)).astype(np.float32)
    np.save(tmp_path / "mean.npy", image)
    blob = _writers.caffe_messages()["BlobProto"](num=1, channels=3, height=259, width=259)
    blob.data.extend(image.ravel())
    (tmp_path / "mean.binaryproto").write_bytes(blob.SerializeToString())
    np.save(tmp_path / "three.npy", image.mean((1, 2)))
    for number, (classes, mean, channels) in enumerate(
        [
            ("names.txt", "mean.npy", "bgr"),
            ("train", "mean.binaryproto", "rgb"),
            ("train", "three.npy", "bgr"),
        ]
    ):
        weights = tmp_path / f"{number}.safetensors"
        arguments = [str(path), "--output", str(weights), "--variant", net.variant.name]
        arguments += ["--classes", str(tmp_path / classes), "--mean", str(tmp_path / mean)]
        assert main([*arguments, "--channels", channels]) == 0
        found, metadata = load_model(weights)
        assert metadata["classes"] == (sorted(names) if classes == "train" else names)
        order = slice(None, None, -1 if channels == "bgr" else 1)
        first = found.features[0].weight.detach().numpy()
        as_read = net.features[0].weight.detach().numpy()
        assert np.array_equal(first, as_read if channels == "bgr" else as_read[:, ::-1])
        expected = image.mean((1, 2))[order]
        assert metadata["normalization"]["mean"] == pytest.approx(expected.tolist(), rel=1e-5)
        pixels = load_mean_image(weights)
        if mean == "three.npy":
            assert pixels is None
        else:
            assert pixels is not None
            assert np.array_equal(pixels, image[order].transpose(1, 2, 0))


def test_what_was_converted_is_what_the_commands_take(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, net = _file("safetensors", tmp_path)
    weights, picture = tmp_path / "w.safetensors", tmp_path / "p.png"
    assert main([str(path), "--output", str(weights), "--variant", net.variant.name]) == 0
    _pictures.save(picture, _pictures.smooth(300, 260))
    assert predict([str(picture), "--weights", str(weights), "--crops", "1"]) == 0
    assert "read: safetensors: variant paper-without-fc6+fc7, " in capsys.readouterr().out
    assert main([str(weights), "--output", str(tmp_path / "again")]) == 2
    assert "already weights of fastalex's" in capsys.readouterr().err


def _calls(module: str, name: str, text: str) -> bytes:
    """A pickle of protocol 2 that calls ``module.name(text)``."""
    argument = text.encode()
    return (
        b"\x80\x02c" + f"{module}\n{name}\n".encode()
        + b"X" + struct.pack("<I", len(argument)) + argument + b"\x85R."
    )  # fmt: skip


def _truncated(name: str, folder: Path, share: float) -> bytes:
    data = _file(name, folder)[0].read_bytes()
    return data[: int(len(data) * share)]


def _varint(value: int) -> bytes:
    parts = []
    while value > 0x7F:
        parts.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*parts, value])


def _hostile_files(folder: Path) -> dict[str, bytes]:
    touch = f"touch {folder / 'executed'}"
    huge_blob = b"\x08" + _varint(2**62) + b"\x10" + _varint(2**62) + b"\x2a\x04abcd"
    layer = b"\x0a\x05conv1" + b"\x3a" + _varint(len(huge_blob)) + huge_blob
    return {
        "empty": b"",
        "text": b"layer { name: 'conv1' }\n" * 9,
        "zeros": bytes(1000),
        "png": b"\x89PNG\r\n\x1a\n" + bytes(100),
        "pickle that calls os.system": _calls("posix", "system", touch),
        "pickle that evaluates": _calls("builtins", "eval", f"__import__('os').system('{touch}')"),
        "pickle that imports a stub's method": _calls("options", "OptionsParser", touch),
        "pickle of a list": pickle.dumps([1, 2], protocol=2),
        "pickle of another net": pickle.dumps(
            {"model_state": {"layers": [{"name": "a", "weights": [], "type": "fc"}]}}, protocol=2
        ),
        "pickle in a circle": pickle.dumps(
            {"model_state": {"layers": {n: {"name": n, "inputs": ["a", "b"]} for n in "ab"}}}, 2
        ),
        "npy of numbers": b"\x93NUMPY\x01\x00" + bytes(120),
        "old torch file that calls": b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
        + b"\x80\x02M\xe9\x03." + _calls("posix", "system", touch),
        "safetensors of a huge header": struct.pack("<Q", 2**60) + b"{" + bytes(50),
        "safetensors of other names": struct.pack("<Q", 64)
        + json.dumps({"conv1": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}})
        .encode().ljust(64) + bytes(4),
        "protobuf whose length is huge": b"\x0a\x03abc\xa2\x06" + _varint(2**63) + b"abc",
        "protobuf that never ends": b"\xa2\x06" + b"\xff" * 40,
        "blob of a huge shape": b"\xa2\x06" + _varint(len(layer)) + layer,
        "protobuf of groups": b"\xa3\x06\xa4\x06",
        "half a caffemodel": _truncated("caffemodel", folder, 0.5),
        "half a zip": _truncated("torchvision", folder, 0.5),
        "half a safetensors": _truncated("safetensors", folder, 0.5),
        "a third of a pickle": _truncated("cuda-convnet", folder, 0.3),
        "most of an ONNX": _truncated("ONNX zoo", folder, 0.9),
    }  # fmt: skip


def test_hostile_and_damaged_files_are_refused_in_a_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, place = tmp_path / "made", tmp_path / "out"
    for folder in (source, place):
        folder.mkdir()
    files = _hostile_files(source)
    for name, data in files.items():
        path = place / "file"
        path.write_bytes(data)
        assert main([str(path), "--output", str(place / "w")]) == 2, name
        out, err = capsys.readouterr()
        assert out == "", name
        assert err.startswith(f"convert: error: {path}: "), (name, err)
        assert err.count("\n") == 1, (name, err)
        assert len(err) < 700, (name, err)
        assert os.listdir(place) == ["file"], name
    assert not (source / "executed").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["caffemodel", "ONNX zoo", "cuda-convnet"])
def test_files_with_wrong_bytes_are_read_or_refused(name: str, tmp_path: Path) -> None:
    """A reader raises ValueError or returns; the bytes that say what there is are hit most."""
    path, _ = _file(name, tmp_path)
    good, random = path.read_bytes(), np.random.default_rng(0)
    marks = [i for i in range(len(good) - 8) if good[i : i + 4] in (b"conv", b"Conv", b"nump")]
    places = [p for m in [0, *marks[:20], len(good) - 64] for p in range(m, m + 64)]
    refused = 0
    for _ in range(60):
        data = bytearray(good)
        for place in random.choice(places, 3):
            data[place] = random.integers(256)
        path.write_bytes(data)
        try:
            read_foreign(path)
        except ValueError:
            refused += 1
    assert refused > 5


def test_wrong_arguments_are_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, net = _file("safetensors", tmp_path)
    (tmp_path / "two").write_text("a\nb\n")
    np.save(tmp_path / "bad.npy", np.zeros((4, 4)))
    good = [str(path), "--output", str(tmp_path / "w"), "--variant", net.variant.name]
    for arguments, said in (
        ([str(tmp_path / "none"), *good[1:]], "No such file"),
        ([str(tmp_path), *good[1:]], "Is a directory"),
        ([*good[:2], str(tmp_path), *good[3:]], "--output"),
        ([*good[:2], str(tmp_path / "no/w"), *good[3:]], "its folder does not exist"),
        (good[:3], "its 6 layers of weights fit no AlexNet"),
        ([*good[:3], "--variant", "vgg"], "variant: expected one of"),
        ([*good, "--classes", str(tmp_path / "two")], "7 outputs, there are 2 names"),
        ([*good, "--classes", str(tmp_path / "nothing")], "--classes"),
        ([*good, "--mean", str(tmp_path / "bad.npy")], "expected [3], [3, D, D] or [D, D, 3]"),
        ([*good, "--mean", str(path)], "--mean"),
        ([*good, "--image-size", "20"], "too few"),
    ):
        assert main(arguments) == 2, arguments
        out, err = capsys.readouterr()
        assert (out, err.count("\n")) == ("", 1)
        assert said in err, err
    assert not (tmp_path / "w").exists()


def test_ctrl_c_is_a_line(tmp_path: Path) -> None:
    path, net = _file("safetensors", tmp_path)
    os.mkfifo(tmp_path / "names")
    arguments = [str(path), "--output", "w", "--variant", net.variant.name, "--classes", "names"]
    process = _commands.start(["-m", "fastalex.convert", *arguments], tmp_path)
    with open(tmp_path / "names", "w"):  # returns when the command reads it
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, "")
    assert err == "convert: interrupted, nothing was written\n"
    assert not (tmp_path / "w").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["caffemodel", "torchvision", "cuda-convnet"])
def test_a_whole_net_needs_no_option(name: str, tmp_path: Path) -> None:
    write, variant = FORMATS[name]
    net, path = make_net(variant, 1000), tmp_path / "net.npy"
    write(path, net)
    process = _commands.run(["-m", "fastalex.convert", str(path), "--output", "w"], tmp_path)
    assert process.returncode == 0, process.stderr
    assert f"variant {variant}, " in process.stdout
    found, _ = load_model(tmp_path / "w")
    pairs = zip(found.parameters(), net.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_a_checksum_in_the_name_is_checked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, net = _file("torchvision", tmp_path)
    good = tmp_path / f"alexnet-owt-{hashlib.sha256(path.read_bytes()).hexdigest()[:8]}.pth"
    bad = tmp_path / "alexnet-owt-7be5be79.pth"
    for copy in (good, bad):
        copy.write_bytes(path.read_bytes())
    options = ["--output", str(tmp_path / "w"), "--variant", net.variant.name]
    assert main([str(good), *options]) == 0
    assert main([str(bad), *options]) == 2
    assert "its name says 7be5be79: damaged" in capsys.readouterr().err
