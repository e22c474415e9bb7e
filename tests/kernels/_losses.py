"""Calls of ``cross_entropy``, and what each is measured against."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

import fastalex_kernels as fk
from fastalex_kernels.reference import relative_error, tolerance

from ._oracle import lay_out

G = 2.5  # the gradient of the loss, a float32 as it stands


@dataclass(frozen=True)
class Case:
    """One call.

    Args:
        shape: images and classes.
        spread: the logits' standard deviation.
        shift: what is added to every one of them.
        layout: how the logits lie in memory, see ``lay_out``.
    """

    name: str
    shape: tuple[int, int]
    spread: float = 2.0
    shift: float = 0.0
    layout: str = "contiguous"
    seed: int = 0

    def __str__(self) -> str:
        return self.name


CASES = [
    Case("alexnet", (128, 1000)),
    Case("batch1", (1, 1000)),
    Case("odd", (13, 37)),
    Case("two-classes", (5, 2)),
    Case("one-class", (4, 1)),
    Case("one-by-one", (1, 1)),
    Case("small", (130, 10)),
    Case("many-programs", (1030, 24)),
    Case("whole-block", (9, 1024)),
    Case("a-class-more", (3, 1025)),
    Case("three-blocks", (11, 2600)),
    Case("flat", (16, 40), spread=0.0),
    Case("far-apart", (16, 40), spread=60.0),
    Case("large", (16, 48), shift=3000.0),
    Case("reversed", (6, 12), layout="reversed"),
    Case("expanded", (6, 12), layout="expanded"),
    Case("sliced", (6, 16), layout="sliced"),
    Case("unaligned", (6, 16), layout="unaligned"),
]


def make(case: Case, dtype: torch.dtype, device: str = "cpu") -> tuple[torch.Tensor, torch.Tensor]:
    """Logits, a leaf, and labels."""
    generator = torch.Generator().manual_seed(case.seed)
    values = torch.randn(case.shape, generator=generator, dtype=torch.float64)
    logits = lay_out((case.spread * values + case.shift).to(dtype).to(device), case.layout)
    target = torch.randint(0, case.shape[1], case.shape[:1], generator=generator).to(device)
    return logits.detach().requires_grad_(), target


def run(
    logits: torch.Tensor, target: torch.Tensor, g: float = G
) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss and the gradient of the logits."""
    loss = fk.cross_entropy(logits, target)
    (found,) = torch.autograd.grad(loss, logits, torch.tensor(g, device=logits.device))
    return loss.detach(), found


def check(case: Case, dtype: torch.dtype, device: str = "cpu") -> None:
    """Fail unless loss and gradient are within rounding of torch's in float64."""
    logits, target = make(case, dtype, device)
    before = logits.detach().clone(), target.clone()
    wide = logits.detach().double().requires_grad_()
    expected = F.cross_entropy(wide, target)
    (gradient,) = torch.autograd.grad(expected, wide, torch.tensor(G, device=device).double())
    loss, found = run(logits, target)
    assert (loss.dtype, loss.shape) == (torch.float32, ())
    assert (found.dtype, found.shape) == (dtype, logits.shape)
    # The inputs are rounded already: the loss is as good as float32 sums are.
    assert relative_error(loss, expected) <= tolerance(torch.float32, 0)
    assert relative_error(found, gradient) <= tolerance(dtype, 0)
    assert torch.equal(logits, before[0])
    assert torch.equal(target, before[1])
