"""A training process's place among the others."""

from __future__ import annotations

import torch
import torch.distributed as dist

from fastalex.common.timing import Stopwatch
from fastalex.distributed import launch, towers
from fastalex.distributed.exchange import TowerExchange, check_copies
from fastalex.distributed.launch import TrainingError, World, is_lost_peer
from fastalex.model.alexnet import AlexNet


class Team:
    """This process's place among the others; alone, every operation is local.

    Args:
        world: of which this process is a member.
        timeout: seconds that a process may keep the others waiting after its first step; 0 is
            any time.

    Attributes:
        stopwatch: counts the time of exchange between processes.
    """

    def __init__(self, world: World, timeout: float = 0) -> None:
        self._watch = launch.watch() if world.processes > 1 else None
        if self._watch is not None:
            self._watch.limit(timeout)
        self.device = torch.device("cpu")
        if world.device_type == "cuda":
            self.device = torch.device("cuda", torch.cuda.current_device())
        self.replicas, self.towers = world.replicas, world.towers
        self.stopwatch = Stopwatch()
        self._mesh = None
        self._exchange: TowerExchange | None = None
        if world.processes > 1:
            self._mesh = towers.init_mesh(world.device_type, world.replicas, world.towers)
        self.replica = 0 if self._mesh is None else self._mesh.get_local_rank("data")
        self.leads = self._mesh is None or dist.get_rank() == 0

    def share(self, model: AlexNet, rows: int) -> AlexNet:
        """Turn ``model`` into this process's part; ``rows`` are its own of each batch.

        Raises:
            TrainingError: where the towers can't exchange data.
        """
        if self._mesh is None:
            return model
        exchange: TowerExchange | None = None
        if self._mesh["tower"].size() > 1:
            try:
                exchange = check_copies(self._mesh)
            except RuntimeError as error:
                if is_lost_peer(error):
                    raise
                raise TrainingError(str(error)) from error
            exchange.stopwatch = self.stopwatch
            self._exchange = exchange
        towers.parallelize(model, self._mesh, exchange)
        towers.set_row_offset(model, self.replica * rows)
        return model

    def progress(self, step: int, doing: str = "") -> None:
        """Tell the other processes that this one goes on.

        Args:
            step: of the training.
            doing: what begins, where a disk decides how long it takes.
        """
        if self._watch is not None:
            self._watch.progress(step, doing)

    def reduce_gradients(self, model: AlexNet) -> None:
        if self._mesh is not None and self.replicas > 1:
            with self.stopwatch.running(self.device):
                towers.reduce_gradients(model, self._mesh)

    def gradient_norm(self, norms: dict[str, torch.Tensor], model: AlexNet) -> torch.Tensor:
        """The norm of the whole net's gradient, of each parameter's; every process takes part."""
        if self._mesh is None:
            return torch.nn.utils.get_total_norm(list(norms.values()))
        return towers.gradient_norm(norms, model, self._mesh)

    def largest(self, values: torch.Tensor) -> None:
        """Make ``values`` the largest of all processes."""
        if self._mesh is not None:
            dist.all_reduce(values, dist.ReduceOp.MAX)

    def total(self, values: torch.Tensor) -> torch.Tensor:
        """The sum of ``values`` over the replicas."""
        if self._mesh is not None and self.replicas > 1:
            dist.all_reduce(values, group=self._mesh.get_group("data"))
        return values

    def gather(self, values: list[int]) -> list[int]:
        """The lists of all replicas, equally long, one after the other."""
        if self._mesh is None or self.replicas == 1:
            return values
        mine = torch.tensor(values, device=self.device)
        parts = [torch.empty_like(mine) for _ in range(self.replicas)]
        dist.all_gather(parts, mine, group=self._mesh.get_group("data"))
        return torch.cat(parts).tolist()

    def weights(self, model: AlexNet) -> dict[str, torch.Tensor]:
        """The whole net's; every process takes part."""
        if self._mesh is None:
            return dict(model.state_dict())
        return towers.full_state_dict(model, self._mesh)

    def whole(self, model: AlexNet, parts: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Whole tensors of parts named like the parameters; every process takes part."""
        if self._mesh is None:
            return parts
        return towers.full_tensors(model, self._mesh, parts)

    def parts(self, model: AlexNet, whole: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """This process's parts of whole tensors: undoes ``whole``."""
        if self._mesh is None:
            return whole
        return towers.local_tensors(model, self._mesh, whole)
