"""``python -m fastalex.train`` for tests that start it often: thinner layers, fewer images.

    python tests/_small_train.py OPTIONS

The loop and the kinds of layers are the real ones. Processes that this one starts import it too,
and so have the same net and images.
"""

from __future__ import annotations

import sys
from dataclasses import replace

from fastalex.data import datasets
from fastalex.model.variants import VARIANTS, Variant
from fastalex.training import train

TRAIN_COUNT, VAL_COUNT = 40, 12


def thin(variant: Variant) -> Variant:
    """The same net with 64 units in fc6 and in fc7."""
    fc6, fc7, fc8 = variant.fully_connected
    hidden = (replace(fc6, features=64), replace(fc7, features=64))
    return replace(variant, fully_connected=(*hidden, fc8))


def shrink() -> None:
    """Give this process the thin nets and the few images."""
    VARIANTS.update({name: thin(variant) for name, variant in VARIANTS.items()})
    datasets.TRAIN_COUNT, datasets.VAL_COUNT = TRAIN_COUNT, VAL_COUNT


if __name__ in ("__main__", "__mp_main__"):
    shrink()

if __name__ == "__main__":
    sys.exit(train.main())
