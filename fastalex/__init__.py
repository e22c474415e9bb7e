"""fastalex: the AlexNet of 2012, two towers and all, on Triton kernels written for it."""

from typing import TYPE_CHECKING, Any

from fastalex._version import __version__

if TYPE_CHECKING:
    from fastalex.model.alexnet import AlexNet

__all__ = ["AlexNet", "__version__"]


def __getattr__(name: str) -> Any:
    """The net when it is asked for: a process that packs images starts without torch."""
    if name == "AlexNet":
        from fastalex.model.alexnet import AlexNet

        return AlexNet
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
