"""The training loop's parts: optimizer, evaluation, losses that are stuck or not finite."""

from __future__ import annotations

import contextlib
import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from fastalex import AlexNet
from fastalex.data import Normalization
from fastalex.data.batches import Batch, Batches, Share, Transform
from fastalex.distributed.context import ParallelContext
from fastalex.distributed.launch import TrainingError
from fastalex.distributed.world import World
from fastalex.training import trainer, validation
from fastalex.training.config import Settings
from fastalex.training.metrics import is_stuck
from fastalex.training.options import parse_arguments
from fastalex.training.prepare import RunConfig
from fastalex.training.run_folder import RunFolder, next_free
from fastalex.training.step import TrainStep
from fastalex.training.validation import Accuracy, evaluate, fetch
from fastalex_kernels.common.backend import chosen
from tests._nets import narrow

PLAIN = Normalization((0.0,) * 3, (1.0,) * 3)
ALONE = World("cpu", processes=1, towers=1, threads=1)


class FewImages:
    """Grey images, each of its own brightness; the net sees its index."""

    def __init__(self, labels: list[int], classes: int) -> None:
        self.classes = [f"class {i}" for i in range(classes)]
        self.labels = np.array(labels, np.int64)

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, index: int) -> str:
        return f"image {index}"

    def image(self, index: int, size: int) -> Any:
        return np.full((size, size, 3), index % 256, np.uint8)


class Lookup(nn.Module):
    """Logits by the brightness of the first pixel."""

    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Identity())
        self.logits = logits

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.logits[images[:, 0, 0, 0].long()]


def _settings(*arguments: str) -> Settings:
    return Settings.choose(parse_arguments(arguments), "cpu")


def _plan(folder: Path, source: FewImages, *arguments: str) -> RunConfig:
    return RunConfig(
        _settings("--image-size", "64", "--variant", "owt", *arguments),
        ALONE,
        folder,
        source.classes,
        Normalization((127.0,) * 3, (64.0,) * 3),
        unreadable=[],
        datasets=(source, source),
    )


@pytest.fixture(scope="module")
def net() -> AlexNet:
    return AlexNet(2, variant=narrow("owt"))


@pytest.fixture
def one_net(net: AlexNet, monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing 57 million weights takes seconds; these tests do not look at them."""
    monkeypatch.setattr(trainer, "build_model", lambda *_: net)


@pytest.mark.parametrize("classes", [2, 5, 9])
def test_accuracies_are_those_of_a_count_by_hand(classes: int) -> None:
    generator = torch.Generator().manual_seed(classes)
    logits = torch.randn(23, classes, generator=generator)
    labels = torch.randint(0, classes, (23,), generator=generator).tolist()
    source = FewImages(labels, classes)
    # 23 images in batches of 5: the last one is short.
    batches = Batches(source, 5, Transform(8, PLAIN), 0, train=False)
    model = Lookup(logits)
    accuracy = evaluate(model, batches, ParallelContext(ALONE))  # type: ignore[arg-type]

    ranks = [sorted(range(classes), key=lambda c: -row[c]) for row in logits.tolist()]
    top1 = sum(rank[0] == label for rank, label in zip(ranks, labels, strict=True)) / 23
    top5 = sum(label in rank[:5] for rank, label in zip(ranks, labels, strict=True)) / 23
    losses = [
        math.log(sum(math.exp(v) for v in row)) - row[label]
        for row, label in zip(logits.tolist(), labels, strict=True)
    ]
    assert accuracy.top1 == pytest.approx(top1)
    assert accuracy.top5 == pytest.approx(top5)
    assert accuracy.loss == pytest.approx(sum(losses) / 23, rel=1e-5)  # float32 logits
    assert model.training


class NoCopies(TorchFunctionMode):
    """Refuses to copy numbers of the host to a device, which would have the host wait."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        of_host = func in (torch.tensor, torch.as_tensor, torch.Tensor.new_tensor) or any(
            isinstance(x, torch.Tensor) and x.device.type == "cpu" for x in args
        )
        if of_host and isinstance(made, torch.Tensor):
            assert made.device.type == "cpu", f"{func}: a copy from the host"
        return made


