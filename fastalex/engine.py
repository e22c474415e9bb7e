"""The training loop, the same in every process: one net alone, two towers, or replicas."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from fastalex._version import __version__
from fastalex.checkpoint import save_weights
from fastalex.config import Settings
from fastalex.data import Batch, Batches, DataError, ImageSource, Normalization, open_sources
from fastalex.launch import TrainingError, World
from fastalex.model import AlexNet
from fastalex.nvtx_ranges import annotate_layers, nvtx_range
from fastalex.optim import build_optimizer, learning_rate, set_learning_rate
from fastalex.progress import Progress, StuckLoss
from fastalex.run_folder import MetricsLog, RunFolder
from fastalex.team import Team

TOP = 5  # the wider of the two accuracies
_NAMED = 3  # samples of a bad batch that the message names

STUCK = (
    "warning: the loss stays at ln({classes}) = {level:.3f}, as if every class were as likely as "
    "any other; try {advice}"
)


@dataclass(frozen=True)
class Plan:
    """Everything a process needs to know, decided once before processes start.

    Attributes:
        settings: with every default filled in.
        world: the processes and how they share the work.
        folder: the run's, which exists.
        classes: names of the classes, by label.
        normalization: measured on the training images.
        unreadable: files of ``settings.data`` that every process leaves out, with reasons.
        sources: the images to train on and to validate, where they are already open.
    """

    settings: Settings
    world: World
    folder: Path
    classes: list[str]
    normalization: Normalization
    unreadable: list[tuple[str, str]]
    sources: tuple[ImageSource, ImageSource] | None = None


@dataclass(frozen=True)
class Accuracy:
    """Of a net on a set of images: mean loss, and shares of images from 0 to 1."""

    loss: float
    top1: float
    top5: float


@torch.no_grad()
def evaluate(model: AlexNet, batches: Batches, team: Team) -> Accuracy:
    """Loss, top-1 and top-5 over all of ``batches``; every process takes part.

    With fewer than five classes top-5 counts a label among all of them, and is 1.
    """
    model.eval()
    sums = torch.zeros(4, dtype=torch.float64, device=team.device)
    for batch in _fetch(batches.epoch(0)):
        if len(batch.labels) == 0:  # a short last batch may leave a replica without images
            continue
        labels = batch.labels.to(team.device)
        logits = model(batch.images.to(team.device)).float()
        ranked = logits.topk(min(TOP, logits.shape[1])).indices == labels[:, None]
        loss = F.cross_entropy(logits, labels, reduction="sum")
        counts = (loss, ranked[:, 0].sum(), ranked.sum(), logits.new_tensor(len(labels)))
        sums += torch.stack([value.double() for value in counts])
    loss_sum, top1, top5, images = team.total(sums).tolist()
    model.train()
    return Accuracy(loss_sum / images, top1 / images, top5 / images)


def train(plan: Plan) -> None:
    """Run ``plan`` in this process, which is a member of its world.

    Raises:
        TrainingError: where the run can't go on: the loss is not finite, data are gone, the disk
            is full, memory runs out.
    """
    try:
        trainer = Trainer(plan)
        try:
            trainer.run()
        finally:
            trainer.close()
    except torch.OutOfMemoryError as error:
        size = plan.settings.batch_size
        raise TrainingError(f"out of GPU memory at --batch-size {size}, try half") from error
    except DataError as error:
        raise TrainingError(str(error)) from error
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        raise TrainingError(f"{where}{error.strerror or error}") from error


class Trainer:
    """One run of a plan; ``run`` goes through its epochs."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.settings = settings = plan.settings
        self.team = team = Team(plan.world)
        train_source, val_source = plan.sources or open_sources(
            settings.data, settings.seed, settings.image_size, plan.unreadable, quiet=True
        )
        self.source = train_source
        self.train_batches = self._batches(train_source, train=True)
        self.val_batches = self._batches(val_source, train=False)
        self.model = team.share(
            build_model(settings, len(plan.classes)).to(team.device),
            rows=self.train_batches.batch_size // team.replicas,
        )
        annotate_layers(self.model)
        self.optimizer = build_optimizer(
            self.model, settings.lr, settings.momentum, settings.weight_decay
        )
        self.folder = RunFolder(plan.folder)
        self.metrics = MetricsLog(self.folder.metrics) if team.leads else None
        self.steps = settings.epochs * len(self.train_batches)
        self.epochs = settings.epochs
        if settings.max_steps is not None:
            self.steps = min(self.steps, settings.max_steps)
            self.epochs = -(-self.steps // len(self.train_batches))
        self.progress = Progress(self.steps, self.epochs, visible=team.leads)
        self.step = 0
        self.meter = Meter(settings.log_every)
        self.stuck: StuckLoss | None = StuckLoss(len(plan.classes))
        # Losses not yet read from the device. Reading waits for it: on a GPU that is done once
        # per record, on a CPU it costs nothing.
        self.unread: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.read_every = settings.log_every if team.device.type == "cuda" else 1

    def _batches(self, source: ImageSource, train: bool) -> Batches:
        settings = self.settings
        return Batches(
            source,
            settings.batch_size,
            settings.image_size,
            self.plan.normalization,
            settings.seed,
            train,
            rank=self.team.replica,
            replicas=self.team.replicas,
            workers=settings.workers,
            augmentation=settings.augmentation,
        )

    def run(self) -> None:
        for epoch in range(1, self.epochs + 1):
            started = time.monotonic()
            loss = self._train_epoch(epoch)
            self.progress.validating(epoch)
            accuracy = evaluate(self.model, self.val_batches, self.team)
            if not math.isfinite(accuracy.loss):
                raise TrainingError(
                    f"the validation loss is {accuracy.loss} after step {self.step} "
                    f"(epoch {epoch}); try a lower --lr than {self.settings.lr}"
                )
            self._save(epoch, accuracy)
            self._report_epoch(epoch, loss, accuracy, time.monotonic() - started)

    def close(self) -> None:
        self.progress.close()
        if self.metrics is not None:
            self.metrics.close()

    def _train_epoch(self, epoch: int) -> float:
        """One pass over the training images; returns their mean loss."""
        losses: list[float] = []
        self.meter.start()
        for batch in _fetch(self.train_batches.epoch(epoch - 1)):
            self._train_step(batch)
            last = self.step == self.steps
            if self.step % self.read_every == 0 or last:
                losses += self._read_losses(epoch)
            if self.step % self.settings.log_every == 0 or last:
                self._report_steps(epoch)
            self.progress.advance(self.step, epoch, self.meter.loss, self.meter.rate)
            if last:
                break
        losses += self._read_losses(epoch)
        return math.fsum(losses) / len(losses)

    def _train_step(self, batch: Batch) -> None:
        self.step += 1
        device = self.team.device
        images, labels = batch.images.to(device), batch.labels.to(device)
        settings = self.settings
        lr = learning_rate(settings.lr, self.step, self.steps, settings.lr_drop)
        set_learning_rate(self.optimizer, lr)
        self.model.seed_dropout(settings.seed, self.step)
        loss = F.cross_entropy(self.model(images), labels)
        self.optimizer.zero_grad()
        with nvtx_range("backward"):
            loss.backward()  # type: ignore[no-untyped-call]
        self.team.reduce_gradients(self.model)
        with nvtx_range("optimizer"):
            self.optimizer.step()
        self.unread.append((loss.detach(), batch.indices))

    def _read_losses(self, epoch: int) -> list[float]:
        """The losses of the steps since the last reading, over all replicas.

        Raises:
            TrainingError: where one is not finite, naming its step and samples.
        """
        if not self.unread:
            return []
        values = torch.stack([loss for loss, _ in self.unread]) / self.team.replicas
        losses: list[float] = self.team.total(values).tolist()
        first = self.step - len(losses) + 1
        for i, loss in enumerate(losses):
            if not math.isfinite(loss):
                indices = self.team.gather(self.unread[i][1].tolist())
                raise TrainingError(self._not_finite(loss, first + i, epoch, indices))
            self.meter.add(loss, self.settings.batch_size)
            self._watch(loss)
        self.unread.clear()
        return losses

    def _not_finite(self, loss: float, step: int, epoch: int, indices: list[int]) -> str:
        names = ", ".join(self.source.name(i) for i in indices[:_NAMED])
        more = len(indices) - _NAMED
        return (
            f"the loss is {loss} at step {step} (epoch {epoch}), on {names}"
            + (f" and {more} more samples" if more > 0 else "")
            + f"; try a lower --lr than {self.settings.lr}"
        )

    def _watch(self, loss: float) -> None:
        """Warn once where the net learns nothing."""
        if self.stuck is None or not self.stuck.add(loss):
            return
        advice = "a larger --lr, a larger --batch-size or --dropout 0"
        if self.settings.init != "he":
            advice = f"--init he, {advice}"
        text = STUCK.format(classes=len(self.plan.classes), level=self.stuck.level, advice=advice)
        self.progress.warn(f"{text} (step {self.step})")
        self.stuck = None

    def _report_steps(self, epoch: int) -> None:
        record = {
            "kind": "step",
            "step": self.step,
            "epoch": epoch,
            "lr": self.optimizer.param_groups[0]["lr"],
            **self.meter.record(),
        }
        if self.metrics is not None:
            self.metrics.append(record)

    def _report_epoch(self, epoch: int, loss: float, accuracy: Accuracy, seconds: float) -> None:
        self.progress.say(
            f"epoch {epoch}/{self.epochs}: loss {loss:.4f}, validation loss {accuracy.loss:.4f}, "
            f"top-1 {accuracy.top1:.1%}, top-{TOP} {accuracy.top5:.1%}, {seconds:.0f} s"
        )
        record = {
            "kind": "epoch",
            "step": self.step,
            "epoch": epoch,
            "loss": loss,
            "val_loss": accuracy.loss,
            "top1": accuracy.top1,
            "top5": accuracy.top5,
            "seconds": seconds,
        }
        if self.metrics is not None:
            self.metrics.append(record, sync=True)

    def _save(self, epoch: int, accuracy: Accuracy) -> None:
        weights = self.team.weights(self.model)
        if not self.team.leads:
            return
        settings = self.settings
        metadata = {
            "version": __version__,
            "variant": settings.variant,
            "num_classes": len(self.plan.classes),
            "classes": self.plan.classes,
            "image_size": settings.image_size,
            "normalization": self.plan.normalization.to_dict(),
            "dropout": settings.dropout,
            "init": settings.init,
            "seed": settings.seed,
            "epoch": epoch,
            "step": self.step,
            "top1": accuracy.top1,
            "top5": accuracy.top5,
        }
        save_weights(self.folder.weights, weights, metadata)


class Meter:
    """Mean loss of the last ``window`` steps, and images/s since the last record."""

    def __init__(self, window: int) -> None:
        self._losses: deque[float] = deque(maxlen=window)
        self._images = 0
        self._since = time.monotonic()
        self._last_rate: float | None = None

    def start(self) -> None:
        """Forget the time since the last record, which was not training's."""
        self._images, self._since = 0, time.monotonic()

    def add(self, loss: float, images: int) -> None:
        self._losses.append(loss)
        self._images += images

    @property
    def loss(self) -> float | None:
        return math.fsum(self._losses) / len(self._losses) if self._losses else None

    @property
    def rate(self) -> float | None:
        """As of the last record, which is steadier than since then."""
        return self._last_rate or self._rate()

    def record(self) -> dict[str, float | None]:
        """Loss and images/s for a record; the time of the next one begins."""
        self._last_rate = self._rate()
        self.start()
        return {"loss": self.loss, "images_per_s": self._last_rate}

    def _rate(self) -> float | None:
        return self._images / (time.monotonic() - self._since) if self._images else None


def build_model(settings: Settings, classes: int) -> AlexNet:
    """The net of ``settings`` before its first step, the same in every process."""
    model = AlexNet(classes, settings.dropout, settings.variant)
    generator = torch.Generator().manual_seed(settings.seed)
    model.init_parameters(settings.init, generator)
    return model


def _fetch(batches: Iterator[Batch]) -> Iterator[Batch]:
    """The same batches, with the wait for each shown on a profiler's time line."""
    while True:
        with nvtx_range("data"):
            batch = next(batches, None)
        if batch is None:
            return
        yield batch
