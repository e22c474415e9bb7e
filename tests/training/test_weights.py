"""Weights on disk: what comes back, what a crash leaves, and what a bad file says."""

from __future__ import annotations

import errno
import json
import os
import signal
import stat
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastalex import AlexNet
from fastalex.training import weights
from fastalex.training.weights import load_model, load_weights, read_metadata, save_weights
from tests._commands import end, start, wait_until

METADATA = {"variant": "owt", "num_classes": 3, "dropout": 0.25, "classes": ["ä", "b", "c d"]}


def _tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "a.weight": torch.randn(4, 3, generator=generator),
        "a.bias": torch.randn(4, generator=generator).to(torch.bfloat16),
        "count": torch.tensor(7),
        "empty": torch.empty(0, 5),
    }


def test_tensors_and_metadata_come_back_as_they_were(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    tensors = _tensors()
    tensors["transposed"] = torch.arange(6.0).reshape(2, 3).t()
    save_weights(path, tensors, METADATA)
    loaded, metadata = load_weights(path)
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor)
        assert loaded[name].is_contiguous()
    assert {key: metadata[key] for key in METADATA} == METADATA
    assert read_metadata(path) == metadata
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]


def test_safetensors_itself_reads_every_type(tmp_path: Path) -> None:
    types = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.bool]
    types += [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8]
    # Odd lengths, so that a wrong offset or a gap would show.
    tensors = {f"{t} ä": torch.arange(3 + 2 * i).to(t) for i, t in enumerate(types)}
    tensors |= {"scalar": torch.tensor(7), "empty": torch.empty(0, 5)}
    save_weights(tmp_path / "w", tensors, METADATA)
    found = load_file(tmp_path / "w")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)
    assert [p.name for p in tmp_path.iterdir()] == ["w"]


def test_a_full_disk_is_told_how_much_is_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    text = r"No space left on device, the file needs 3 MB and \d+ MB are free: '.*/w'$"
    with pytest.raises(OSError, match=text):
        save_weights(tmp_path / "w", {"w": torch.zeros(600_000)}, METADATA)
    assert not list(tmp_path.iterdir())


def test_a_file_has_the_mode_that_the_umask_leaves(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        save_weights(tmp_path / "w", _tensors(), METADATA)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "w").stat().st_mode) == 0o640


@pytest.mark.usefixtures("here")
def test_what_was_loaded_can_be_changed_and_saved(tmp_path: Path) -> None:
    model = AlexNet(3, 0.25, "owt").eval()
    save_weights(tmp_path / "a", model.state_dict(), METADATA)
    tensors, metadata = load_weights(tmp_path / "a")
    tuned = {name: tensor + 1 for name, tensor in tensors.items()}
    for changed, about in (
        (tensors, metadata),
        (tuned, metadata),
        (tensors, {**metadata, "note": "mine"}),
        (tuned, {**metadata, "classes": ["x", "y", "z"]}),
    ):
        save_weights(tmp_path / "b", changed, about)
        loaded, found = load_model(tmp_path / "b")
        assert all(torch.equal(changed[name], t) for name, t in loaded.state_dict().items())
        sums = ("sha256", "metadata_sha256")
        assert {k: v for k, v in found.items() if k not in sums} == {
            k: v for k, v in about.items() if k not in sums
        }
    assert (tmp_path / "b").stat().st_size > 0


@pytest.mark.usefixtures("here")
def test_a_model_comes_back_and_computes_the_same(tmp_path: Path) -> None:
    model = AlexNet(3, 0.25, "owt").eval()
    save_weights(tmp_path / "w", model.state_dict(), METADATA)
    loaded, metadata = load_model(tmp_path / "w")
    assert not loaded.training
    assert metadata["classes"] == METADATA["classes"]
    assert loaded.classifier[1].p == 0.25
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(loaded(images), model(images))


