"""Training: the step that trains on a GPU, and all that the command does as a function."""

from typing import TYPE_CHECKING, Any

from fastalex.training.step import TrainStep

if TYPE_CHECKING:
    from fastalex.training.train import fit

__all__ = ["TrainStep", "fit"]


def __getattr__(name: str) -> Any:
    """``fit`` when it is asked for: it needs every part of training."""
    if name == "fit":
        from fastalex.training.train import fit

        return fit
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
