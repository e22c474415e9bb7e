"""What a run shows while it goes: a bar on a terminal, now and then a line elsewhere."""

from __future__ import annotations

import sys
import threading
import time
from typing import TextIO

from tqdm import tqdm

_LINE_SECONDS = 10.0
_BAR = "{desc} |{bar:20}| step {n_fmt}/{total_fmt}{postfix}, {elapsed}, {remaining} left"


class Progress:
    """Loss, images/s and time left on stderr, of one process for all.

    Args:
        steps: of the whole run.
        epochs: of the whole run.
        visible: False for all processes but one.
        done: steps that were done before, by a run that this one resumes.
    """

    def __init__(self, steps: int, epochs: int, visible: bool, done: int = 0) -> None:
        self._epochs, self._visible = epochs, visible
        # tqdm's own lock is a semaphore of the system, which a killed process would leave behind.
        tqdm.set_lock(threading.RLock())
        self._bar = tqdm(
            desc=f"epoch 1/{epochs}",
            total=steps,
            initial=done,
            bar_format=_BAR,
            smoothing=0.1,
            dynamic_ncols=True,
            disable=not (visible and sys.stderr.isatty()),
        )
        self._step = self._first = done
        self._started = self._spoke = time.monotonic()

    def advance(self, step: int, epoch: int, loss: float | None, rate: float | None) -> None:
        """Show that ``step`` is done; None where loss or images/s are not known yet."""
        numbers = "" if loss is None else f", loss {loss:.4f}"
        numbers += "" if rate is None else f", {rate:.0f} images/s"
        self._bar.set_description_str(f"epoch {epoch}/{self._epochs}", refresh=False)
        self._bar.set_postfix_str(numbers.removeprefix(", "), refresh=False)
        self._bar.update(step - self._step)
        self._step, now = step, time.monotonic()
        if self._bar.disable and now - self._spoke > _LINE_SECONDS:
            self._spoke, steps = now, self._bar.total
            left = (now - self._started) / (step - self._first) * (steps - step)
            text = f"epoch {epoch}/{self._epochs}, step {step}/{steps}{numbers}"
            self._say(f"{text}, {tqdm.format_interval(left)} left", sys.stderr)

    def validating(self, epoch: int) -> None:
        """Show that the net is measured, not trained."""
        self._bar.set_description_str(f"epoch {epoch}/{self._epochs}, validating")

    def say(self, line: str) -> None:
        """Print a line on stdout, above the bar."""
        self._say(line, sys.stdout)

    def warn(self, line: str) -> None:
        """Print a line on stderr, above the bar."""
        self._say(line, sys.stderr)

    def _say(self, line: str, file: TextIO) -> None:
        if self._visible:
            tqdm.write(line, file=file)
            file.flush()

    def close(self) -> None:
        self._bar.close()
