"""What every kernel is measured against: its function in float64 on the same rounded inputs."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F

import fastalex_kernels
from fastalex_kernels import reference
from fastalex_kernels.common.tuned import dot_precision
from fastalex_kernels.reference import relative_error, tolerance

NAMES = ("input", "weight", "bias")


@dataclass(frozen=True)
class Case:
    """One call of a public function: its name, the shapes of its tensors, its other arguments.

    Args:
        layout: how the input lies in memory, see ``lay_out``; the gradient lies likewise.
        frozen: tensors that need no gradient.
        seed: of the random values and of dropout.
    """

    name: str
    op: str
    shapes: tuple[tuple[int, ...], ...]
    arguments: dict[str, Any] = field(default_factory=dict)
    layout: str = "contiguous"
    frozen: tuple[str, ...] = ()
    seed: int = 0

    def __str__(self) -> str:
        return self.name


def conv(name: str, input: tuple[int, ...], out: int, kernel: Any, **options: Any) -> Case:
    """A case of conv2d_relu with ``out`` channels; ``bias=False`` leaves the bias out."""
    rows, columns = (kernel, kernel) if isinstance(kernel, int) else kernel
    arguments = {k: options.pop(k) for k in ("stride", "padding", "groups", "relu") if k in options}
    weight = (out, input[1] // arguments.get("groups", 1), rows, columns)
    shapes = (input, weight, (out,)) if options.pop("bias", True) else (input, weight)
    return Case(f"conv-{name}", "conv2d_relu", shapes, arguments, **options)


def lrn(name: str, input: tuple[int, ...], layout: str = "contiguous", **arguments: Any) -> Case:
    return Case(f"lrn-{name}", "lrn_max_pool2d", (input,), arguments, layout)


def pool(name: str, input: tuple[int, ...], layout: str = "contiguous", **arguments: Any) -> Case:
    return Case(f"pool-{name}", "max_pool2d", (input,), arguments, layout)


def linear(name: str, rows: int, inputs: int, outputs: int, **options: Any) -> Case:
    """A case of linear_relu_dropout; ``bias=False`` leaves the bias out."""
    shapes: tuple[tuple[int, ...], ...] = ((rows, inputs), (outputs, inputs), (outputs,))
    shapes = shapes if options.pop("bias", True) else shapes[:2]
    kept = {k: options.pop(k) for k in ("layout", "frozen", "seed") if k in options}
    return Case(f"linear-{name}", "linear_relu_dropout", shapes, options, **kept)


def lay_out(x: torch.Tensor, layout: str) -> torch.Tensor:
    """The values of ``x`` in another memory layout."""
    if layout == "contiguous":
        return x.contiguous()
    if layout == "reversed":  # the last axis outermost
        order = tuple(range(x.dim()))[::-1]
        return x.permute(order).contiguous().permute(order)
    if layout == "channels_last":
        return x.contiguous(memory_format=torch.channels_last)
    if layout == "hwnc":
        return x.permute(2, 3, 0, 1).contiguous().permute(2, 3, 0, 1)
    if layout == "expanded":  # every image, or row, is the first: stride 0
        return x[:1].expand(x.shape)
    if layout == "sliced":  # every second value of a longer line, NaN between
        buffer = x.new_full((*x.shape[:-1], 2 * x.shape[-1] + 3), float("nan"))
        view = buffer[..., 1 : 1 + 2 * x.shape[-1] : 2]
        return view.copy_(x)
    if layout == "unaligned":  # HWNC, or rows, that start one element past an aligned address
        order = (2, 3, 0, 1) if x.dim() == 4 else tuple(range(x.dim()))
        there = x.permute(order)
        view = x.new_empty(x.numel() + 1)[1:].view(there.shape).copy_(there)
        return view.permute(order)  # (2, 3, 0, 1) is its own inverse
    raise ValueError(f"layout: {layout!r}")


def make_inputs(case: Case, dtype: torch.dtype, device: str = "cpu") -> list[torch.Tensor]:
    """The tensors of a case, rounded to ``dtype``, as leaves; a product comes out about 1."""
    generator = torch.Generator().manual_seed(case.seed)
    made = []
    for name, shape in zip(NAMES, case.shapes, strict=False):
        values = torch.randn(shape, generator=generator, dtype=torch.float64)
        if name == "weight":
            values /= max(values[0].numel(), 1) ** 0.5
        if not case.arguments.get("signed", True):
            values = values.relu()
        values = values.to(dtype).to(device)
        layout = case.layout
        if name == "weight" and layout not in ("contiguous", "unaligned"):
            layout = "reversed"
        values = lay_out(values, layout) if values.dim() > 1 else values
        made.append(values.detach().requires_grad_(name not in case.frozen))
    return made


def make_gradient(case: Case, tensors: list[torch.Tensor], output: torch.Tensor) -> torch.Tensor:
    """A gradient of the output, zero where rounding decides which element of a window gets it."""
    generator = torch.Generator().manual_seed(case.seed + 1)
    values = torch.randn(output.shape, generator=generator, dtype=torch.float64)
    values = values.to(output.dtype).to(output.device)
    if case.op == "lrn_max_pool2d" and output.numel():
        values[_near_ties(case, tensors[0], output.shape)] = 0
    return lay_out(values, case.layout)


def _near_ties(case: Case, x: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """The windows whose two largest normalised values differ, but by less than 2^-19 of them."""
    names = ("size", "alpha", "beta", "k", "groups")
    defaults = {"size": 5, "alpha": 1e-4, "beta": 0.75, "k": 2.0}
    arguments = defaults | {n: v for n, v in case.arguments.items() if n in names}
    y = reference.local_response_norm(x.detach().double(), **arguments)
    window, stride = case.arguments.get("kernel_size", 3), case.arguments.get("stride", 2)
    if window == 1:
        return torch.zeros(shape, dtype=torch.bool, device=x.device)
    (P, Q), (H, W) = shape[2:], y.shape[2:]
    hang = [max(0, (n - 1) * stride + window - m) for n, m in ((Q, W), (P, H))]
    y = F.pad(y, (0, hang[0], 0, hang[1]), value=float("-inf")).flatten(0, 1)[:, None]
    first, second = F.unfold(y, window, stride=stride).topk(2, dim=1)[0].unbind(1)
    near = (first > second) & (first - second < 2.0**-19 * first.abs())
    return near.view(shape)


def call(case: Case, module: Any, tensors: list[torch.Tensor]) -> torch.Tensor:
    arguments = dict(case.arguments)
    if case.op == "linear_relu_dropout":
        rng = torch.tensor([case.seed - 5, 3 << 33 | case.seed], device=tensors[0].device)
        arguments.setdefault("rng", rng)
    return getattr(module, case.op)(*tensors, **arguments)


def run(case: Case, tensors: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Output and gradients of the function under test, by name."""
    output = call(case, fastalex_kernels, tensors)
    return _backward(case, output, tensors, make_gradient(case, tensors, output))


