"""Input gradients masked by the ReLU below, against float64."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from fastalex_kernels.common.layout import as_hwnc
from fastalex_kernels.conv2d.arguments import spell_out
from fastalex_kernels.conv2d.forward import conv2d_relu_backward_input, pack_weight
from fastalex_kernels.linear.forward import matmul
from fastalex_kernels.reference import relative_error, tolerance

from ._oracle import Case, make_inputs


def check(case: Case, dtype: torch.dtype, device: str = "cpu") -> None:
    """Fail unless the gradient before the ReLU, and its sums, are within their bounds."""
    z, w = (x.detach() for x in make_inputs(case, dtype, device)[:2])
    y = z.double().relu().requires_grad_()
    generator = torch.Generator().manual_seed(3)
    if case.op == "linear_relu_dropout":
        output = F.linear(y, w.double())
    else:
        sides, _ = spell_out(case.arguments.get("padding", 0), 1)
        groups = case.arguments.get("groups", 1)
        (top, bottom), (left, right) = sides
        padded = F.pad(y, (left, right, top, bottom))
        output = F.conv2d(padded, w.double(), groups=groups)
    dz = torch.randn(output.shape, generator=generator).to(device, dtype)
    (dy,) = torch.autograd.grad(output, y, dz.double())
    wanted = torch.where(z > 0, dy, 0.0)
    partials = None
    if case.op == "linear_relu_dropout":
        dx = matmul(dz, w, mask=z.relu())
    else:
        size = (z.shape[2], z.shape[3])
        dx, partials = conv2d_relu_backward_input(
            as_hwnc(dz), pack_weight(w), size, sides, groups, mask=as_hwnc(z.relu())
        )
    assert relative_error(dx, wanted) <= tolerance(dtype, w[0].numel())
    assert torch.equal(dx == 0, wanted.to(dtype) == 0)
    if partials is not None:
        bound = tolerance(dtype, wanted.numel() // wanted.shape[1])
        assert relative_error(partials.sum(0), wanted.sum((0, 2, 3))) <= bound