@pytest.mark.parametrize("fails_in", ["write", "fsync", "replace"])
def test_a_failed_save_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails_in: str
) -> None:
    path = tmp_path / "w"
    save_weights(path, _tensors(), {"epoch": 1})
    before = path.read_bytes()

    def half(path: Path, data: bytes) -> None:
        with open(path, "wb") as file:
            file.write(data[:40])
        raise OSError("No space left on device")

    def fail(*_: object) -> None:
        raise OSError("No space left on device")

    if fails_in == "write":
        monkeypatch.setattr(Path, "write_bytes", half)
    else:
        monkeypatch.setattr(f"fastalex.training.weights.os.{fails_in}", fail)
    with pytest.raises(OSError, match="No space left"):
        save_weights(path, _tensors(), {"epoch": 2})
    monkeypatch.undo()
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["w"]


def test_a_writer_killed_at_any_moment_leaves_a_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "w"
    script = (
        "import sys, torch\n"
        "from fastalex.training.weights import save_weights\n"
        "tensors = {'w': torch.ones(2_000_000)}\n"
        "for epoch in range(10**9):\n"
        "    save_weights(sys.argv[1], {'w': tensors['w'] * epoch}, {'epoch': epoch})\n"
    )
    seen: list[int] = []
    for delay in (0.0, 0.021):
        writer = start(["-c", script, str(path)], tmp_path)
        try:
            wait_until(lambda: path.exists() and path.stat().st_mtime_ns not in seen, "written")
            time.sleep(delay)
        finally:
            end(writer)
        assert writer.returncode == -signal.SIGKILL
        tensors, metadata = load_weights(path)
        assert torch.equal(tensors["w"], torch.full((2_000_000,), float(metadata["epoch"])))
        seen.append(path.stat().st_mtime_ns)


def _cut(data: bytes) -> bytes:
    return data[: len(data) // 2]


def _flip_last_bit(data: bytes) -> bytes:
    return data[:-1] + bytes([data[-1] ^ 1])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_cut, "damaged, or not a safetensors file"),
        (_flip_last_bit, "do not match the checksum"),
        (lambda data: b"", "damaged, or not a safetensors file"),
        (lambda data: b"\x89PNG\r\n\x1a\n, say", "damaged, or not a safetensors file"),
    ],
)
def test_a_damaged_file_is_refused_by_name(tmp_path: Path, damage: object, message: str) -> None:
    path = tmp_path / "w"
    save_weights(path, {"w": torch.arange(100.0)}, METADATA)
    path.write_bytes(damage(path.read_bytes()))  # type: ignore[operator]
    with pytest.raises(ValueError, match=message) as caught:
        load_weights(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "header", [None, {"format": "pt"}, {"fastalex": "no json"}, {"fastalex": "[]"}]
)
def test_a_foreign_file_is_refused(tmp_path: Path, header: dict[str, str] | None) -> None:
    save_file(_tensors(), tmp_path / "w", header)
    with pytest.raises(ValueError, match="not weights that fastalex wrote"):
        load_weights(tmp_path / "w")


def test_another_format_of_ours_is_named(tmp_path: Path) -> None:
    header = {"fastalex": json.dumps({"format": "fastalex-weights-9"})}
    save_file(_tensors(), tmp_path / "w", header)
    with pytest.raises(ValueError, match="got 'fastalex-weights-9'"):
        load_weights(tmp_path / "w")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nothing\.safetensors: no such weights file"):
        load_weights(tmp_path / "nothing.safetensors")


def test_weights_of_another_net_are_refused_in_one_line(tmp_path: Path) -> None:
    save_weights(tmp_path / "w", _tensors(), METADATA)
    with pytest.raises(ValueError, match="do not fit its variant") as caught:
        load_model(tmp_path / "w")
    assert "\n" not in str(caught.value)
    save_weights(tmp_path / "w", _tensors(), {"variant": "owt"})
    with pytest.raises(ValueError, match="metadata lack 'num_classes'"):
        load_model(tmp_path / "w")


def test_the_hash_tells_names_shapes_and_dtypes_apart() -> None:
    base = torch.zeros(4)
    nets = [
        {"a": base},
        {"b": base},
        {"a": base.reshape(2, 2)},
        {"a": base.to(torch.int32)},
        {"a": base, "b": torch.zeros(0)},
    ]
    hashes = {weights.weights_hash(net) for net in nets}
    assert len(hashes) == len(nets)
    assert weights.weights_hash({"x": base, "a": base}) == weights.weights_hash(
        {"a": base, "x": base}
    )
