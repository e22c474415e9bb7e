"""fastalex: the AlexNet of 2012, two towers and all, on Triton kernels written for it."""

import importlib
from typing import TYPE_CHECKING, Any

from fastalex._version import __version__

if TYPE_CHECKING:
    from fastalex.evaluation.pretrained import load
    from fastalex.model.alexnet import AlexNet

__all__ = ["AlexNet", "__version__", "load"]

_PLACES = {"AlexNet": "fastalex.model.alexnet", "load": "fastalex.evaluation.pretrained"}


def __getattr__(name: str) -> Any:
    """A name when it is asked for: packing starts without torch."""
    if name in _PLACES:
        return getattr(importlib.import_module(_PLACES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
