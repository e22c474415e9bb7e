"""A convolution of one of two towers, its input's channels in two tensors, against float64."""

from __future__ import annotations

import torch

from fastalex_kernels import reference
from fastalex_kernels.common.layout import as_hwnc
from fastalex_kernels.conv2d.arguments import spell_out
from fastalex_kernels.conv2d.forward import (
    conv2d_relu_backward_input,
    conv2d_relu_forward,
    pack_weight,
)
from fastalex_kernels.conv2d.weight import conv2d_relu_backward_weight
from fastalex_kernels.reference import relative_error, tolerance

from ._oracle import Case, make_inputs


def _halves(x: torch.Tensor) -> torch.Tensor:
    """[2, H, W, N, C / 2] of x [N, C, H, W]."""
    return torch.stack(as_hwnc(x).chunk(2, -1))


def check(case: Case, dtype: torch.dtype, device: str = "cpu") -> None:
    """Fail unless the output and each gradient are within their bounds."""
    x, w, b = (t.detach() for t in make_inputs(case, dtype, device))
    sides, _ = spell_out(case.arguments.get("padding", 0), 1)
    relu = case.arguments.get("relu", True)
    leaves = [t.double().requires_grad_() for t in (x.relu(), w, b)]
    expected = reference.conv2d_relu(*leaves, padding=sides, relu=relu)
    generator = torch.Generator().manual_seed(4)
    # The gradient of what is before the ReLU.
    dz = torch.randn(expected.shape, generator=generator).to(device, dtype)
    plain = reference.conv2d_relu(*leaves, padding=sides, relu=False)
    dx, dw, _ = torch.autograd.grad(plain, leaves, dz.double())
    masked = torch.where(x > 0, dx, 0.0)
    size, packed, given = (x.shape[2], x.shape[3]), pack_weight(w), _halves(x.relu())
    y = conv2d_relu_forward(given, packed, b, sides, 1, relu)
    inputs = [
        conv2d_relu_backward_input(as_hwnc(dz), packed, size, sides, 1, mask, halves=2)
        for mask in (None, given)
    ]
    partials = conv2d_relu_backward_weight(given, as_hwnc(dz), w.shape[2:], sides, 1)
    assert relative_error(y, expected) <= tolerance(dtype, w[0].numel())
    for (made, sums), wanted in zip(inputs, (dx, masked), strict=True):
        assert made.is_contiguous()
        assert relative_error(made, _halves(wanted)) <= tolerance(dtype, w[:, 0].numel())
        if sums is not None:
            assert relative_error(sums.double().sum(0), masked.sum((0, 2, 3))) <= 8e-3
    rows = expected.numel() // expected.shape[1]
    found = partials.sum(0, dtype=torch.float64).permute(3, 2, 0, 1)
    assert relative_error(found, dw) <= tolerance(torch.float32, rows)
