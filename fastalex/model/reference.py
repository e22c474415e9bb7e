"""The unfused net under its own name: the oracle of the tests, the baseline of the benchmarks."""

from __future__ import annotations

from fastalex.model.alexnet import AlexNet
from fastalex.model.variants import Variant


class ReferenceAlexNet(AlexNet):
    """``AlexNet(..., fused=False)``: AlexNet from torch's own layers."""

    def __init__(
        self, num_classes: int = 1000, dropout: float = 0.5, variant: str | Variant = "paper"
    ) -> None:
        super().__init__(num_classes, dropout, variant, fused=False)