def test_a_validation_does_not_wait_for_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a device without data what reads a number fails, and so would a copy from the host."""
    meta = torch.device("meta")
    source = FewImages([0, 1, 2] * 4, classes=3)
    batches = Batches(source, 5, Transform(8, PLAIN), 0, train=False)
    parallel = ParallelContext(ALONE)
    parallel.device = meta
    sums = []

    def sum_replicas(values: torch.Tensor) -> torch.Tensor:
        sums.append(values)
        return torch.tensor([24.0, 3.0, 6.0, 12.0])

    monkeypatch.setattr(parallel, "sum_replicas", sum_replicas)
    fetched = [batch.empty(meta) for batch in batches.epoch(0)]
    monkeypatch.setattr("fastalex.training.validation.fetch", lambda *_: fetched)
    monkeypatch.setattr(batches, "augment", lambda images, *_: images.permute(0, 3, 1, 2).float())
    with NoCopies():
        accuracy = evaluate(Lookup(torch.empty(256, 3, device=meta)), batches, parallel)  # type: ignore[arg-type]
    assert accuracy == Accuracy(2.0, 0.25, 0.5)
    assert [x.device for x in sums] == [meta]


class Stream:
    """Stands for a GPU's stream: notes what waits for what."""

    def __init__(self, name: str, events: list[str]) -> None:
        self.name, self.events = name, events

    def wait_stream(self, other: Stream) -> None:
        self.events.append(f"{self.name} waits for {other.name}")

    def wait_event(self, event: str) -> None:
        self.events.append(f"{self.name} waits for {event}")

    def record_event(self) -> str:
        return f"step {sum(event.startswith('step') for event in self.events)}"


@pytest.mark.parametrize("tower", [0, 1])
def test_on_a_gpu_halves_are_gathered_beside_the_step_before(
    monkeypatch: pytest.MonkeyPatch, tower: int
) -> None:
    """In the order of streams: into memory that is free, before the step that reads it."""
    source, transform = FewImages([0, 1] * 7 + [0], classes=2), Transform(8, PLAIN)
    whole = list(Batches(source, 4, transform, 0, train=False).epoch(0))  # the last one is odd
    halves = Batches(source, 4, transform, 0, False, Share(0, 1, tower, 2)).epoch(0)
    events: list[str] = []
    streams = {name: Stream(name, events) for name in ("copy", "main")}
    empty, given = Batch.empty, iter(whole)
    monkeypatch.setattr(Batch, "empty", lambda batch, device: empty(batch, torch.device("cpu")))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: streams["main"])
    monkeypatch.setattr(torch.cuda, "stream", contextlib.nullcontext)
    monkeypatch.setattr(validation, "_copy_stream", lambda device: streams["copy"])

    def gather(images: torch.Tensor) -> None:
        events.append("gather")
        expected, rows = next(given).images, len(images) // 2
        theirs = slice(rows * (1 - tower), rows * (2 - tower))
        images[theirs][: len(expected[theirs])] = expected[theirs]

    places = []
    for expected, batch in zip(whole, fetch(halves, torch.device("cuda"), gather), strict=True):
        events.append(f"step {len(places) + 1}")
        places.append(batch.images.data_ptr())
        for a, b in zip(
            (*expected.inputs, expected.labels), (*batch.inputs, batch.labels), strict=True
        ):
            assert torch.equal(a, b)
        assert batch.indices.tolist() == expected.indices.tolist()
    for number, before in enumerate(("main", "main", "step 1", "main"), 1):
        order = [f"copy waits for {before}", "gather", "main waits for copy", f"step {number}"]
        assert events[4 * number - 4 : 4 * number] == order
    assert places[0] == places[2] != places[1]


