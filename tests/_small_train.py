"""``python -m fastalex.train`` for tests that start it often: thinner layers, fewer built-in images.

    python tests/_small_train.py OPTIONS

The net and the loop are the real ones. Processes that this one starts import it too, and so have
the same layers and images.
"""

from __future__ import annotations

import sys
from dataclasses import replace

from fastalex import train, variants
from fastalex.data import sources

for name, variant in list(variants.VARIANTS.items()):
    fc6, fc7, fc8 = variant.fully_connected
    thin = (replace(fc6, features=64), replace(fc7, features=64), fc8)
    variants.VARIANTS[name] = replace(variant, fully_connected=thin)
sources.TRAIN_COUNT, sources.VAL_COUNT = 40, 12

if __name__ == "__main__":
    sys.exit(train.main())
