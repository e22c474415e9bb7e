"""The training loop, the same in every process: one net alone, two towers, or replicas."""

from __future__ import annotations

import contextlib
import math
import time
from typing import Any

import torch

from fastalex._version import __version__
from fastalex.common import interrupts
from fastalex.common.interrupts import Interrupted
from fastalex.common.provenance import versions
from fastalex.data import DataError, ImageDataset
from fastalex.data.batches import Batch, Batches, Share, Transform
from fastalex.data.datasets import color_noise
from fastalex.distributed import towers
from fastalex.distributed.context import ParallelContext
from fastalex.distributed.launch import TrainingError
from fastalex.distributed.watchdog import Watchdog
from fastalex.model.alexnet import AlexNet
from fastalex.training import checkpoints, fine_tuning
from fastalex.training.autograd_step import AutogradStep, LossScaler, autocast, tf32
from fastalex.training.config import Settings
from fastalex.training.metrics import MetricsLog, RunningMetrics, TensorBoard, is_stuck
from fastalex.training.optim import (
    BUFFERS,
    build_optimizer,
    momentum_buffers,
    set_learning_rate,
    set_momentum_buffers,
)
from fastalex.training.precompile import compile_first
from fastalex.training.prepare import RunConfig
from fastalex.training.progress import Progress
from fastalex.training.run_folder import RunFolder
from fastalex.training.schedule import Schedule
from fastalex.training.step import TrainStep, Tricks
from fastalex.training.validation import TOP, Accuracy, evaluate, fetch
from fastalex.training.weights import save_weights
from fastalex_kernels.common.backend import backend

_NAMED = 3  # samples of a bad batch that the message names
# The attributes of a trainer that a checkpoint keeps.
_KEPT = ("step", "epoch", "batch", "losses", "epoch_seconds", "best", "warned")

STUCK = (
    "warning: the loss stays at ln({classes}) = {level:.3f}, as if every class were as likely as "
    "any other; try {advice}"
)


def train(config: RunConfig, watchdog: Watchdog | None = None) -> None:
    """Run ``config`` in this process, which is a member of its world."""
    try:
        with tf32(config.settings.precision):
            trainer = Trainer(config, watchdog)
            try:
                trainer.run()
            except BaseException:
                with contextlib.suppress(OSError):  # the error above is the one to know
                    trainer.close()
                raise
            trainer.close()
    except torch.OutOfMemoryError as error:
        size = config.settings.batch_size
        raise TrainingError(f"out of GPU memory at --batch-size {size}, try half") from error
    except DataError as error:
        raise TrainingError(str(error)) from error
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        raise TrainingError(f"{where}{error.strerror or error}") from error