@pytest.mark.usefixtures("here")
def test_net_and_seed_name_one_set_of_weights() -> None:
    first, again = (trainer.build_model(_settings("--seed", "3"), 4) for _ in range(2))
    other = trainer.build_model(_settings("--seed", "4"), 4)
    pairs = list(zip(first.parameters(), again.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in pairs)
    assert not torch.equal(first.classifier[6].weight, other.classifier[6].weight)


def _stuck_at(losses: list[float], classes: int = 10) -> int | None:
    """The first step at which the losses count as stuck."""
    steps = range(1, len(losses) + 1)
    return next((step for step in steps if is_stuck(losses[:step], classes)), None)


@pytest.mark.parametrize("classes", [10, 1000])
@pytest.mark.parametrize("noise", [0.0, 0.01, 0.1])
def test_a_loss_at_the_logarithm_of_the_classes_is_stuck(classes: int, noise: float) -> None:
    draw = random.Random(classes)
    losses = [math.log(classes) + draw.gauss(0, noise) for _ in range(300)]
    step = _stuck_at(losses, classes)
    assert step is not None
    assert step >= 60


@pytest.mark.parametrize("seed", range(20))
def test_a_loss_that_falls_is_never_stuck(seed: int) -> None:
    """Down from 4 to 0.1 in 600 steps, through ln(10), with the noise of batches of 64."""
    draw = random.Random(seed)
    losses = [0.1 + 3.9 * math.exp(-step / 150) + draw.gauss(0, 0.1) for step in range(600)]
    assert _stuck_at(losses) is None


def test_a_loss_far_from_the_logarithm_is_never_stuck() -> None:
    assert _stuck_at([1.0] * 500) is None
    assert _stuck_at([5.0] * 500) is None
    assert _stuck_at([0.0] * 500, classes=1) is None


@pytest.mark.usefixtures("one_net")
@pytest.mark.parametrize("read_every", [1, 4, 50])
def test_a_loss_that_is_not_finite_is_blamed_on_its_step_and_samples(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read_every: int
) -> None:
    """However rarely losses are read from the device, the step named is the one that went wrong."""
    source = FewImages([0, 1] * 20, classes=2)
    plan = _plan(tmp_path, source, "--batch-size", "4", "--epochs", "1")
    run = trainer.Trainer(plan)
    run.read_every = read_every
    seen = []

    def step(batch: Any) -> None:
        run.step += 1
        seen.append(batch.indices.tolist())
        loss = torch.tensor(math.nan if run.step >= 6 else 1.0)
        run.unread.append((loss, batch.indices))

    monkeypatch.setattr(run, "_train_step", step)
    with pytest.raises(TrainingError) as caught:
        run.run()
    run.close()
    names = ", ".join(source.name(i) for i in seen[5][:3])
    assert f"loss is nan at step 6 (epoch 1), on {names} and 1 more" in str(caught.value)
    assert not RunFolder(tmp_path).weights.exists()


@pytest.mark.usefixtures("one_net")
def test_a_validation_loss_that_is_not_finite_keeps_the_last_good_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = FewImages([0, 1, 0, 1], classes=2)
    plan = _plan(tmp_path, source, "--batch-size", "4", "--epochs", "3")
    run = trainer.Trainer(plan)
    results = iter([Accuracy(1.0, 0.5, 1.0), Accuracy(math.inf, 0.5, 1.0)])
    monkeypatch.setattr(trainer, "evaluate", lambda *_: next(results))
    with pytest.raises(TrainingError, match=r"validation loss is inf after step 2 \(epoch 2\)"):
        run.run()
    run.close()
    assert "of epoch 1" in RunFolder(tmp_path).kept()
    kinds = [json.loads(line)["kind"] for line in (tmp_path / "metrics.jsonl").open()]
    assert kinds.count("epoch") == 1


@pytest.mark.usefixtures("one_net")
@pytest.mark.parametrize("wrong", [True, False])
def test_kernels_that_a_step_does_without_validate_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong: bool
) -> None:
    chosen_by: list[str] = []
    monkeypatch.setattr(trainer.TrainStep, "uses_aten", wrong)
    monkeypatch.setattr(
        trainer, "evaluate", lambda *_: chosen_by.append(chosen()) or Accuracy(1.0, 0.5, 1.0)
    )
    options = ("--batch-size", "4", "--epochs", "1", "--fused-update")
    run = trainer.Trainer(_plan(tmp_path, FewImages([0, 1, 0, 1], classes=2), *options))
    run.run()
    run.close()
    assert chosen_by == ["aten" if wrong else "auto"]


