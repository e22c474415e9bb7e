"""One of several processes that hold AlexNets together: what ``test_parallel`` measures in it.

    python tests/_parallel_script.py MEASUREMENT RANK WORLD RENDEZVOUS RESULTS

Writes a JSON object of the results. Each process draws other weights, so that nothing agrees
unless the first one's are handed out; the first one also runs every net whole, before it is split.
"""

from __future__ import annotations

import datetime
import hashlib
import itertools
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.device_mesh import DeviceMesh

from fastalex import AlexNet
from fastalex.data import Normalization
from fastalex.data.batches import Batches, Share, Transform
from fastalex.data.synthetic import SyntheticImages
from fastalex.distributed import exchange, towers
from fastalex.distributed.context import ParallelContext
from fastalex.distributed.exchange import TowerExchange, checked_exchange
from fastalex.distributed.world import World
from fastalex.model.variants import Variant
from fastalex.training import TrainStep
from fastalex.training.optim import build_optimizer
from fastalex.training.validation import fetch
from tests._nets import narrow

ROWS, SIZE = 6, 64
Tensors = dict[str, torch.Tensor]


def _batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(4)
    images = torch.randn(ROWS, 3, SIZE, SIZE, generator=generator)
    return images, torch.arange(ROWS) * 7 % 10


def _net(variant: str | Variant) -> AlexNet:
    """In training, with this process's own weights; what is dropped is everyone's."""
    with torch.device("meta"):
        model = AlexNet(num_classes=10, variant=variant)
    model = model.to_empty(device="cpu")
    model.init_parameters("he", torch.Generator().manual_seed(dist.get_rank()))
    model.seed_dropout(21, 3)
    return model.train()


