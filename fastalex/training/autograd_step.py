"""A training step by autograd and the optimizer, for what ``TrainStep`` can't run."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

import fastalex_kernels as kernels
from fastalex.common.nvtx_ranges import nvtx_range
from fastalex.data.augment import Augment
from fastalex.distributed.context import ParallelContext
from fastalex.model.alexnet import AlexNet
from fastalex.training.optim import gradient_norms

_NARROW = {"bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(precision: str, device: torch.device) -> torch.autocast:
    """A context in which a net computes in ``precision``, one of ``config.PRECISIONS``."""
    narrow = _NARROW.get(precision)
    return torch.autocast(device.type, narrow or torch.bfloat16, enabled=narrow is not None)


@contextlib.contextmanager
def computing(precision: str, device: torch.device) -> Iterator[None]:
    """A context in which a net computes in ``precision``, TF32 included."""
    with tf32(precision), autocast(precision, device):
        yield


@contextlib.contextmanager
def tf32(precision: str) -> Iterator[None]:
    """A context in which ``tf32`` is what float32 means to torch; others leave it as it is."""
    settings = (torch.backends.cudnn.conv, torch.backends.cuda.matmul)  # type: ignore[attr-defined]
    before = [each.fp32_precision for each in settings]
    try:
        for each in settings if precision == "tf32" else ():
            each.fp32_precision = "tf32"
        yield
    finally:
        for each, value in zip(settings, before, strict=True):
            each.fp32_precision = value


class LossScaler(torch.amp.GradScaler):
    """Dynamic loss scaling on which all processes agree; does nothing unless ``enabled``.

    Two towers hold different gradients of one net, and exchange some of them: where one overflows,
    both leave the step out, and both go on with the same scale.
    """

    def __init__(self, parallel: ParallelContext, enabled: bool) -> None:
        super().__init__(parallel.device.type, enabled=enabled)
        self._parallel = parallel

    def unscale_(self, optimizer: torch.optim.Optimizer) -> None:
        """Divide the gradients by the scale, and look for one that is not finite, everywhere."""
        super().unscale_(optimizer)
        if self.is_enabled():
            for found in self._per_optimizer_states[id(optimizer)]["found_inf_per_device"].values():
                self._parallel.all_reduce_max(found)


class AutogradStep:
    """``loss = step(pixels, labels)``: forward, loss, backward and update of one batch.

    Its kernels are not checked before their first use, as ``TrainStep``'s are.
    """

    def __init__(
        self,
        model: AlexNet,
        optimizer: torch.optim.Optimizer,
        precision: str,
        augment: Augment,
        parallel: ParallelContext,
        scaler: LossScaler,
    ) -> None:
        self._model, self._optimizer, self._precision = model, optimizer, precision
        self._augment, self._parallel, self._scaler = augment, parallel, scaler

    def __call__(self, pixels: Any, labels: torch.Tensor) -> torch.Tensor:
        """Do one step; the mean loss, on the device."""
        with autocast(self._precision, self._parallel.device):
            logits = self._model(self._augment(*pixels))
        loss = kernels.cross_entropy(logits, labels)
        self._optimizer.zero_grad()
        with nvtx_range("backward"):
            self._scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        self._parallel.reduce_gradients(self._model)
        self._scaler.unscale_(self._optimizer)
        with nvtx_range("optimizer"):
            self._scaler.step(self._optimizer)
            self._scaler.update()
        return loss.detach()

    def gradient_norms(self) -> dict[str, torch.Tensor]:
        """The Euclidean norm of each parameter's last gradient."""
        return gradient_norms(self._model)