class Trainer:
    """One run; ``run`` goes through its epochs, from the first or where it was stopped."""

    step = 0  # done
    epoch = 1  # that is being trained
    batch = 0  # batches done of it
    epoch_seconds = 0.0  # that an earlier run spent on it
    best: dict[str, float] | None = None  # epoch and top-1 of the best weights
    warned = False  # that the loss is stuck

    def __init__(self, config: RunConfig, watchdog: Watchdog | None = None) -> None:
        self.config, self.settings = config, config.settings
        settings, state = config.settings, config.state
        self.parallel = parallel = ParallelContext(config.world, watchdog)
        if watchdog is not None:
            watchdog.limit(settings.timeout)
        self.dataset, val_dataset = config.datasets
        self.train_batches = self._batches(self.dataset, train=True)
        self.val_batches = self._batches(val_dataset, train=False)
        self.steps = checkpoints.last_step(settings, len(self.train_batches), state)
        self.schedule = Schedule(settings, self.steps)
        self.scaler = LossScaler(parallel, enabled=settings.precision == "fp16")
        self.folder = RunFolder(config.folder)
        self._build()
        self.losses: list[float] = []  # of this epoch's steps
        vars(self).update({name: state[name] for name in _KEPT if name in state})
        self.batch = min(self.batch, len(self.train_batches))  # there may be fewer images now
        self.recent = RunningMetrics(
            settings.log_every, parallel.stopwatch, state.get("window", ())
        )
        if state:
            self.schedule.restore(state["schedule"])
            self.scaler.load_state_dict(state["scaler"])
        left = self.batch + self.steps - self.step
        self.epochs = self.epoch - 1 + -(-left // len(self.train_batches))
        self.saved = time.monotonic()  # when the last checkpoint was written
        self.progress = Progress(self.steps, self.epochs, visible=parallel.is_main, done=self.step)
        self.train_step = self._make_step()
        # Losses not yet read from the device. Reading waits for it: on a GPU that is done once
        # per record, on a CPU it costs nothing.
        self.unread: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.read_every = settings.log_every if parallel.device.type == "cuda" else 1
        self.metrics: MetricsLog | None = None
        self.tensorboard: TensorBoard | None = None
        if parallel.is_main:
            self.metrics = MetricsLog(self.folder.metrics, state.get("metrics_bytes", 0))
            if self.metrics.missing:
                line = f"{self.folder.metrics}: records before the checkpoint are missing"
                self.progress.warn(f"warning: {line}")
            if settings.tensorboard:
                self.tensorboard = TensorBoard(self.folder.tensorboard, self.step)

    def _build(self) -> None:
        """The net and its optimizer, anew or as the checkpoint has them."""
        settings, parallel, config = self.settings, self.parallel, self.config
        model, buffers = build_model(settings, len(config.classes)), None
        if config.checkpoint is not None:
            weights, buffers = checkpoints.tensors(config.checkpoint)
            model.load_state_dict(weights)
        elif settings.init_from is not None:
            fine_tuning.begin_with(model, settings.init_from, config.classes)
        self.model = parallel.parallelize(
            model.to(parallel.device), rows=self.train_batches.batch_size // parallel.replicas
        )
        fine_tuning.freeze(self.model, settings.freeze)  # a tower has parameters of its own
        self.optimizer = build_optimizer(
            self.model,
            settings.lr,
            settings.momentum,
            settings.weight_decay,
            settings.momentum_rule,
            settings.bias_lr,
            settings.bias_decay,
            settings.bias_schedule,
            BUFFERS[settings.momentum_dtype],
            settings.seed,
            config.state.get("step", 0),
        )
        if buffers is not None:
            parts = towers.local_tensors(self.model, parallel.mesh, buffers)
            set_momentum_buffers(self.model, self.optimizer, parts)

    def _batches(self, dataset: ImageDataset, train: bool) -> Batches:
        settings, parallel = self.settings, self.parallel
        return Batches(
            dataset,
            settings.batch_size,
            Transform(
                settings.image_size,
                self.config.normalization,
                settings.augmentation,
                color_noise(dataset, settings.color_noise),
                parallel.device,
            ),
            settings.seed,
            train,
            Share(parallel.replica, parallel.replicas, parallel.tower, parallel.towers),
            settings.workers,
        )

    def _make_step(self) -> TrainStep | AutogradStep:
        """The step without autograd, where it was asked for and can run this net."""
        settings, parallel, augment = self.settings, self.parallel, self.train_batches.augment
        if settings.fused_update:
            alone = parallel.replicas == 1  # else a gradient is not whole when it is made
            tricks = Tricks(fused_update=alone, graph=settings.cuda_graph)
            try:
                step = TrainStep(
                    self.model,
                    self.optimizer,
                    settings.precision.replace("tf32", "float32"),
                    augment=augment,
                    tricks=tricks,
                    reduce=None if alone else lambda: parallel.reduce_gradients(self.model),
                    tell=self.progress.warn,
                )
            except ValueError as error:
                self.progress.warn(f"autograd and the optimizer make each step: {error}")
            else:
                if parallel.device.type == "cuda":
                    self._compile_kernels(step)
                return step
        return AutogradStep(
            self.model, self.optimizer, settings.precision, augment, parallel, self.scaler
        )

    def _compile_kernels(self, step: TrainStep) -> None:
        """Compile what the run launches, before its first step and for all processes at once."""
        settings, parallel = self.settings, self.parallel
        last = len(self.val_batches.dataset) % settings.batch_size
        counts = [n // parallel.replicas for n in (settings.batch_size, last)]
        say = self.progress.say if parallel.is_main else print  # whichever comes first compiles
        compile_first(step, settings.augmentation, [n for n in counts if n], say)

    def run(self) -> None:
        keep = self.settings.keep_checkpoints
        for epoch in range(self.epoch, self.epochs + 1):
            self.epoch = epoch
            self.started = time.monotonic() - self.epoch_seconds
            signum, late = self._agree()
            if (signum or late) and not keep:  # else what was done is in a checkpoint
                self._checkpoint()
            if signum:
                raise Interrupted(signum)
            if self.step < self.steps:  # else only the validation is left
                self._train_epoch()
            self.progress.validating(epoch)
            with autocast(self.settings.precision, self.parallel.device):
                # Kernels that are wrong here must not choose the best weights.
                aten = isinstance(self.train_step, TrainStep) and self.train_step.uses_aten
                with backend("aten") if aten else contextlib.nullcontext():
                    accuracy = evaluate(
                        self.model, self.val_batches, self.parallel, self._save_or_stop
                    )
            if not math.isfinite(accuracy.loss):
                raise TrainingError(
                    f"the validation loss is {accuracy.loss} after step {self.step} "
                    f"(epoch {epoch}); try a lower --lr than {self.settings.lr}",
                    everywhere=True,
                )
            if self.schedule.validated(1 - accuracy.top1):
                self.progress.say("the validation error stopped falling, the learning rate drops")
            self._save(accuracy)
            self._report_epoch(accuracy)
            self.epoch, self.batch, self.losses, self.epoch_seconds = epoch + 1, 0, [], 0.0
            if keep:
                self._checkpoint()

    def close(self) -> None:
        del self.train_step  # a graph's memory goes with it
        self.progress.close()
        for log in (self.metrics, self.tensorboard):
            if log is not None:
                log.close()

    def _train_epoch(self) -> None:
        """The rest of a pass over the training images."""
        self.recent.start()
        loaded = self.train_batches.epoch(self.epoch - 1, self.batch)
        place, gather = self.parallel.device, self.parallel.gather_rows
        with contextlib.closing(loaded):
            for batch in fetch(loaded, place, gather, self.recent.waiting):
                self._train_step(batch)
                self.batch += 1
                last = self.step == self.steps
                if self.step % self.read_every == 0 or last:
                    self._read_losses()
                if last or self.step % self.settings.log_every == 0:
                    self._report_steps()
                self.progress.advance(self.step, self.epoch, self.recent.loss, self.recent.rate)
                if last:
                    break
                if self.batch < len(self.train_batches):  # at the end of an epoch, validation does
                    self._save_or_stop(self.step, self.settings.checkpoint_every)
        self._read_losses()

    def _save_or_stop(self, number: int, every: int | None = None) -> None:
        """Write a checkpoint if it is time, and end the run if a signal asked for it.

        Args:
            number: of the step, or of the batch of the validation.
            every: steps between checkpoints that were asked for.
        """
        self.parallel.progress(self.step)
        signum, late = self._agree() if number % self.read_every == 0 else (0, 0)
        if signum or late or (every is not None and number % every == 0):
            self._read_losses()
            self.epoch_seconds = time.monotonic() - self.started
            with self.recent.paused():
                self._checkpoint()
        if signum:
            raise Interrupted(signum)

    def _agree(self) -> tuple[int, int]:
        """The signal that asked for the end, or 0, and whether a checkpoint is due by the clock.

        All processes ask together and get the same answer, where losses are read: that waits for
        the device anyway.
        """
        age = time.monotonic() - self.saved
        late = self.parallel.is_main and age > 60 * self.settings.checkpoint_minutes
        flags = torch.tensor([interrupts.requested() or 0, int(late)], device=self.parallel.device)
        self.parallel.all_reduce_max(flags)
        signum, due = flags.tolist()
        return signum, due

    def _train_step(self, batch: Batch) -> None:
        self.step += 1
        self.parallel.progress(self.step)
        set_learning_rate(self.optimizer, self.schedule.rate(self.step))
        self.model.seed_dropout(self.settings.seed, self.step)
        loss = self.train_step(batch.inputs, batch.labels)
        self.unread.append((loss, batch.indices))

    def _read_losses(self) -> None:
        """Take in the losses of the steps since the last reading, over all replicas."""
        if not self.unread:
            return
        values = torch.stack([loss for loss, _ in self.unread]) / self.parallel.replicas
        losses: list[float] = self.parallel.sum_replicas(values).tolist()
        first = self.step - len(losses) + 1
        for i, loss in enumerate(losses):
            if not math.isfinite(loss):
                indices = self.parallel.gather_replicas(self.unread[i][1].tolist())
                raise TrainingError(self._not_finite(loss, first + i, indices), everywhere=True)
            self.recent.add(loss, self.settings.batch_size)
            self._watch()
        self.unread.clear()
        self.losses += losses

    def _not_finite(self, loss: float, step: int, indices: list[int]) -> str:
        names = ", ".join(self.dataset.name(i) for i in indices[:_NAMED])
        more = len(indices) - _NAMED
        return (
            f"the loss is {loss} at step {step} (epoch {self.epoch}), on {names}"
            + (f" and {more} more samples" if more > 0 else "")
            + f"; try a lower --lr than {self.settings.lr}"
        )

    def _watch(self) -> None:
        """Warn once where the net learns nothing."""
        classes = len(self.config.classes)
        if self.warned or not is_stuck(list(self.recent.losses), classes):
            return
        advice = "a larger --lr, a larger --batch-size or --dropout 0"
        if self.settings.init != "he":
            advice = f"--init he, {advice}"
        text = STUCK.format(classes=classes, level=math.log(classes), advice=advice)
        self.progress.warn(f"{text} (step {self.step})")
        self.warned = True

    def _report_steps(self) -> None:
        norms = self.train_step.gradient_norms()
        norm = towers.gradient_norm(norms, self.model, self.parallel.mesh).item()
        record = {
            "kind": "step",
            "step": self.step,
            "epoch": self.epoch,
            "lr": self.optimizer.param_groups[0]["lr"],
            **self.recent.record(),
            # A step that float16 could not hold is left out, and its gradient has no norm.
            "grad_norm": norm if math.isfinite(norm) else None,
        }
        if self.scaler.is_enabled():
            record["loss_scale"] = self.scaler.get_scale()
        self._log(record)

    def _report_epoch(self, accuracy: Accuracy) -> None:
        loss = math.fsum(self.losses) / len(self.losses)
        seconds = time.monotonic() - self.started
        self.progress.say(
            f"epoch {self.epoch}/{self.epochs}: loss {loss:.4f}, validation loss "
            f"{accuracy.loss:.4f}, top-1 {accuracy.top1:.1%}, top-{TOP} {accuracy.top5:.1%}, "
            f"{seconds:.0f} s"
        )
        record = {
            "kind": "epoch",
            "step": self.step,
            "epoch": self.epoch,
            "loss": loss,
            "val_loss": accuracy.loss,
            "top1": accuracy.top1,
            "top5": accuracy.top5,
            "seconds": seconds,
        }
        self._log(record, sync=True)

    def _log(self, record: dict[str, Any], sync: bool = False) -> None:
        if self.metrics is not None:
            self.metrics.append(record, sync)
        if self.tensorboard is not None:
            self.tensorboard.add(record)

    def _checkpoint(self) -> None:
        """Write what the next step depends on; every process takes part."""
        self.saved = time.monotonic()
        self.parallel.progress(self.step, "writing a checkpoint")
        weights = self._whole(self.model.state_dict())
        buffers = self._whole(momentum_buffers(self.model, self.optimizer))
        if self.metrics is not None:
            self.metrics.sync()  # a checkpoint counts on the records before it
            keep = max(1, self.settings.keep_checkpoints)
            checkpoints.save(self.folder, weights, buffers, self._state(self.metrics), keep)
        self.parallel.progress(self.step)

    def _whole(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Those of the whole net; every process takes part."""
        whole = towers.full_tensors(self.model, self.parallel.mesh, tensors)
        if not self.parallel.copies_agree(whole):
            raise TrainingError(
                f"the processes' copies of the net differ after step {self.step}: their GPUs or "
                "software round differently; run all on one model of GPU with the same versions, "
                "or use one process",
                everywhere=True,
            )
        return whole

    def _state(self, metrics: MetricsLog) -> dict[str, Any]:
        """What a checkpoint holds besides tensors; JSON, which keeps every bit of a float."""
        config = self.config
        return {
            **{name: getattr(self, name) for name in _KEPT},
            "window": list(self.recent.losses),
            "schedule": self.schedule.state(),
            "scaler": self.scaler.state_dict(),
            "metrics_bytes": metrics.length,
            "steps": self.steps,
            "settings": self.settings.to_dict(),
            "world": vars(config.world),
            "versions": versions(),
            "classes": config.classes,
            "images": [len(self.dataset), len(self.val_batches.dataset)],
            "contents": config.images,
            "normalization": config.normalization.to_dict(),
            "unreadable": [path for path, _ in config.unreadable],
        }

    def _save(self, accuracy: Accuracy) -> None:
        """Write the weights, which may be the best so far; every process takes part."""
        best = self.best is None or accuracy.top1 > self.best["top1"]
        if best:
            self.best = {"epoch": self.epoch, "top1": accuracy.top1}
        self.parallel.progress(self.step, "writing the weights")
        weights = self._whole(self.model.state_dict())
        if not self.parallel.is_main:
            return
        normalization, about = self.config.normalization, vars(self.settings)
        metadata = {
            "version": __version__,
            "num_classes": len(self.config.classes),
            "classes": self.config.classes,
            "normalization": normalization.to_dict(),
            **{name: about[name] for name in ("variant", "image_size", "dropout", "precision")},
            **{name: about[name] for name in ("init", "seed")},
            "epoch": self.epoch,
            "step": self.step,
            "top1": accuracy.top1,
            "top5": accuracy.top5,
        }
        save_weights(self.folder.weights, weights, metadata, normalization.mean_image)
        if best:
            self.folder.keep_best()


def build_model(settings: Settings, classes: int) -> AlexNet:
    """The net of ``settings`` before its first step, the same in every process."""
    model = AlexNet(classes, settings.dropout, settings.variant)
    generator = torch.Generator().manual_seed(settings.seed)
    model.init_parameters(settings.init, generator)
    return model
