"""A layer's kernels beside float64, and their time beside ATen's, on the data of a step.

Each pass runs twice, into memory that was filled with NaN. Its results have to be the same bits
both times, and those of the layer's module in float64, on ATen, from the same rounded inputs: the
whole of a result within the bounds of TOLERANCES, and each row and each channel of it.
"""

from __future__ import annotations

import contextlib
import copy
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from fastalex.common.compile import first_line
from fastalex.common.timing import Clock, take_turns
from fastalex.distributed.exchange import LoopbackExchange
from fastalex.distributed.launch import TrainingError
from fastalex.model.layers import LRNMaxPool2d
from fastalex.training.chain import Chain
from fastalex.training.inputs import Inputs
from fastalex.training.passes import Convolution, FullyConnected, Pass, Pool, Sum, added
from fastalex.training.updates import StoredGradients
from fastalex_kernels import reference
from fastalex_kernels.common.backend import backend, chosen
from fastalex_kernels.common.layout import as_nchw
from fastalex_kernels.common.program import Program
from fastalex_kernels.common.tuned import dot_precision
from fastalex_kernels.momentum import RULES, MomentumUpdate, round_stochastically
from fastalex_kernels.reference import relative_error, tolerance

Tensor = torch.Tensor

Results = dict[str, Tensor]
Expected = dict[str, tuple[Tensor, float]]  # float64's results, and the relative errors allowed

REPORT = "please report it with the output of python -m fastalex.doctor --json"
SUMS = "sums of the input's gradient"  # partial sums, of which the total is known
_ROUNDS = 10  # that a layer is timed
_MARGIN = 0.05  # of time, by which ATen has to be faster
_IMAGES = 32  # of which float64 is computed at once
_NEAR_TIE = 1e-4  # of the larger of two values: where they are closer, either is the maximum
# The rounding to 16 bits is within the bound in each element. In float32 the error of a sum is a
# random walk's, and that of the worst of 10^5 rows is so many times the mean.
_SLICE = {torch.float32: 4}
_STEP = 2.0**-7  # from a bfloat16 to the next, at most, of the smaller one


class NotChecked(RuntimeError):
    """The kernels can't be checked now; the message says why."""


@dataclass
class Verdict:
    """What the check found of a layer.

    Attributes:
        error, allowed: of the result that was closest to its bound, or past it.
        wrong: what is wrong, naming the kernels; None where all is right.
        ours, aten: seconds of both passes; None where they were not timed.
    """

    error: float = 0.0
    allowed: float = 0.0
    wrong: str | None = None
    ours: float | None = None
    aten: float | None = None

    @property
    def reason(self) -> str:
        """Why a step does without the kernels."""
        if self.wrong:
            return f"as its kernels are wrong here: {self.wrong}; {REPORT}"
        assert self.ours is not None
        assert self.aten is not None
        return f"which takes {1e6 * self.aten:.0f} us here, its kernels {1e6 * self.ours:.0f}"

    @property
    def uses(self) -> str:
        """The backend of the layer in a step; ``backend("triton")`` takes a slow kernel too."""
        timed = self.ours is not None and self.aten is not None
        slow = timed and self.aten < (1 - _MARGIN) * self.ours  # type: ignore[operator]
        return "aten" if self.wrong or (slow and chosen() != "triton") else "triton"


def has_kernels(one: Pass) -> bool:
    """Whether a pass is one of kernels, and not of torch's operators."""
    return isinstance(one, (Convolution, Pool, FullyConnected))


def slice_error(out: Tensor, ref: Tensor) -> float:
    """The relative error of the worst row or channel, which is the last axis.

    A slice that is smaller than one mean element counts as large as that: it may be what a sum left
    whose terms cancelled.
    """
    ref = ref.reshape(-1, ref.shape[-1] if ref.dim() else 1).double()
    difference, element = out.reshape(ref.shape).double() - ref, ref.square().mean().sqrt()
    least = torch.where(element > 0, element, 1.0)
    worst = [(difference.norm(dim=i) / ref.norm(dim=i).clamp(least)).max() for i in (0, 1)]
    return float(torch.stack(worst).max())  # NaN where one is


