"""Errors that were published for the four nets, with their sources, to set beside one's own.

P is Krizhevsky, Sutskever, Hinton, NIPS 2012. Errors are percentages of the images named.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple


class Published(NamedTuple):
    """What was tested, crops of each image (1, the centre, or 10), on what, errors in %, where."""

    nets: str
    crops: int
    images: str
    top1: float
    top5: float
    source: str


_TEST_2010 = "ILSVRC-2010 test"
_VAL_2012 = "ILSVRC-2012 validation"
_BVLC = "BVLC models/bvlc_alexnet/readme.md"
_TORCHVISION = "torchvision AlexNet_Weights.IMAGENET1K_V1"

_PAPER = (
    Published("one net", 1, _TEST_2010, 39.0, 18.3, "P§6, footnote"),
    Published("one net", 10, _TEST_2010, 37.5, 17.0, "P§6, table 1"),
    Published("one net", 10, _VAL_2012, 40.7, 18.2, "P§6, table 2"),
    Published("five nets", 10, _VAL_2012, 38.1, 16.4, "P§6, table 2"),
)

RESULTS: dict[str, tuple[Published, ...]] = {
    "paper": _PAPER,
    "source2012": _PAPER,  # net 145 logged the paper's errors: S:layers/layer-params-145.cfg
    "caffe": (Published("one net", 1, _VAL_2012, 42.9, 19.8, _BVLC),),
    "owt": (Published("one net", 1, _VAL_2012, 43.5, 20.9, _TORCHVISION),),
}


def is_imagenet(classes: Sequence[str]) -> bool:
    """Whether ``classes`` look like ILSVRC's: a thousand, named by WordNet ids as in its folders.

    The classes of 2010 and of 2012 differ and have ids of the same form, so this can't tell the
    years apart.
    """
    return len(classes) == 1000 and all(re.fullmatch(r"n\d{8}", name) for name in classes)
