"""A fully connected layer begun with the half of its input that is there.

A tower of two waits for the other one's half of what its next layer reads. The reduction of a
fully connected layer is split over programs in any case, so those of the half that is there run
meanwhile, and no byte more is moved. What they summed travels on the input tensor itself, as what
_handover hands the other way: nothing relies on it, and where it is missing the whole is computed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

_BEGUN = "_fastalex_begun"
HALVES = 2


@dataclass(frozen=True)
class Begun:
    """A product of which one half of the reduction is summed.

    Attributes:
        parts: float32 [HALVES * each, M, N]; those of ``half`` are written. They lie in the order
            of the input and not of time, so that both towers add them up alike.
        half: 0 or 1.
        weight: [N, K], all of it.
    """

    parts: torch.Tensor
    half: int
    weight: torch.Tensor

    @property
    def each(self) -> int:
        """Parts of a half."""
        return len(self.parts) // HALVES

    def of(self, half: int) -> torch.Tensor:
        """The parts of a half."""
        return self.parts[half * self.each :][: self.each]


def carry(input: torch.Tensor, begun: Begun | None) -> torch.Tensor:
    """``input`` with what was begun of the product with it."""
    if begun is not None and not input.is_inference():  # which has no version
        setattr(input, _BEGUN, (begun, _versions(input, begun.weight)))
    return input


def begun_of(input: torch.Tensor, weight: torch.Tensor) -> Begun | None:
    """What was begun of the product of ``input`` with ``weight``, both unchanged since.

    It is handed out once: ``input`` may be kept for backward, and the sums need not be.
    """
    begun, versions = input.__dict__.pop(_BEGUN, (None, None))
    same = begun is not None and _place(begun.weight) == _place(weight)
    return begun if same and versions == _versions(input, weight) else None


def _versions(*tensors: torch.Tensor) -> list[int]:
    return [x._version for x in tensors]


def _place(x: torch.Tensor) -> Any:
    return x.untyped_storage()._cdata, x.storage_offset(), x.shape, x.stride(), x.dtype
