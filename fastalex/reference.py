"""The same net from stock torch.nn."""

from fastalex.model.alexnet import ReferenceAlexNet

__all__ = ["ReferenceAlexNet"]
