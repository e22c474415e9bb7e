"""The training loop, the same in every process: one net alone, two towers, or replicas."""

from __future__ import annotations

import contextlib
import math
import time
from typing import Any

import torch

from fastalex._version import __version__
from fastalex.common import interrupts
from fastalex.common.command_line import output_may_fail
from fastalex.common.interrupts import Interrupted
from fastalex.common.provenance import versions
from fastalex.data import DataError, ImageDataset
from fastalex.data.batches import Batch, Batches, Share, Transform
from fastalex.data.datasets import color_noise, open_datasets
from fastalex.distributed import towers
from fastalex.distributed.context import ParallelContext
from fastalex.distributed.launch import TrainingError
from fastalex.model.alexnet import AlexNet
from fastalex.training import checkpoints, fine_tuning
from fastalex.training.autograd_step import AutogradStep, LossScaler, autocast, tf32
from fastalex.training.checkpoints import ResumeState
from fastalex.training.config import Settings
from fastalex.training.metrics import MetricsLog, RunningMetrics, TensorBoard, is_stuck
from fastalex.training.optim import (
    build_optimizer,
    momentum_buffers,
    set_learning_rate,
    set_momentum_buffers,
)
from fastalex.training.precompile import compile_first
from fastalex.training.progress import Progress
from fastalex.training.run_config import RunConfig
from fastalex.training.run_folder import RunFolder
from fastalex.training.schedule import Schedule
from fastalex.training.step import TrainStep, Tricks
from fastalex.training.validation import TOP, Accuracy, evaluate, fetch
from fastalex.training.weights import save_weights
from fastalex_kernels.common.backend import backend

_NAMED = 3  # samples of a bad batch that the message names

STUCK = (
    "warning: the loss stays at ln({classes}) = {level:.3f}, as if every class were as likely as "
    "any other; try {advice}"
)


