"""A training process's place among the others."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from fastalex.common.timing import Stopwatch
from fastalex.distributed import towers
from fastalex.distributed.exchange import gather_rows
from fastalex.distributed.launch import TrainingError, is_lost_peer
from fastalex.distributed.watchdog import Watchdog
from fastalex.distributed.world import World, rank
from fastalex.model.alexnet import AlexNet


class _OneProcess:
    """Stands for the mesh of a single process, which needs no process group."""

    def __getitem__(self, axis: str) -> _OneProcess:
        return self

    def size(self) -> int:
        return 1

    def get_local_rank(self, axis: str) -> int:
        return 0


class ParallelContext:
    """The mesh of a run's processes, and the collectives that training needs of it.

    Args:
        world: of which this process is a member.
        watchdog: tells the other processes of this one's progress; None where it is alone.
    """

    def __init__(self, world: World, watchdog: Watchdog | None = None) -> None:
        self._watchdog = watchdog
        self.device = torch.device("cpu")
        if world.device_type == "cuda":
            self.device = torch.device("cuda", torch.cuda.current_device())
        self.mesh: Any = _OneProcess()
        if world.processes > 1:
            self.mesh = towers.init_mesh(world.device_type, world.replicas, world.towers)
        self.processes, self.replicas, self.towers = world.processes, world.replicas, world.towers
        self.replica: int = self.mesh.get_local_rank("data")  # which of them this process is
        self.tower: int = self.mesh.get_local_rank("tower")
        self.is_main = world.processes == 1 or rank() == 0  # writes files and talks to the user
        self.stopwatch = Stopwatch()  # of the exchange between processes

    def parallelize(self, model: AlexNet, rows: int) -> AlexNet:
        """Turn ``model`` into this process's part; ``rows`` are its own of each batch.

        Raises:
            TrainingError: where the towers can't exchange data.
        """
        try:
            towers.parallelize(model, self.mesh, self.stopwatch)
        except RuntimeError as error:
            if is_lost_peer(error):
                raise
            raise TrainingError(str(error)) from error
        towers.set_row_offset(model, self.replica * rows)
        return model

    def progress(self, step: int, doing: str = "") -> None:
        """Tell the others that this one goes on; ``doing`` is what begins and a disk may delay."""
        if self._watchdog is not None:
            self._watchdog.progress(step, doing)

    def reduce_gradients(self, model: AlexNet) -> None:
        with self.stopwatch.running(self.device, int(self.replicas > 1)):
            towers.reduce_gradients(model, self.mesh)

    def gather_rows(self, x: torch.Tensor) -> None:
        """Fill ``x`` with the other tower's half of its rows; on a GPU its stream waits for it."""
        if self.towers > 1:
            if self._watchdog is not None:
                self._watchdog.loaded()
            # On a GPU it runs beside a step, which does not wait for it.
            with self.stopwatch.running(self.device, int(self.device.type == "cpu")):
                gather_rows(x, self.tower, self.mesh.get_group("tower"))

    def all_reduce_max(self, values: torch.Tensor) -> None:
        """Make ``values`` the largest of all processes."""
        if self.processes > 1:
            dist.all_reduce(values, dist.ReduceOp.MAX)

    def copies_agree(self, whole: dict[str, torch.Tensor]) -> bool:
        """Whether all processes hold the same bits of tensors of 4 bytes a number."""
        if self.processes == 1:
            return True
        sums = [t.contiguous().view(torch.int32).sum(dtype=torch.int64) for t in whole.values()]
        most = torch.stack([torch.stack(sums), -torch.stack(sums)])  # the least of the second row
        self.all_reduce_max(most)
        return torch.equal(most[0], -most[1])

    def sum_replicas(self, values: torch.Tensor) -> torch.Tensor:
        """The sum of ``values`` over the replicas, in place."""
        if self.replicas > 1:
            dist.all_reduce(values, group=self.mesh.get_group("data"))
        return values

    def gather_replicas(self, values: list[int]) -> list[int]:
        """The lists of all replicas, equally long, one after the other."""
        if self.replicas == 1:
            return values
        mine = torch.tensor(values, device=self.device)
        parts = [torch.empty_like(mine) for _ in range(self.replicas)]
        dist.all_gather(parts, mine, group=self.mesh.get_group("data"))
        return torch.cat(parts).tolist()
