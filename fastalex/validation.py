"""How good a net is on a set of images, measured by all processes together."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from fastalex.data import Batch, Batches
from fastalex.model import AlexNet
from fastalex.nvtx_ranges import nvtx_range
from fastalex.team import Team

TOP = 5  # the wider of the two accuracies


@dataclass(frozen=True)
class Accuracy:
    """Of a net on a set of images: mean loss, and shares of images from 0 to 1."""

    loss: float
    top1: float
    top5: float


@torch.no_grad()
def evaluate(
    model: AlexNet,
    batches: Batches,
    team: Team,
    on_batch: Callable[[int], None] = lambda number: None,
) -> Accuracy:
    """Loss, top-1 and top-5 over all of ``batches``; every process takes part.

    With fewer than five classes top-5 counts a label among all of them, and is 1. ``on_batch`` is
    called with the number of each batch, from 0, before it is looked at.
    """
    model.eval()
    sums = torch.zeros(4, dtype=torch.float64, device=team.device)
    for number, batch in enumerate(fetch(batches.epoch(0), team.device)):
        on_batch(number)
        labels = batch.labels
        if len(labels) == 0:  # a short last batch may leave a replica without images
            continue
        logits = model(batches.augment.for_layer(model.features[0], *batch.pixels)).float()
        ranked = logits.topk(min(TOP, logits.shape[1])).indices == labels[:, None]
        loss = F.cross_entropy(logits, labels, reduction="sum")
        counts = (loss, ranked[:, 0].sum(), ranked.sum(), logits.new_tensor(len(labels)))
        sums += torch.stack([value.double() for value in counts])
    loss_sum, top1, top5, images = team.total(sums).tolist()
    model.train()
    return Accuracy(loss_sum / images, top1 / images, top5 / images)


def fetch(
    batches: Iterator[Batch],
    device: torch.device,
    waiting: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext,
) -> Iterator[Batch]:
    """The same batches on ``device``, copied there beside the work that it has been given.

    The wait for each, inside ``waiting()``, is on a profiler's time line.
    """
    stream = None
    if device.type == "cuda":
        stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    while True:
        with nvtx_range("data"), waiting():
            batch = next(batches, None)
        if batch is None:
            return
        yield batch.to(device) if stream is None else _copied(batch, device, stream)


def _copied(batch: Batch, device: torch.device, stream: torch.cuda.Stream) -> Batch:
    """The batch on a GPU, copied on a stream of its own, which later work waits for."""
    with torch.cuda.stream(stream):
        moved = batch.to(device)
    current = torch.cuda.current_stream(device)
    current.wait_stream(stream)
    for tensor in (*moved.pixels, moved.labels):
        tensor.record_stream(current)  # its memory is free once that stream is done with it
    return moved