def run_reference(
    case: Case, tensors: list[torch.Tensor], gradient: torch.Tensor
) -> dict[str, torch.Tensor]:
    """The same from the reference in float64, on the values of ``tensors`` and ``gradient``."""
    wide = [t.detach().double().contiguous() for t in tensors]
    wide = [w.requires_grad_(t.requires_grad) for w, t in zip(wide, tensors, strict=True)]
    output = call(case, reference, wide)
    return _backward(case, output, wide, gradient.double())


def _backward(
    case: Case, output: torch.Tensor, tensors: list[torch.Tensor], gradient: torch.Tensor
) -> dict[str, torch.Tensor]:
    names = [n for n, t in zip(NAMES, tensors, strict=False) if t.requires_grad]
    wanted = [t for t in tensors if t.requires_grad]
    found = torch.autograd.grad(output, wanted, gradient) if wanted else ()
    return {"output": output.detach(), **dict(zip(names, found, strict=True))}


def reductions(case: Case, output: torch.Tensor) -> dict[str, int]:
    """How many products are summed for one element of the output and of each gradient."""
    if case.op not in ("conv2d_relu", "linear_relu_dropout"):
        return {}
    weight = case.shapes[1]
    per_output = 1
    for n in weight[1:]:
        per_output *= n
    pixels = output.numel() // max(output.shape[1], 1)
    per_input = per_output * weight[0] // weight[1]
    return {"output": per_output, "input": per_input, "weight": pixels, "bias": pixels}


def measure(
    case: Case, dtype: torch.dtype, device: str = "cpu"
) -> tuple[dict[str, float], dict[str, float]]:
    """Relative errors of output and gradients by name, and the bound of each."""
    tensors = make_inputs(case, dtype, device)
    before = [t.detach().clone() for t in tensors]
    results = run(case, tensors)
    for name, tensor, value in zip(NAMES, tensors, before, strict=False):
        assert torch.equal(tensor, value), f"{name} was changed"
    expected = run_reference(case, tensors, make_gradient(case, tensors, results["output"]))
    assert results.keys() == expected.keys()
    lengths = reductions(case, results["output"])
    precision = dot_precision(tensors[0], case.op)
    errors, bounds = {}, {}
    for name, ref in expected.items():
        assert results[name].shape == ref.shape, name
        assert results[name].dtype == dtype, name
        errors[name] = relative_error(results[name], ref)
        bounds[name] = tolerance(dtype, lengths.get(name, 0), precision)
    return errors, bounds


def check(case: Case, dtype: torch.dtype, device: str = "cpu", slack: float = 1.0) -> None:
    """Fail unless output and every gradient lie within ``slack`` times their bounds."""
    errors, bounds = measure(case, dtype, device)
    wrong = {n: (e, bounds[n]) for n, e in errors.items() if not e <= slack * bounds[n]}
    assert not wrong, f"{case.name} in {dtype}: (error, bound) {wrong}"


def variants(case: Case, **changes: list[Any]) -> list[Case]:
    """The case once for each value of one of its fields."""
    ((name, values),) = changes.items()
    return [replace(case, name=f"{case.name}-{v}", **{name: v}) for v in values]
