"""The kernels of a run, compiled on all cores before its first step.

A first step would compile them one after the other, and say nothing meanwhile. Here the run's step
is done once on tensors without data, the validation of each batch too, and what they launch is
compiled in a pool of processes, into Triton's cache. A file there says that it was done; a lock
lets the processes of one machine do it once.
"""

from __future__ import annotations

import copy
import fcntl
import hashlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import triton
from tqdm import tqdm

import fastalex_kernels as kernels
from fastalex.common.compile import TARGETS, compile_ahead, record
from fastalex.data import decode_size
from fastalex.distributed.exchange import LoopbackExchange
from fastalex.distributed.towers import cut_to_tower
from fastalex.model.alexnet import AlexNet
from fastalex.training.autograd_step import autocast
from fastalex.training.check import kernels_version
from fastalex.training.optim import build_optimizer, update_rule
from fastalex.training.step import TrainStep
from fastalex_kernels.common.backend import device_name
from fastalex_kernels.common.backend import target as target_of
from fastalex_kernels.common.program import Launch, tensor_of
from fastalex_kernels.common.tuned import choosing, read_table, table_path


def launches_of(
    step: TrainStep, augmentation: str, counts: Sequence[int], target: str, device: str
) -> list[Launch]:
    """Every launch of a run on ``target``, on tensors without data; see ``compile_first``."""
    real, cpu, augment = step.model, torch.device("cpu"), copy.copy(step.augment)
    assert augment is not None
    try:
        tiles = read_table(table_path(device), device)
    except (OSError, ValueError):
        tiles = {}

    def batch(count: int, augmentation: str) -> tuple[list[torch.Tensor], torch.Tensor]:
        side = augment.size if augmentation == "resized" else decode_size(augment.size)
        pixels = [torch.empty(count, side, side, 3, dtype=torch.uint8)]
        pixels += [torch.empty(count, dtype=torch.int32) for _ in range(2)]
        pixels.append(torch.empty(count, dtype=torch.bool))
        pixels += [torch.empty(count, 3)] if augmentation == "full" else []
        return pixels, torch.empty(count, dtype=torch.int64)

    def run() -> None:
        mean, scale, centred = augment.norm
        mean, scale = (x if x is None else torch.empty_like(x, device=cpu) for x in (mean, scale))
        augment.norm = kernels.PixelNorm(mean, scale, centred)
        model = AlexNet(real.num_classes, real.dropout, real.variant)
        if step.exchange is not None:
            cut_to_tower(model, LoopbackExchange())
        rule, group = update_rule(step.optimizer), step.optimizer.param_groups[0]
        dtype = group.get("momentum_dtype", torch.float32)
        optimizer = build_optimizer(model, lr=0.01, rule=rule, momentum_dtype=dtype)
        twin = TrainStep(model, optimizer, step.precision, augment=augment, tricks=step.tricks)
        model.seed_dropout(0, 0)
        twin(*batch(counts[0], augmentation))
        model.eval()
        with torch.no_grad(), autocast(step.precision, cpu):
            for count in counts:
                model(augment(*batch(count, "none")[0]))

    with choosing(lambda key, own: tiles.get(key, own)):
        return record(target, run)


def unique(launches: Iterable[Launch]) -> list[Launch]:
    """One launch of each that Triton compiles apart: by constants, dtypes and alignment."""
    return list({specialisation(launch): launch for launch in launches}.values())


def specialisation(launch: Launch) -> str:
    """What Triton compiles a launch for."""

    def described(value: Any, constant: bool) -> Any:
        x = tensor_of(value)
        if x is not None:
            block = getattr(value, "block_shape", None)
            return str(x.dtype), block, x.storage_offset() * x.element_size() % 16 == 0
        if constant or not isinstance(value, int) or isinstance(value, bool):
            return value if constant else type(value).__name__
        return value == 1, value % 16 == 0, -(2**31) <= value < 2**31

    constants = [p.is_constexpr for p in launch.kernel.params]
    pairs = zip(launch.arguments, constants, strict=True)
    return repr((launch.name, launch.options, [described(*pair) for pair in pairs]))


def compile_first(
    step: TrainStep, augmentation: str, counts: Sequence[int], say: Callable[[str], object]
) -> int:
    """Compile the kernels of a run, unless this machine has them.

    Args:
        step: of the run, on a GPU.
        augmentation: of training, which decides what a batch of bytes holds.
        counts: of images of a batch, in training the first and in validation all.
        say: is told that it takes a while.

    Returns:
        The number of kernels that were compiled.
    """
    place = next(step.model.parameters()).device
    target, device = target_of(place), device_name(place) or ""
    if target not in TARGETS:
        say("compiling kernels during the first steps, once on this machine")
        return 0
    jobs = unique(launches_of(step, augmentation, counts, target, device))
    folder = Path(triton.knobs.cache.dir)
    folder.mkdir(parents=True, exist_ok=True)
    known = [target, triton.__version__, kernels_version(table_path(device))]
    said = repr([*known, *map(specialisation, jobs)])
    done = folder / f"fastalex_{hashlib.sha256(said.encode()).hexdigest()[:16]}"
    with open(folder / "fastalex.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if done.exists():
            return 0
        say(f"compiling {len(jobs)} kernels, once on this machine")
        results = compile_ahead([[job] for job in jobs], target)
        bar = tqdm(results, "compiling", len(jobs), unit=" kernels", leave=False, disable=None)
        if not any(job.failure for job in bar):  # else the first step tells which, and goes on
            done.touch()
        return len(jobs)
