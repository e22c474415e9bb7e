"""Training: the step that is what trains on a GPU, and what a benchmark times."""

from fastalex.training.step import TrainStep

__all__ = ["TrainStep"]
