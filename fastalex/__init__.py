"""fastalex: the AlexNet of 2012, two towers and all, on Triton kernels written for it."""

import importlib
from typing import TYPE_CHECKING, Any

from fastalex._version import __version__

if TYPE_CHECKING:
    from fastalex.evaluation.pretrained import alexnet, load
    from fastalex.model.alexnet import AlexNet

__all__ = ["AlexNet", "__version__", "alexnet", "load"]

_PRETRAINED = "fastalex.evaluation.pretrained"
_PLACES = {"AlexNet": "fastalex.model.alexnet", "alexnet": _PRETRAINED, "load": _PRETRAINED}


def __getattr__(name: str) -> Any:
    """A name when it is asked for: a process that packs images starts without torch."""
    if name in _PLACES:
        return getattr(importlib.import_module(_PLACES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
