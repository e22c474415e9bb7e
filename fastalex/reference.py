"""The same net from stock torch.nn."""

from fastalex.model.reference import ReferenceAlexNet

__all__ = ["ReferenceAlexNet"]