@pytest.mark.usefixtures("one_net")
def test_on_a_gpu_the_kernels_of_the_run_are_compiled_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(trainer, "compile_first", lambda *given: asked.append(given))
    options = ("--batch-size", "4", "--epochs", "1", "--fused-update")
    run = trainer.Trainer(_plan(tmp_path, FewImages([0, 1, 0], classes=2), *options))
    assert asked == []  # nothing of it on a CPU
    step = run.train_step
    assert isinstance(step, TrainStep)
    run._compile_kernels(step)
    run.close()
    assert [given[:3] for given in asked] == [(step, "crop", [4, 3])]


@pytest.mark.usefixtures("one_net")
def test_a_stuck_run_is_warned_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = FewImages([0, 1] * 200, classes=2)
    arguments = ("--batch-size", "2", "--epochs", "1", "--init", "published")
    run = trainer.Trainer(_plan(tmp_path, source, *arguments))

    def step(batch: Any) -> None:
        run.step += 1
        run.unread.append((torch.tensor(math.log(2)), batch.indices))

    monkeypatch.setattr(run, "_train_step", step)
    monkeypatch.setattr(trainer, "evaluate", lambda *_: Accuracy(math.log(2), 0.5, 1.0))
    run.run()
    run.close()
    warnings = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert len(warnings) == 1
    assert "ln(2) = 0.693" in warnings[0]
    assert "--init he" in warnings[0]


def test_output_folders_are_numbered_and_never_shared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "paper-3-007").mkdir(parents=True)
    (tmp_path / "runs" / "paper-33-100").mkdir()
    paths = [RunFolder.claim(next_free("paper", 3)).path for _ in range(2)]
    assert [str(path) for path in paths] == ["runs/paper-3-008", "runs/paper-3-009"]
    assert str(next_free("owt", 3)) == "runs/owt-3-001"


def test_only_a_new_or_empty_folder_is_taken_and_given_back_as_it_was(tmp_path: Path) -> None:
    for place in (tmp_path / "new" / "er", tmp_path):
        folder = RunFolder.claim(place)
        assert folder.metrics.exists()
        folder.release()
        assert not list(tmp_path.iterdir())
    (tmp_path / "file").write_text("x")
    for place, message in (
        (tmp_path, r"is not empty \(file\)"),
        (tmp_path / "file", "not a folder"),
        (tmp_path / "file" / "below", "nothing can be written there: Not a directory"),
        (Path("/proc/x/y"), "--output /proc/x/y: nothing can be written there: No such file"),
    ):
        with pytest.raises(ValueError, match=message):
            RunFolder.claim(place)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_what_a_process_killed_before_its_run_started_left_is_no_run(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").touch()
    (tmp_path / ".run.json.123.tmp").write_text("{")
    folder = RunFolder.claim(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]
    folder.release()


def test_who_loses_a_race_for_a_new_folder_leaves_it_to_the_winner(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastalex.training.metrics._LOCK_SECONDS", 0.0)
    winners: list[RunFolder] = []
    real = RunFolder._make

    def make(self: RunFolder) -> None:
        real(self)
        if not winners:  # another process comes between making the folder and locking it
            winners.append(self)
            winners[0] = RunFolder.claim(tmp_path / "run")

    monkeypatch.setattr(RunFolder, "_make", make)
    monkeypatch.setattr(Path, "exists", lambda path: path == tmp_path)  # as it was before
    with pytest.raises(ValueError, match="another process trains in this folder"):
        RunFolder.claim(tmp_path / "run")
    monkeypatch.undo()
    monkeypatch.setattr("fastalex.training.metrics._LOCK_SECONDS", 0.0)
    assert winners[0].metrics.exists()
    with pytest.raises(ValueError, match="another process trains in this folder"):
        RunFolder.claim(tmp_path / "run")
    winners[0].release()
