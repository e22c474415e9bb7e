"""Whether each kernel compiles, is right and is fast here: rows of the doctor's table."""

from __future__ import annotations

import itertools
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import torch
from tqdm import tqdm

import fastalex_kernels as kernels
from fastalex.common.compile import TARGETS, check_target, compile_ahead
from fastalex.inspection.record import record_step
from fastalex.training.check import VARIABLE, Verdicts
from fastalex.training.precompile import unique
from fastalex.tuning.train_steps import Training, train_step
from fastalex_kernels import reference
from fastalex_kernels.common.backend import interpreted as is_interpreted
from fastalex_kernels.common.backend import target as target_of
from fastalex_kernels.reference import relative_error, tolerance

Row = tuple[Any, ...]  # part, what, verdict, text, values: of doctor.Row

_BATCH = 128


def targets(quick: Sequence[str], everything: bool) -> list[str]:
    """Those to compile for where there is no GPU."""
    return list(TARGETS) if everything else list(quick)


def compiled(names: Sequence[str], dtype: str = "bf16") -> Iterator[Row]:
    """Whether every kernel of a training step compiles for some targets."""
    if is_interpreted():
        text = "TRITON_INTERPRET=1 is set: nothing can be compiled"
        yield ("kernels compile for", "Triton", "-", text)
        return
    for name in names:
        start = time.monotonic()
        try:
            check_target(name)
        except ValueError as error:
            yield ("kernels compile for", name, "wrong", str(error))
            continue
        events = record_step(name, _BATCH, dtype).events
        jobs = unique(event.launch for event in events if event.launch is not None)
        found = compile_ahead([[job] for job in jobs], name)
        done = list(tqdm(found, name, len(jobs), unit=" kernels", leave=False, disable=None))
        failed = [
            f"{job.name} of {job.layer}: {one.failure}"
            for job, one in zip(jobs, done, strict=True)
            if one.failure
        ]
        seconds = {"seconds": time.monotonic() - start, "cpu": sum(one.seconds for one in done)}
        text = f"{len(jobs)} kernels of a {dtype} step at batch {_BATCH}, {seconds['cpu']:.0f} s "
        text += f"of CPU, {seconds['seconds']:.0f} s"
        verdict = "wrong" if failed else "ok"
        yield ("kernels compile for", name, verdict, "\n".join([text, *failed]), seconds)


def on_gpu(everything: bool) -> Iterator[Row]:
    """Every layer of a training step on the GPU: right by how much, its time, what it uses."""
    device = torch.device("cuda", torch.cuda.current_device())
    yield from compiled([target_of(device)])
    batches = (_BATCH, 1024) if everything else (_BATCH,)
    for precision, batch in itertools.product(("bf16", "float32"), batches):
        with mock.patch.dict(os.environ, {VARIABLE: "always"}):
            train_step(Training(device, precision, batch), graph=False)()
        yield from verdict_rows(Verdicts(device), precision, batch)


def verdict_rows(store: Verdicts, precision: str, batch: int) -> Iterator[Row]:
    """What the first-use check found of the layers of a step."""
    kind = "bfloat16" if precision == "bf16" else precision
    for key, verdict in store.known.items():
        if not re.search(rf"\[{batch}[],].* {kind}", key):
            continue
        name = key.split()[0]
        text = f"error {verdict.error:.1e}, allowed {verdict.allowed:.1e}"
        if verdict.ours is not None and verdict.aten is not None:
            text += f"; {1e6 * verdict.ours:.0f} us, ATen {1e6 * verdict.aten:.0f}"
        text += f"; a step uses {verdict.uses}"
        text += f"\n{verdict.wrong}" if verdict.wrong else ""
        state = "wrong" if verdict.wrong else "ok"
        values = {**vars(verdict), "uses": verdict.uses, "batch": batch}
        yield (f"{precision}, batch {batch}", name, state, text, values)


def interpreted() -> Iterator[Row]:
    """Each function at a small size in Triton's interpreter, against float64."""
    torch.manual_seed(0)
    seed = torch.tensor([1, 2])
    maps = torch.randn(2, 16, 7, 7, requires_grad=True)
    rows = torch.randn(3, 20, requires_grad=True)
    filters = torch.randn(16, 8, 3, 3, requires_grad=True)
    weight = torch.randn(24, 20, requires_grad=True)
    calls: dict[str, tuple[Callable[[Any], Any], list[torch.Tensor]]] = {
        "conv2d_relu": (lambda of: lambda x, w: of(x, w, padding=1, groups=2), [maps, filters]),
        "lrn_max_pool2d": (lambda of: lambda x: of(x, groups=2), [maps]),
        "max_pool2d": (lambda of: of, [maps]),
        "linear_relu_dropout": (lambda of: lambda x, w: of(x, w, rng=seed), [rows, weight]),
        "cross_entropy": (lambda of: lambda x: of(x, torch.arange(3)), [rows]),
    }
    for name, (bind, tensors) in calls.items():
        wide = [x.detach().double().requires_grad_() for x in tensors]
        expected = bind(getattr(reference, name))(*wide)
        try:
            with kernels.backend("interpreter"):
                found = bind(getattr(kernels, name))(*tensors)
                dy = torch.ones_like(found)
                gradients = torch.autograd.grad(found, tensors, dy)
        except Exception as error:  # of any kind: it is what the doctor looks for
            line = (str(error).strip().splitlines() or [""])[0]
            yield ("interpreted", name, "wrong", f"{type(error).__name__}: {line}")
            continue
        wanted = torch.autograd.grad(expected, wide, dy.double())
        pairs = zip((found, *gradients), (expected, *wanted), strict=True)
        error_, allowed = max(relative_error(*pair) for pair in pairs), tolerance(torch.float32, 0)
        text = f"error {error_:.1e}, allowed {allowed:.1e}, with its gradients"
        verdict = "ok" if error_ <= allowed else "wrong"
        yield ("interpreted", name, verdict, text, {"error": error_, "allowed": allowed})
