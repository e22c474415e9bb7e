"""``python -m fastalex.train`` for tests that start it often: thinner layers, fewer images.

    python tests/_small_train.py OPTIONS

The loop and the kinds of layers are the real ones. Processes that this one starts import it too,
and so have the same net and images.
"""

from __future__ import annotations

import os
import sys
import time
from dataclasses import replace
from typing import Any

from fastalex.data import datasets
from fastalex.model.variants import VARIANTS, Variant
from fastalex.training import train, trainer

STEP_SECONDS = "STEP_SECONDS"  # variable of the environment: what each step takes longer
TRAIN_COUNT, VAL_COUNT = 40, 12


def thin(variant: Variant) -> Variant:
    """The same net with a quarter of the channels, and 64 units in fc6 and in fc7.

    Channels stay multiples of 16, as the kernels for wide loads need.
    """
    convolutions = (
        replace(c, channels=16 * max(1, round(c.channels / 64))) for c in variant.convolutions
    )
    fc6, fc7, fc8 = variant.fully_connected
    hidden = (replace(fc6, features=64), replace(fc7, features=64))
    return replace(variant, convolutions=tuple(convolutions), fully_connected=(*hidden, fc8))


def shrink() -> None:
    """Give this process the thin nets and the few images."""
    VARIANTS.update({name: thin(variant) for name, variant in VARIANTS.items()})
    datasets.TRAIN_COUNT, datasets.VAL_COUNT = TRAIN_COUNT, VAL_COUNT
    train_step = trainer.Trainer._train_step

    def slow(self: trainer.Trainer, batch: Any) -> None:
        time.sleep(float(os.environ.get(STEP_SECONDS, 0)))
        train_step(self, batch)

    trainer.Trainer._train_step = slow  # type: ignore[method-assign]


if __name__ in ("__main__", "__mp_main__"):
    shrink()

if __name__ == "__main__":
    sys.exit(train.main())