def _pass(model: AlexNet, rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss and logits of some rows, and the gradients left in the parameters."""
    images, labels = _batch()
    logits = model(images[rows])
    loss = F.cross_entropy(logits, labels[rows])
    loss.backward()
    return loss.detach(), logits.detach()


def _gradients(model: AlexNet) -> Tensors:
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def _weights(model: AlexNet) -> Tensors:
    return {n: p.detach() for n, p in model.named_parameters()}


def _digest(*tensors: torch.Tensor) -> str:
    state = hashlib.sha256()
    for tensor in tensors:
        state.update(tensor.contiguous().numpy().tobytes())
    return state.hexdigest()


def _distance(x: torch.Tensor, y: torch.Tensor) -> float:
    return float((x.double() - y.double()).norm() / y.double().norm())


def _equal(a: Tensors, b: Tensors) -> bool:
    return list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)


def _compare(variant: Variant, mesh: DeviceMesh, ends: list[int]) -> dict[str, Any]:
    """One pass of the whole net and one of its parts; replica r has rows ends[r] to ends[r + 1]."""
    model, result = _net(variant), {}
    if dist.get_rank() == 0:
        loss, logits = _pass(model, slice(0, ROWS))
        gradients, weights = _gradients(model), _weights(model)
        model.zero_grad(set_to_none=True)
    towers.parallelize(model, mesh)
    replica = mesh.get_local_rank("data")
    rows = slice(ends[replica], ends[replica + 1])
    towers.set_row_offset(model, rows.start)
    part_loss, part_logits = _pass(model, rows)
    towers.reduce_gradients(model, mesh)
    # Averaged as the gradients are; every process of a replica's towers has the same loss.
    shares = part_loss / dist.get_world_size()
    dist.all_reduce(shares)
    whole = towers.full_tensors(model, mesh, _gradients(model))
    state = towers.full_tensors(model, mesh, model.state_dict())
    if dist.get_rank() == 0:
        result["loss"] = [float(loss), float(shares)]
        result["logits"] = _distance(part_logits, logits[rows])
        result["gradients"] = {n: _distance(whole[n], gradients[n]) for n in gradients}
        result["weights are the first process's"] = _equal(state, weights)
    result["undone"] = _equal(towers.local_tensors(model, mesh, whole), _gradients(model))
    result["undone"] &= _equal(towers.local_tensors(model, mesh, state), _weights(model))
    result["held"] = sum(p.numel() for p in model.parameters())
    result["logits digest"] = _digest(part_logits)
    result["digest"] = _digest(*state.values(), *whole.values())
    return result


def _refused(function: Callable[[], object]) -> str:
    try:
        function()
    except (ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def _check_damaged(mesh: DeviceMesh, damaged: Callable[[int], bool]) -> str:
    """What ``checked_exchange`` says where the processes of some ranks receive zeros."""
    exchanged = exchange.exchanged

    def zeros(other: TowerExchange, x: torch.Tensor) -> torch.Tensor:
        received = exchanged(other, x)
        return torch.zeros_like(x) if damaged(other.rank) and x.numel() > 1 else received

    exchange.exchanged = zeros  # type: ignore[assignment]
    try:
        return _refused(lambda: checked_exchange(mesh))
    finally:
        exchange.exchanged = exchanged


def _copies_agree(variant: str, towers_of_one: int) -> list[bool]:
    """Before and after the last layer of one process has one bit of another value."""
    parallel = ParallelContext(World("cpu", 2, towers_of_one, 1))
    model = towers.parallelize(_net(narrow(variant)), parallel.mesh)
    found = []
    for change in (0.0, 1e-6):
        if dist.get_rank() == 1:
            model.classifier[-1].bias.data[3] += change
        whole = towers.full_tensors(model, parallel.mesh, model.state_dict())
        found.append(parallel.copies_agree(whole))
    return found


class Counted(SyntheticImages):
    """Notes which images are asked for."""

    def __init__(self, count: int) -> None:
        super().__init__("train", count)
        self.asked: list[int] = []

    def image(self, index: int, size: int) -> Any:
        self.asked.append(index)
        return super().image(index, size)


def _fed() -> dict[str, Any]:
    """Whether each batch of a tower is the whole one, and the images that it decoded for it."""
    parallel = ParallelContext(World("cpu", 2, 2, 1))
    plain, share = Normalization((0.0,) * 3, (1.0,) * 3), Share(0, 1, parallel.tower, 2)
    result: dict[str, Any] = {"equal": True, "decoded": [], "needed": []}
    for train, size in itertools.product((True, False), (1, 5, 8)):
        alone, ours = Counted(11), Counted(11)
        transform = Transform(14, plain, "full")
        whole = Batches(alone, size, transform, 3, train)
        batches = Batches(ours, size, transform, 3, train, share, workers=2)
        fetched = fetch(batches.epoch(1), parallel.device, parallel.gather_rows)
        for one, batch in zip(whole.epoch(1), fetched, strict=True):
            pairs = zip((*one.inputs, one.labels), (*batch.inputs, batch.labels), strict=True)
            result["equal"] &= all(torch.equal(a, b) for a, b in pairs)
        result["decoded"].append(ours.asked)
        result["needed"].append(alone.asked)
    return result


def two() -> dict[str, Any]:
    pair, replicas = towers.init_mesh("cpu", 1, 2), towers.init_mesh("cpu", 2, 1)
    pair_exchange = TowerExchange(pair)
    sent = torch.arange(3.0) + 10 * dist.get_rank()
    return {
        "paper": _compare(narrow("paper"), pair, [0, ROWS]),
        "source2012": _compare(narrow("source2012"), pair, [0, ROWS]),
        "caffe": _compare(narrow("caffe"), replicas, [0, 3, ROWS]),
        "owt": _compare(narrow("owt"), replicas, [0, 3, ROWS]),
        "sent": exchange.exchanged(pair_exchange, sent).tolist(),
        "empty": list(exchange.exchanged(pair_exchange, torch.empty(0, 4)).shape),
        "sound": _check_damaged(pair, lambda _: False),
        "damaged": _check_damaged(pair, lambda _: True),
        "damaged to rank 1": _check_damaged(pair, lambda rank: rank == 1),
        "copies agree": [*_copies_agree("paper", 2), *_copies_agree("owt", 1)],
        "fed": _fed(),
        "no towers": _refused(lambda: towers.parallelize(_net("caffe"), pair)),
    }


def four() -> dict[str, Any]:
    mesh = towers.init_mesh("cpu", 2, 2)
    return {"paper": _compare(narrow("paper"), mesh, [0, 3, ROWS])}


def _train(model: AlexNet) -> list[float]:
    """The losses of two steps."""
    step = TrainStep(model, build_optimizer(model, lr=0.05))
    losses = []
    for _ in range(2):
        model.seed_dropout(0, 1)
        losses.append(step(*_batch()).item())
    return losses


def trained() -> dict[str, Any]:
    """Two steps of the whole net and of its towers, and how far their weights moved."""
    mesh, small = towers.init_mesh("cpu", 1, 2), narrow("paper")
    model, whole = _net(small), _net(small)
    towers.parallelize(model, mesh)
    before = {n: t.clone() for n, t in towers.full_tensors(model, mesh, model.state_dict()).items()}
    losses = _train(model)
    after = towers.full_tensors(model, mesh, model.state_dict())
    bias = model.classifier[-1].bias.detach()
    result: dict[str, Any] = {"losses": losses, "digest": _digest(*after.values(), bias)}
    if dist.get_rank() == 0:
        whole.load_state_dict(before)
        result["whole losses"] = _train(whole)
        expected = _weights(whole)
        result["moved"] = {
            n: _distance(after[n] - before[n], expected[n] - before[n]) for n in after
        }
    return result


def main() -> None:
    measurement, rank, world, rendezvous, results = sys.argv[1:]
    if sys.platform == "linux":
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"  # whatever the host's name resolves to
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{rendezvous}",
        rank=int(rank),
        world_size=int(world),
        timeout=datetime.timedelta(seconds=120),
    )
    result = {"two": two, "four": four, "trained": trained}[measurement]()
    Path(results).write_text(json.dumps(result))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
