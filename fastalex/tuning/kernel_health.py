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
from fastalex.common.compile import check_target, compile_ahead, first_line
from fastalex.inspection.record import record_step
from fastalex.training.check import VARIABLE, Verdicts
from fastalex.training.precompile import unique
from fastalex.tuning.train_steps import Training, train_step
from fastalex_kernels import reference
from fastalex_kernels.common.backend import interpreted as is_interpreted
from fastalex_kernels.common.backend import target as target_of
from fastalex_kernels.common.backend import too_old
from fastalex_kernels.reference import relative_error, tolerance

Row = tuple[Any, ...]  # what doctor.Row is made of

_BATCH = 128


def compiled(targets: Sequence[str]) -> Iterator[Row]:
    """Whether every kernel of a training step in bfloat16 compiles for some targets."""
    part = "kernels compile for"
    if is_interpreted():
        yield (part, "Triton", "-", "TRITON_INTERPRET=1 is set: nothing can be compiled")
        return
    for name in targets:
        start = time.monotonic()
        try:
            check_target(name)
        except ValueError as error:
            yield (part, name, "wrong", str(error))
            continue
        events = record_step(name, _BATCH).events
        jobs = unique(event.launch for event in events if event.launch is not None)
        found = compile_ahead([[job] for job in jobs], name)
        done = list(tqdm(found, name, len(jobs), unit=" kernels", leave=False, disable=None))
        pairs = zip(jobs, done, strict=True)
        failed = [
            f"; {job.name} of {job.layer}: {one.failure}" for job, one in pairs if one.failure
        ]
        seconds = {"seconds": time.monotonic() - start, "cpu": sum(one.seconds for one in done)}
        text = f"{len(jobs)} kernels of a bf16 step at batch {_BATCH}, {seconds['cpu']:.0f} s "
        text += f"of CPU, {seconds['seconds']:.0f} s"
        yield (part, name, "wrong" if failed else "ok", text + "".join(failed), seconds)


def on_gpu(everything: bool) -> Iterator[Row]:
    """Every layer of a training step on the GPU: right by how much, its time, what it uses."""
    device = torch.device("cuda", torch.cuda.current_device())
    if why := too_old(device.index):
        yield ("kernels", "GPU", "-", why)
        return
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
        text = f"error {verdict.error:.1e}, allowed {verdict.allowed:.1e}"
        if verdict.ours is not None and verdict.aten is not None:
            text += f"; {1e6 * verdict.ours:.0f} us, ATen {1e6 * verdict.aten:.0f}"
        text += f"; a step uses {verdict.uses}"
        text += f"; {verdict.wrong}" if verdict.wrong else ""
        state = "wrong" if verdict.wrong else "ok"
        values = {**vars(verdict), "uses": verdict.uses, "batch": batch}
        yield (f"{precision}, batch {batch}", key.split()[0], state, text, values)


def interpreted() -> Iterator[Row]:
    """Each function at a small size in Triton's interpreter, against float64."""
    torch.manual_seed(0)
    maps, rows = torch.randn(2, 16, 7, 7), torch.randn(3, 20)
    filters, weight = torch.randn(16, 8, 3, 3), torch.randn(24, 20)
    calls: dict[str, tuple[list[torch.Tensor], dict[str, Any]]] = {
        "conv2d_relu": ([maps, filters], {"padding": 1, "groups": 2}),
        "lrn_max_pool2d": ([maps], {"groups": 2}),
        "max_pool2d": ([maps], {}),
        "linear_relu_dropout": ([rows, weight], {"rng": torch.tensor([1, 2])}),
        "cross_entropy": ([rows], {"target": torch.arange(3)}),
    }
    for name, (tensors, options) in calls.items():
        wide = [x.double() for x in tensors]
        expected = _with_gradients(getattr(reference, name), wide, options)
        try:
            with kernels.backend("interpreter"):
                found = _with_gradients(getattr(kernels, name), tensors, options)
        except Exception as error:  # of any kind: it is what the doctor looks for
            yield ("interpreted", name, "wrong", first_line(error))
            continue
        worst, allowed = max(map(relative_error, found, expected)), tolerance(torch.float32, 0)
        text = f"error {worst:.1e}, allowed {allowed:.1e}, with its gradients"
        verdict, values = (
            "ok" if worst <= allowed else "wrong",
            {"error": worst, "allowed": allowed},
        )
        yield ("interpreted", name, verdict, text, values)


def _with_gradients(
    function: Callable[..., torch.Tensor], tensors: list[torch.Tensor], options: dict[str, Any]
) -> list[torch.Tensor]:
    leaves = [x.detach().requires_grad_() for x in tensors]
    output = function(*leaves, **options)
    return [output, *torch.autograd.grad(output.sum(), leaves)]
