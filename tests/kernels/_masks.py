"""Input gradients masked by the ReLU below, against float64."""

from __future__ import annotations

import torch

from fastalex_kernels import reference
from fastalex_kernels.common.layout import as_hwnc
from fastalex_kernels.common.parameters import Dropout
from fastalex_kernels.conv2d.arguments import spell_out
from fastalex_kernels.conv2d.forward import conv2d_relu_backward_input, pack_weight
from fastalex_kernels.linear.forward import Epilogue, matmul
from fastalex_kernels.reference import relative_error, tolerance

from ._oracle import Case, make_inputs


def check(case: Case, dtype: torch.dtype, device: str = "cpu") -> None:
    """Fail unless the gradient before the ReLU, and its sums, are within their bounds."""
    z, w = (x.detach() for x in make_inputs(case, dtype, device)[:2])
    y = z.double().relu().requires_grad_()
    generator = torch.Generator().manual_seed(3)
    p, arguments = case.arguments.get("p", 0.0), {**case.arguments, "relu": False}
    if case.op == "linear_relu_dropout":
        output = torch.nn.functional.linear(y, w.double()) / (1 - p)
    else:
        output = reference.conv2d_relu(y, w.double(), **arguments)
    dz = torch.randn(output.shape, generator=generator).to(device, dtype)
    (dy,) = torch.autograd.grad(output, y, dz.double())
    wanted = torch.where(z > 0, dy, 0.0)
    partials = None
    if case.op == "linear_relu_dropout":
        dx = matmul(dz, w, Epilogue(dropout=Dropout(p), mask=z.relu()))
    else:
        sides, _ = spell_out(case.arguments.get("padding", 0), 1)
        size, groups = (z.shape[2], z.shape[3]), case.arguments.get("groups", 1)
        dx, partials = conv2d_relu_backward_input(
            as_hwnc(dz), pack_weight(w), size, sides, groups, mask=as_hwnc(z.relu())
        )
    assert relative_error(dx, wanted) <= tolerance(dtype, w[0].numel())
    assert torch.equal(dx == 0, wanted.to(dtype) == 0)
    if partials is not None:
        assert partials.dtype == torch.float32
        bound = tolerance(dtype, wanted.numel() // wanted.shape[1])
        assert relative_error(partials.sum(0), wanted.sum((0, 2, 3))) <= bound
