"""The kernels of a run, compiled on all cores before its first step.

A first step would compile them one after the other, and say nothing meanwhile. Here the steps of a
run are recorded on tensors without data, the validation and the shorter last batches too, and their
kernels compiled in a pool of processes, into Triton's cache. A file there says that it was done;
a lock lets the processes of one machine do it once.
"""

from __future__ import annotations

import fcntl
import hashlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch._subclasses.fake_tensor import FakeTensorMode
from tqdm import tqdm

from fastalex.common.compile import can_compile, compile_ahead, without_data
from fastalex.data import Normalization, decode_size
from fastalex.data.augment import Augment
from fastalex.distributed.exchange import LoopbackExchange
from fastalex.distributed.towers import cut_to_tower
from fastalex.model.alexnet import AlexNet
from fastalex.training.check import float32_precisions, kernels_version
from fastalex.training.optim import build_optimizer
from fastalex.training.step import TrainStep, Tricks
from fastalex_kernels.common.backend import record_launches
from fastalex_kernels.common.launch import collecting
from fastalex_kernels.common.program import Launch, Program, tensor_of
from fastalex_kernels.common.tuned import table_path


class Work(NamedTuple):
    """What a run computes.

    Attributes:
        variant: of the net.
        classes: of the net.
        image_size: side in pixels.
        train_batches, val_batches: numbers of images of a batch, each size once.
        precision: of ``TrainStep``.
        rule: of momentum.
        fused_update: whether kernels apply the gradients.
        towers: 2 where this process has one of two.
        normalization: of the pixels.
        augmentation: of training, which decides what a batch of bytes holds.
        dropout: probability.
    """

    variant: str
    classes: int
    image_size: int
    train_batches: Sequence[int]
    val_batches: Sequence[int]
    precision: str
    rule: str
    fused_update: bool
    towers: int
    normalization: Normalization
    augmentation: str
    dropout: float


def launches_of(work: Work, target: str) -> list[Launch]:
    """Every launch of a kernel in the run's steps on ``target``, on tensors without data."""
    launches: list[Launch] = []
    with FakeTensorMode(allow_non_fake_inputs=True), record_launches(target, lambda *_: None):
        model = AlexNet(work.classes, work.dropout, work.variant)
        if work.towers > 1:
            cut_to_tower(model, LoopbackExchange())
        optimizer = build_optimizer(model, lr=0.01, rule=work.rule)
        cpu, colored = torch.device("cpu"), work.augmentation == "full"
        augment = Augment(work.normalization, work.image_size, cpu, colored)
        tricks = Tricks(fused_update=work.fused_update)
        step = TrainStep(model, optimizer, work.precision, augment=augment, tricks=tricks)
        for count in work.train_batches:
            model.seed_dropout(0, 0)
            step(*_batch(count, work, work.augmentation))
            launches += [x for x in step.launches if x.grid is not None]
        model.eval()
        augment = Augment(work.normalization, work.image_size, cpu)
        narrow = work.precision == "bf16"
        for count in work.val_batches:
            pixels, labels = _batch(count, work, "none")
            program = Program([labels])
            with (
                torch.no_grad(),
                collecting(program),
                torch.autocast("cpu", dtype=torch.bfloat16, enabled=narrow),
            ):
                model(augment(*pixels))
            launches += [x for x in program.launches if x.grid is not None]
    storages: dict[int, torch.UntypedStorage] = {}
    return [without_data(launch, storages) for launch in launches]


def _batch(count: int, work: Work, augmentation: str) -> tuple[list[torch.Tensor], torch.Tensor]:
    side = work.image_size if augmentation == "resized" else decode_size(work.image_size)
    pixels = [torch.empty(count, side, side, 3, dtype=torch.uint8)]
    pixels += [torch.empty(count, dtype=torch.int32) for _ in range(2)]
    pixels.append(torch.empty(count, dtype=torch.bool))
    pixels += [torch.empty(count, 3)] if augmentation == "full" else []
    return pixels, torch.empty(count, dtype=torch.int64)


def unique(launches: Iterable[Launch]) -> list[Launch]:
    """One launch of each that Triton compiles apart: by constants, dtypes and alignment."""
    return list({_specialisation(launch): launch for launch in launches}.values())


def _specialisation(launch: Launch) -> str:
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


def compile_first(work: Work, target: str, device: str, say: Callable[[str], object]) -> int:
    """Compile the kernels of a run, unless this machine has them.

    Args:
        work: of the run.
        target: as ``fastalex_kernels`` names the GPU.
        device: the GPU's own name.
        say: is told that it takes a while.

    Returns:
        The number of kernels that were compiled.
    """
    if not can_compile(target):
        say("compiling kernels during the first steps, once on this machine")
        return 0
    folder = Path(triton.knobs.cache.dir)
    folder.mkdir(parents=True, exist_ok=True)
    said = repr((work._replace(normalization=None), target, triton.__version__))  # type: ignore[arg-type]
    said += f"{work.normalization.mean_image is None} {kernels_version(table_path(device))}"
    said += " ".join(float32_precisions())
    done = folder / f"fastalex_{hashlib.sha256(said.encode()).hexdigest()[:16]}"
    with open(folder / "fastalex.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if done.exists():
            return 0
        jobs = unique(launches_of(work, target))
        say(f"compiling {len(jobs)} kernels, once on this machine")
        results = compile_ahead([[job] for job in jobs], target)
        bar = tqdm(results, "compiling", len(jobs), unit=" kernels", leave=False, disable=None)
        for job in bar:
            if job.failure:  # the first step tells which, and goes on without
                return len(jobs)
        done.touch()
        return len(jobs)