class Check:
    """The kernels of a part beside what they should come to; fills in the verdict."""

    def __init__(self, name: str, dtype: torch.dtype) -> None:
        self.name, self.dtype, self.verdict = name, dtype, Verdict()
        self.programs: list[Program] = []  # of passes that ran

    def layer(self, one: Any, x: Tensor, read: Tensor) -> Tensor:
        """Check both passes on ``x``, which the layer's module takes as ``read``.

        The gradient of the output is random, but for elements whose sign is within rounding.

        Returns:
            The output, float64's where the kernels' is wrong.
        """
        self._one, self._given = one, read
        self._x = torch.cat([read, read], -1) if one.gather is not None else read
        wide, _ = in_float64(one.module, self._x)
        if one.outputs is not None:
            bias = one.module.bias  # is added once
            wide = 2 * wide - (0 if bias is None else bias.detach().to(read.dtype).double())
        expected = {"output": (wide, self._bound(self._length(0)))}
        made = self.run("forward", lambda: {"output": one.forward(x)}, [x], expected)
        y = made.get("output", wide.to(x.dtype).contiguous())
        generator = torch.Generator(y.device).manual_seed(0)
        dy = torch.randn(y.shape, generator=generator, device=y.device)
        if one.relu:
            dy *= (y > 0) & (wide > 0) if one.dy_is_preact else (y > 0) == (wide > 0)
        if isinstance(one, Pool):
            dy *= one_maximum(one, self._x)
        self._dy = dy.to(y.dtype)
        if self.verdict.wrong is None:
            self._backward(self._dy)
        return y

    def _backward(self, dy: Tensor) -> None:
        one, updates, rows = self._one, self._updates(), dy.numel() // dy.shape[-1]
        dx, gradients = in_float64(one.module, self._x, dy)
        dx = torch.where(self._x <= 0, 0.0, dx) if one.masks_dx else dx
        if one.gather is not None:
            mine, theirs = dx.chunk(2, -1)
            dx = mine + theirs
        expected = {"gradient of the input": (dx, self._bound(self._length(1)))}
        expected[SUMS] = (dx.flatten(0, -2).sum(0), self._bound(dx.numel() // dx.shape[-1]))
        changed = self._expect_updates(expected, gradients, rows)
        partials = dy.flatten(0, -2).sum(0, dtype=torch.float32)[None] if one.dy_is_preact else None

        given: Any = dy
        if one.dy_is_sum:
            mine = torch.arange(dy.numel(), device=dy.device).view(dy.shape) % 3 > 0
            given = Sum(dy * mine, dy * ~mine)

        def make() -> Results:
            dx, below = one.backward(given, partials)
            made = {"gradient of the input": None if dx is None else added(dx), SUMS: below}
            made |= changed
            made |= {f"squared norm of the {kind}'s gradient": u.squares for kind, u in updates}
            return {name: x for name, x in made.items() if x is not None}

        self.run("backward", make, [dy], expected, list(changed.values()))

    def run(
        self,
        phase: str,
        make: Callable[[], Results],
        inputs: Sequence[Tensor | None],
        expected: Expected,
        changed: Sequence[Tensor] = (),
    ) -> Results:
        """What ``make`` makes of ``inputs``, none where it is wrong; ``changed`` is put back."""
        if not all(bool(x.isfinite().all()) for x, _ in expected.values()):
            raise NotChecked(f"{self.name}: a result is not finite in float64 either")
        # The launches start as a step's do, so that nothing is compiled twice.
        program, before = Program(inputs, after_torch=True), [x.clone() for x in changed]
        program.at(self.name, phase)
        first: Results = {}
        try:
            with _poisoned_memory(), program.recording():
                made = make()
            first = {name: x.clone() for name, x in made.items()}
            _copy(before, changed)
            program.run()
            wrong = [line for name, x in first.items() if (line := self._judge(x, name, expected))]
            if not all(torch.equal(x, first[name]) for name, x in made.items()):
                wrong.append("two runs on the same data differ")
        except torch.OutOfMemoryError:  # which says nothing of the kernels
            raise
        except Exception as error:  # of any kind: a kernel that fails is named, and left out
            wrong = [first_line(error)]
        if wrong:
            kernels = dict.fromkeys(x.name for x in program.launches if x.grid is not None)
            self.verdict.wrong = f"{phase}: {wrong[0]}, by {', '.join(kernels) or 'a launch'}"
            _check_gpu(self.verdict.wrong)
        self.programs.append(program)
        _copy(before, changed)
        return {} if wrong else first

    def _judge(self, out: Tensor, name: str, expected: Expected) -> str | None:
        """What is wrong with a result, if anything is."""
        (ref, bound), verdict, dtype = expected[name], self.verdict, out.dtype
        out = out.reshape(-1, ref.numel()).sum(0, dtype=torch.float64).view(ref.shape)  # partials
        error = relative_error(out, ref)
        if not error * verdict.allowed <= verdict.error * bound or verdict.allowed == 0:
            verdict.error, verdict.allowed = error, bound
        if not error <= bound:  # NaN is not
            return f"{name} {error:.1e} from float64, allowed {bound:.1e}"
        worst, allowed = slice_error(out, ref), bound * _SLICE.get(self.dtype, 1)
        allowed = max(allowed, tolerance(dtype, 0))
        if not worst <= allowed:
            return f"a row or channel of {name} {worst:.1e} from float64, allowed {allowed:.1e}"
        return None

    def _length(self, axis: int) -> int:
        """Products that are summed for an element of the output, or of the input's gradient."""
        w = getattr(self._one.module, "weight", None)
        return 0 if w is None else int(w.numel() // w.shape[axis])

    def _bound(self, length: int, dtype: torch.dtype | None = None) -> float:
        """The relative error of a result, of ``dtype`` or x's, of sums of so many products."""
        kernel = "conv2d" if isinstance(self._one, Convolution) else "linear"
        products = not isinstance(self._one, Pool)
        precision = dot_precision(self._x, kernel) if products else "ieee"
        return tolerance(dtype or self.dtype, length, precision)

    def _expect_updates(
        self, expected: Expected, gradients: Sequence[Tensor], length: int
    ) -> Results:
        """Add what becomes of the parameters, by sums of so many products; where kernels write it.

        Rates and momentum are chosen so that no part of the rule drowns another.
        """
        changed: Results = {}
        bound, exact = self._bound(length), self._bound(length, torch.float32)

        def expect(what: str, place: Tensor, value: Tensor, rows: int) -> None:
            changed[what], expected[what] = place, (value.reshape(rows, -1), bound)

        for i, ((kind, of), g) in enumerate(zip(self._updates(), gradients, strict=True)):
            w, v = of.parameter.detach(), of.buffer
            if isinstance(self._one.update, StoredGradients):
                expect(f"gradient of the {kind}", self._one.update.gradients[i], g, len(g))
                continue
            size, step = float(w.norm()) or 1.0, float(g.norm()) or 1.0
            of.rate = torch.tensor([size / step, 0.5, step / size / 4], device=w.device)
            v.copy_(g.roll(1, 0))
            new, momentum = w.double(), v.double()
            RULES[of.rule](new, momentum, g, *of.rate.double())
            expect(kind, w, new, len(w))
            expect(f"momentum of the {kind}", v, momentum, len(w))
            if of.rng is not None:
                kept = torch.empty_like(v)
                with backend("aten"):
                    round_stochastically(momentum.float(), of.rng, kept)
                # An error in float32 sends some elements, or a few, to their other neighbour.
                others = exact / _STEP + 4 / v.numel()
                expected[f"momentum of the {kind}"] = (kept.double(), _STEP * others**0.5)
            expected[f"squared norm of the {kind}'s gradient"] = (g.square().sum(), 2 * bound)
            if of.operand is not None:
                copied = new if of.pack is None else of.pack(new)
                expect(f"copy of the {kind}", of.operand, copied, copied[..., 0].numel())
        return changed

    def _updates(self) -> list[tuple[str, MomentumUpdate]]:
        updates = () if self._one.update is None else self._one.update.updates
        return [(kind, of) for kind, of in zip(("weight", "bias"), updates) if of is not None]  # noqa: B905

    def loss(self, chain: Chain, logits: Tensor, labels: Tensor) -> None:
        """Check the loss and the gradient of the logits."""
        leaf = logits.double().requires_grad_()
        with torch.enable_grad():
            mean = F.cross_entropy(leaf, labels)
        gradient = torch.autograd.grad(mean, leaf)[0], tolerance(self.dtype, 0)
        expected = {"loss": (mean.detach(), tolerance(torch.float32, 0)), "gradient": gradient}

        def make() -> Results:
            return dict(zip(expected, chain.loss(logits, labels), strict=True))

        self.run("forward", make, [logits, labels], expected)

    def time(self, rival: Pass, clock: Clock) -> None:
        """Time both passes beside those of ATen's ``rival``."""
        aten = Program([self._given])
        with aten.recording():
            rival.forward(self._given)
            rival.backward(self._dy, None)

        def ours() -> None:
            for program in self.programs:
                program.run()

        seconds = take_turns({"ours": ours, "aten": aten.run}, clock, _ROUNDS)
        self.verdict.ours, self.verdict.aten = map(statistics.median, seconds.values())


def check_parts(
    chain: Chain, names: Sequence[str], inputs: Inputs, clock: Clock | None
) -> dict[str, Verdict]:
    """Check every launch of a step, whose parameters are put back, and time its layers.

    Args:
        chain: of the step.
        names: of the parts that have kernels.
        inputs: of the step.
        clock: None times nothing.
    """
    *images, labels = inputs
    assert labels is not None
    alone = None if chain.exchange is None else LoopbackExchange()
    ours, aten = (replace(chain, exchange=alone, aten=chain.aten | on) for on in (set(), {*names}))
    dtype = chain.dtype
    checks = {name: Check(name, dtype) for name in names}
    with _put_back([x for u in chain.updates.values() for x in (u.parameter.detach(), u.buffer)]):
        for update in ours.updates.values():
            update.refresh()
        x = ours.first_input(images, by_kernel=False)
        if "augment" in names:
            make, expected = lambda: {"images": ours.first_input(images)}, (x, tolerance(dtype, 0))
            made = checks["augment"].run("forward", make, images, {"images": expected})
            x = made.get("images", x)
        read = aten.first_input(images)
        for (name, one), (_, rival) in zip(ours.passes(images), aten.passes(images), strict=True):
            if not has_kernels(one):
                read = x = one.forward(x)
                continue
            read = x = checks[name].layer(one, x, read)
            if clock is not None and checks[name].verdict.wrong is None:
                checks[name].time(rival, clock)
        if "loss" in names:
            checks["loss"].loss(ours, x, labels)
    return {name: check.verdict for name, check in checks.items()}


def in_float64(
    module: nn.Module, x: Tensor, dy: Tensor | None = None
) -> tuple[Tensor, list[Tensor]]:
    """A layer's output on ATen, from inputs and parameters as rounded to x's dtype.

    With ``dy``, the output's gradient, the input's is in its place, and the parameters' go along.
    """
    module = copy.copy(module)
    weights = [nn.Parameter(p.detach().to(x.dtype).double()) for p in module.parameters()]
    module._parameters = dict(zip(module._parameters, weights, strict=True))
    sums, parts, maps = [torch.zeros_like(w) for w in weights], [], x.dim() == 4
    if maps:  # some images at a time; rows, by whose number units are dropped, all at once
        tensors = (x,) if dy is None else (x, dy)
        pieces = list(zip(*(torch.split(as_nchw(t), _IMAGES) for t in tensors), strict=True))
    else:
        pieces = [(x,) if dy is None else (x, dy)]
    for given, *gradient in pieces:
        leaf = given.double().requires_grad_()
        with torch.enable_grad():
            y = module.forward(leaf)
        if not gradient:
            parts.append(y.detach())
            continue
        dx, *found = torch.autograd.grad(y, [leaf, *weights], gradient[0].double())
        parts.append(dx)
        for total, one in zip(sums, found, strict=True):
            total += one
    whole = torch.cat(parts)
    return (whole.permute(2, 3, 0, 1) if maps else whole), sums


def one_maximum(one: Pool, x: Tensor) -> Tensor:
    """1 where the gradient of a window has one place to go, else 0: [P, Q, N, C].

    That is where no second value is near the largest, or a ReLU below takes the gradient anyway.
    """
    module, masks = one.module, []
    for part in torch.split(as_nchw(x), _IMAGES):
        part = part.double()
        if isinstance(module, LRNMaxPool2d):
            norm = (module.size, module.alpha, module.beta, module.k)
            part = reference.local_response_norm(part, *norm, module.groups or 1)
        sides = tuple(map(module.output_size, part.shape[2:]))
        window = (module.kernel_size, module.stride)
        masked = one.masks_dx and F.max_pool2d(part, *window, ceil_mode=module.ceil_mode) <= 0
        masks.append(single_maxima(part, *window, sides) | masked)
    return torch.cat(masks).permute(2, 3, 0, 1).to(x.dtype)


def single_maxima(x: Tensor, size: int, stride: int, pooled: tuple[int, ...]) -> Tensor:
    """Which of the ``pooled`` windows of x [N, C, H, W] have no second value near the largest."""
    sides = zip(pooled, x.shape[2:], strict=True)
    below, right = (max(0, (n - 1) * stride + size - side) for n, side in sides)
    x = F.pad(x, (0, right, 0, below), value=float("-inf"))
    windows = x.unfold(2, size, stride).unfold(3, size, stride).flatten(-2)
    largest = windows.amax(-1, keepdim=True)
    near = windows >= largest - _NEAR_TIE * largest.abs()
    return near.sum(-1) == 1


@contextlib.contextmanager
def _put_back(tensors: Sequence[Tensor]) -> Iterator[None]:
    """Whatever happens inside the ``with`` block, the tensors are as before after it."""
    before = [x.clone() for x in tensors]
    try:
        yield
    finally:
        with contextlib.suppress(RuntimeError):  # of an unusable GPU, which is being told
            _copy(before, tensors)


def _copy(sources: Sequence[Tensor], targets: Sequence[Tensor]) -> None:
    for source, target in zip(sources, targets, strict=True):
        target.copy_(source)


@contextlib.contextmanager
def _poisoned_memory() -> Iterator[None]:
    """Let torch fill what is allocated with NaN, so that an element that nobody writes is seen."""
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn_only)


def _check_gpu(wrong: str) -> None:
    """Raise where a kernel left the GPU in an error that stays."""
    try:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    except RuntimeError as error:
        raise TrainingError(f"the GPU is unusable after {wrong}; {REPORT}") from error
