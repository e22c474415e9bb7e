"""The learning rate of each step of a run."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from fastalex.training.config import Settings

_SLACK = 1e-6  # of a step: shares like 25/90 of a run are no binary fractions


class Schedule:
    """The rates of a run of ``steps`` steps; ``plateau`` learns from ``validated``.

    Args:
        settings: of the run; ``schedule`` and the settings that begin with ``lr``, ``warmup``.
        steps: of the whole run.

    Source: P§5 for plateau; Caffe's solvers for step and poly; Loshchilov and Hutter, ICLR 2017,
        for cosine; Goyal et al., 2017, for the warm-up.
    """

    def __init__(self, settings: Settings, steps: int) -> None:
        self.settings = settings
        self.steps = steps
        self._best: float | None = None
        self._waited = 0  # epochs since the best one, or the last drop
        self._drops = 0  # of a plateau

    def rate(self, step: int) -> float:
        """The learning rate of ``step``, from 1 to ``steps``."""
        warm = self.settings.warmup * self.steps
        factor = min(1.0, step / warm) if warm > 0 else 1.0
        return self.settings.lr * factor * self._factor(step)

    def _factor(self, step: int) -> float:
        settings = self.settings
        done = (step - 1) / self.steps  # share of the run before this step
        if settings.schedule == "poly":
            return float((1 - done) ** settings.lr_power)
        if settings.schedule == "cosine":
            return 0.5 * (1 + math.cos(math.pi * done))
        return float(settings.lr_gamma ** self._count(step - _SLACK))

    def _count(self, step: float) -> int:
        """How many drops lie before ``step``."""
        settings = self.settings
        if settings.schedule == "drops":
            return sum(step > share * self.steps for share in settings.lr_drop)
        if settings.schedule == "step":
            return math.ceil(step / (settings.lr_step * self.steps)) - 1
        return self._drops

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

    def at(share: float) -> str:
        return f"{share * epochs:.3g}"

    texts = {
        "constant": "",
        "drops": f", x {settings.lr_gamma:g} after epochs "
        + ", ".join(at(share) for share in settings.lr_drop if share < 1),
        "step": f", x {settings.lr_gamma:g} every {at(settings.lr_step)} epochs",
        "plateau": f", x {settings.lr_gamma:g} after {settings.lr_patience} epochs without a "
        "better top-1",
        "poly": f", falling to 0 with power {settings.lr_power:g}",
        "cosine": ", falling to 0 along a cosine",
    }
    never = settings.schedule == "drops" and min(settings.lr_drop) >= 1
    text = "" if never else texts[settings.schedule]
    warm = f", after {at(settings.warmup)} epochs of warm-up" if settings.warmup else ""
    return f"lr {settings.lr:g}{text}{warm}"
