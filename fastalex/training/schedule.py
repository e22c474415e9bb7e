"""The learning rate of each step of a run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastalex.training.config import Settings

_SLACK = 1e-6  # of a step: shares like 25/90 of a run are no binary fractions


class Schedule:
    """The rates of a run of ``steps`` steps; ``plateau`` (P§5) learns from ``validated``."""

    def __init__(self, settings: Settings, steps: int) -> None:
        self.settings = settings
        self.steps = steps
        self._best: float | None = None
        self._waited = 0  # epochs since the best one, or the last drop
        self._drops = 0  # of a plateau

    def rate(self, step: int) -> float:
        """The learning rate of ``step``, from 1 to ``steps``."""
        settings, drops = self.settings, self._drops
        if settings.schedule == "drops":
            drops = sum(step - _SLACK > share * self.steps for share in settings.lr_drop)
        warm = settings.warmup * self.steps
        factor = min(1.0, step / warm) if warm > 0 else 1.0
        return settings.lr * factor * float(settings.lr_gamma**drops)

    def validated(self, error: float) -> bool:
        """Take the validation error of one more epoch; whether the rate drops because of it."""
        settings = self.settings
        if settings.schedule != "plateau":
            return False
        if self._best is None or error < self._best:
            self._best, self._waited = error, 0
            return False
        self._waited += 1
        most = settings.lr_max_drops
        if self._waited < settings.lr_patience or (most is not None and self._drops >= most):
            return False
        self._drops, self._waited = self._drops + 1, 0
        return True

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps; ``restore`` takes it."""
        return {"best": self._best, "waited": self._waited, "drops": self._drops}

    def restore(self, state: Mapping[str, Any]) -> None:
        self._best, self._waited, self._drops = (state[k] for k in ("best", "waited", "drops"))


def describe_schedule(settings: Settings, epochs: float) -> str:
    """The schedule of a run of ``epochs`` epochs in a few words."""
    text = f"lr {settings.lr:g}"
    drops = ", ".join(f"{share * epochs:.3g}" for share in settings.lr_drop if share < 1)
    if settings.schedule == "plateau":
        text += f", x {settings.lr_gamma:g} after {settings.lr_patience} epochs without a better "
        text += "top-1"
    elif drops:
        text += f", x {settings.lr_gamma:g} after epochs {drops}"
    warm = f", after {settings.warmup * epochs:.3g} epochs of warm-up"
    return text + warm * (settings.warmup > 0)
