"""How many processes a run has, and what each of them is."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from fastalex.model.ablations import get_variant

_SHOWN = "CUDA_VISIBLE_DEVICES"
_BF16 = (8, 0)  # compute capability


@dataclass(frozen=True)
class World:
    """The processes of a run and how they share the work."""

    device_type: str  # "cuda" or "cpu"
    processes: int  # one per GPU
    towers: int  # processes that hold one net together, 1 or 2; the others are replicas
    threads: int  # of the CPU, for each

    @property
    def replicas(self) -> int:
        return self.processes // self.towers

    def describe(self) -> str:
        if self.device_type == "cuda":
            name = torch.cuda.get_device_name(device_index())
            return f"one GPU, {name}" if self.processes == 1 else f"{self.processes} GPUs, NCCL"
        threads = f"{self.threads} thread{'s' * (self.threads > 1)}"
        if self.processes == 1:
            return f"no GPU found: one CPU process, {threads}"
        return f"no GPU found: {self.processes} CPU processes, gloo, {threads} each"


def world_size() -> int:
    """How many processes a launcher started; 1 where there is none."""
    return int(os.environ.get("WORLD_SIZE", 1)) if under_launcher() else 1


def under_launcher() -> bool:
    """Whether this process was started as one of a world."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def rank() -> int:
    """This process's number, 0 where it is alone."""
    return int(os.environ["RANK"]) if under_launcher() else 0


def device_index() -> int:
    """This process's GPU; the only one where a scheduler shows each process its own."""
    return min(int(os.environ.get("LOCAL_RANK", 0)), max(0, torch.cuda.device_count() - 1))


def find_world(gpus: int | None, variant: str, threads: int | None = None) -> World:
    """The processes to run on, from what was asked for and what the machine has.

    Args:
        gpus: processes asked for; None is one, or what a launcher started.
        variant: one with two independent towers is cut in two where there are two processes,
            another is copied.
        threads: per process; None shares out the cores, or follows ``OMP_NUM_THREADS``.

    Raises:
        ValueError: where the machine lacks what was asked for, with what to do instead.
    """
    processes = local = gpus or 1
    if under_launcher():
        processes = world_size()
        local = int(os.environ.get("LOCAL_WORLD_SIZE", processes))
        if gpus not in (None, processes):
            raise ValueError(
                f"--gpus {gpus} under a launcher that started {processes} processes: "
                f"leave --gpus out or pass --gpus {processes}"
            )
    devices = torch.cuda.device_count()
    if 0 < devices < local and not (devices == 1 and under_launcher() and _SHOWN in os.environ):
        raise ValueError(
            f"{local} processes need {local} GPUs and there {'is' if devices == 1 else 'are'} "
            f"{devices}: use --gpus 1, or set CUDA_VISIBLE_DEVICES= to run them on the CPU"
        )
    towers = get_variant(variant).towers
    return World(
        device_type="cuda" if devices else "cpu",
        processes=processes,
        towers=towers if processes % towers == 0 else 1,
        threads=threads or _threads(local),
    )


def has_bf16(world: World) -> bool:
    """Whether this process's GPU multiplies bfloat16 on tensor cores."""
    gpu = world.device_type == "cuda"
    return gpu and torch.cuda.get_device_capability(device_index()) >= _BF16


def _threads(processes: int) -> int:
    # torchrun sets OMP_NUM_THREADS=1 unasked, so there it says nothing about what the user wants.
    if "OMP_NUM_THREADS" in os.environ and "TORCHELASTIC_RUN_ID" not in os.environ:
        return torch.get_num_threads()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, (cores or 1) // processes)