def train(config: RunConfig) -> None:
    """Run ``config`` in this process, which is a member of its world.

    Raises:
        TrainingError: where the run can't go on: the loss is not finite, data are gone, the disk
            is full, memory runs out.
        Interrupted: a signal asked for the end; where it could, the run has saved its state.
    """
    try:
        with output_may_fail(), tf32(config.settings.precision):
            trainer = Trainer(config)
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
    """One run; ``run`` goes through its epochs, from the first or where it was stopped.

    Attributes:
        step: steps done.
        epoch: the epoch that is being trained, from 1.
        started: when it began, by the monotonic clock.
    """

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.settings = settings = config.settings
        self.parallel = parallel = ParallelContext(config.world, settings.timeout)
        train_dataset, val_dataset = config.datasets or open_datasets(
            settings.data, settings.seed, settings.image_size, config.unreadable, quiet=True
        )
        self.dataset = train_dataset
        self.train_batches = self._batches(train_dataset, train=True)
        self.val_batches = self._batches(val_dataset, train=False)
        state = {} if config.resume is None else config.resume.state
        self.steps = checkpoints.last_step(settings, len(self.train_batches), state)
        self.schedule = Schedule(settings, self.steps)
        self.scaler = LossScaler(parallel, enabled=settings.precision == "fp16")
        self.folder = RunFolder(config.folder)
        self._build(config.resume)
        self._restore(state)
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
            self._open_logs()

    def _build(self, resume: ResumeState | None) -> None:
        """The net and its optimizer, anew or as the checkpoint has them."""
        settings, parallel = self.settings, self.parallel
        model = build_model(settings, len(self.config.classes))
        buffers = None
        if resume is not None and resume.path is not None:
            weights, buffers = resume.tensors()
            model.load_state_dict(weights)
        elif settings.init_from is not None:
            fine_tuning.begin_with(model, settings.init_from, self.config.classes)
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
        )
        if buffers is not None:
            parts = towers.local_tensors(self.model, parallel.mesh, buffers)
            set_momentum_buffers(self.model, self.optimizer, parts)

    def _whole(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Those of the whole net; every process takes part.

        Raises:
            TrainingError: where the towers' copies of the last layer have drifted apart.
        """
        if not towers.copies_agree(self.model, self.parallel.mesh, tensors):
            raise TrainingError(
                f"the two towers' copies of the last layer differ after step {self.step}: their "
                "GPUs or software round differently; run both on one model of GPU with the same "
                "versions, or use one process"
            )
        return towers.full_tensors(self.model, self.parallel.mesh, tensors)

    def _make_step(self) -> TrainStep | AutogradStep:
        """The step without autograd, where it was asked for and can run this net."""
        settings, parallel, augment = self.settings, self.parallel, self.train_batches.augment
        if settings.fused_update:
            alone = parallel.replicas == 1  # else a gradient is not whole when it is made
            tricks = Tricks(fused_update=alone, graph=settings.cuda_graph)
            reduce = None if alone else lambda: parallel.reduce_gradients(self.model)
            try:
                step = TrainStep(
                    self.model, self.optimizer, settings.precision.replace("tf32", "float32"),
                    augment=augment, tricks=tricks, reduce=reduce, tell=self.progress.warn,
                )  # fmt: skip
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

    def _restore(self, state: dict[str, Any]) -> None:
        """Go on from ``state``, as ``_state`` returned it; from the beginning where it is empty."""
        self.step: int = state.get("step", 0)
        self.epoch: int = state.get("epoch", 1)
        # Batches done in this epoch; fewer images than before may have fewer.
        self.batch: int = min(state.get("batch", 0), len(self.train_batches))
        self.losses: list[float] = state.get("losses", [])  # of this epoch's steps
        self.epoch_seconds: float = state.get("epoch_seconds", 0.0)  # spent on it by an earlier run
        self.best: dict[str, float] | None = state.get("best")
        window = self.settings.log_every
        self.recent = RunningMetrics(window, self.parallel.stopwatch, state.get("window", []))
        self.warned: bool = state.get("warned", False)  # that the loss is stuck
        if state:
            self.schedule.restore(state["schedule"])
            self.scaler.load_state_dict(state["scaler"])

    def _state(self) -> dict[str, Any]:
        """What a checkpoint holds besides tensors; JSON, which keeps every bit of a float."""
        config = self.config
        return {
            "step": self.step,
            "epoch": self.epoch,
            "batch": self.batch,
            "losses": self.losses,
            "epoch_seconds": self.epoch_seconds,
            "best": self.best,
            "window": self.recent.losses,
            "warned": self.warned,
            "schedule": self.schedule.state(),
            "scaler": self.scaler.state_dict(),
            "metrics_bytes": 0 if self.metrics is None else self.metrics.length,
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

    def _open_logs(self) -> None:
        resume = self.config.resume
        length = None if resume is None else resume.state.get("metrics_bytes", 0)
        self.metrics = MetricsLog(self.folder.metrics, length)
        if self.metrics.missing:
            self.progress.warn(
                f"warning: {self.folder.metrics}: records before the checkpoint are missing"
            )
        if self.settings.tensorboard:
            self.tensorboard = TensorBoard(self.folder.tensorboard, self.step)

    def _batches(self, dataset: ImageDataset, train: bool) -> Batches:
        settings = self.settings
        return Batches(
            dataset,
            settings.batch_size,
            Transform(
                settings.image_size,
                self.config.normalization,
                settings.augmentation,
                color_noise(dataset, settings.color_noise),
                self.parallel.device,
            ),
            settings.seed,
            train,
            Share(self.parallel.replica, self.parallel.replicas),
            settings.workers,
        )

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
                    f"(epoch {epoch}); try a lower --lr than {self.settings.lr}"
                )
            if self.schedule.validated(1 - accuracy.top1):
                self.progress.say("the validation error stopped falling, the learning rate drops")
            self._save(accuracy)
            loss = math.fsum(self.losses) / len(self.losses)
            self._report_epoch(loss, accuracy, time.monotonic() - self.started)
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
        batches = self.train_batches.epoch(self.epoch - 1, self.batch)
        for batch in fetch(batches, self.parallel.device, self.recent.waiting):
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

        Raises:
            Interrupted: after the checkpoint.
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
        """Take in the losses of the steps since the last reading, over all replicas.

        Raises:
            TrainingError: where one is not finite, naming its step and samples.
        """
        if not self.unread:
            return
        values = torch.stack([loss for loss, _ in self.unread]) / self.parallel.replicas
        losses: list[float] = self.parallel.sum_replicas(values).tolist()
        first = self.step - len(losses) + 1
        for i, loss in enumerate(losses):
            if not math.isfinite(loss):
                indices = self.parallel.gather_replicas(self.unread[i][1].tolist())
                raise TrainingError(self._not_finite(loss, first + i, indices))
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
        if self.warned or not is_stuck(self.recent.losses, classes):
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

    def _report_epoch(self, loss: float, accuracy: Accuracy, seconds: float) -> None:
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
            checkpoints.save(self.folder, weights, buffers, self._state(), keep)
        self.parallel.progress(self.step)

    def _save(self, accuracy: Accuracy) -> None:
        """Write the weights, which may be the best so far; every process takes part."""
        best = self.best is None or accuracy.top1 > self.best["top1"]
        if best:
            self.best = {"epoch": self.epoch, "top1": accuracy.top1}
        self.parallel.progress(self.step, "writing the weights")
        weights = self._whole(self.model.state_dict())
        if not self.parallel.is_main:
            return
        image = self.config.normalization.mean_image
        save_weights(self.folder.weights, weights, self._metadata(accuracy), image)
        if best:
            self.folder.keep_best()

    def _metadata(self, accuracy: Accuracy) -> dict[str, Any]:
        settings = self.settings
        return {
            "version": __version__,
            "variant": settings.variant,
            "num_classes": len(self.config.classes),
            "classes": self.config.classes,
            "image_size": settings.image_size,
            "normalization": self.config.normalization.to_dict(),
            "dropout": settings.dropout,
            "precision": settings.precision,
            "init": settings.init,
            "seed": settings.seed,
            "epoch": self.epoch,
            "step": self.step,
            "top1": accuracy.top1,
            "top5": accuracy.top5,
        }


def build_model(settings: Settings, classes: int) -> AlexNet:
    """The net of ``settings`` before its first step, the same in every process."""
    model = AlexNet(classes, settings.dropout, settings.variant)
    generator = torch.Generator().manual_seed(settings.seed)
    model.init_parameters(settings.init, generator)
    return model
