"""How good a net is on a set of images, measured by all processes together."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from fastalex.common.nvtx_ranges import nvtx_range
from fastalex.data.batches import Batch, Batches
from fastalex.distributed.context import ParallelContext
from fastalex.model.alexnet import AlexNet

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
    parallel: ParallelContext,
    on_batch: Callable[[int], None] = lambda number: None,
) -> Accuracy:
    """Loss, top-1 and top-5 over all of ``batches``; every process takes part.

    With fewer than five classes top-5 counts a label among all of them, and is 1. ``on_batch`` is
    called with the number of each batch, from 0, before it is looked at.
    """
    model.eval()
    sums = torch.zeros(4, dtype=torch.float64, device=parallel.device)
    seen = 0  # counted here: a number that is copied to a GPU has the host wait for it
    with contextlib.closing(batches.epoch(0)) as loaded:
        for number, batch in enumerate(fetch(loaded, parallel.device, parallel.gather_rows)):
            on_batch(number)
            labels = batch.labels
            if len(labels) == 0:  # a short last batch may leave a replica without images
                continue
            logits = model(batches.augment(*batch.inputs)).float()
            ranked = logits.topk(min(TOP, logits.shape[1])).indices == labels[:, None]
            loss = F.cross_entropy(logits, labels, reduction="sum")
            counts = (loss, ranked[:, 0].sum(), ranked.sum())
            sums[:3] += torch.stack([value.double() for value in counts])
            seen += len(labels)
    sums[3].fill_(seen)
    loss_sum, top1, top5, images = parallel.sum_replicas(sums).tolist()
    model.train()
    return Accuracy(loss_sum / images, top1 / images, top5 / images)


def fetch(
    batches: Iterator[Batch],
    device: torch.device,
    gather: Callable[[torch.Tensor], None] = lambda images: None,
    waiting: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext,
) -> Iterator[Batch]:
    """The same batches on ``device``, copied there beside the work that it has been given.

    ``gather`` fills in there the images that the other tower has loaded. The wait for each batch,
    inside ``waiting()``, is on a profiler's time line.
    """
    if device.type == "cuda":
        yield from _copied(_waited(batches, waiting), device, gather)
        return
    for batch in _waited(batches, waiting):
        gather(batch.images)
        yield batch


def _waited(
    batches: Iterator[Batch], waiting: Callable[[], contextlib.AbstractContextManager[None]]
) -> Iterator[Batch]:
    while True:
        with nvtx_range("data"), waiting():
            batch = next(batches, None)
        if batch is None:
            return
        yield batch


def _copied(
    batches: Iterator[Batch], device: torch.device, gather: Callable[[torch.Tensor], None]
) -> Iterator[Batch]:
    """The batches on a GPU, in two sets of memory by turns, copied on a stream of its own.

    A set is written again when the work that was given out with it is done.
    """
    stream, current = _copy_stream(device), torch.cuda.current_stream(device)
    places: list[Batch | None] = [None, None]
    free: list[torch.cuda.Event | None] = [None, None]
    for number, batch in enumerate(batches):
        turn = number % 2
        place, done = places[turn], free[turn]
        if place is None or place.labels.shape != batch.labels.shape:
            place = batch.empty(device)
            stream.wait_stream(current)
        elif done is not None:
            stream.wait_event(done)
        with torch.cuda.stream(stream):
            places[turn] = place = batch.copy_to(place)
            if not torch.version.hip:
                gather(place.images)
        current.wait_stream(stream)
        if torch.version.hip:  # where nothing else orders it and the exchanges of a captured step
            gather(place.images)
        yield place
        free[turn] = current.record_event()


@functools.cache
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call,no-any-return]
