"""A recorded step as a CUDA graph: launched as a whole, its kernels don't wait for the host.

A graph runs the same kernels on the same memory. So nothing in it may depend on the host: what
changes from step to step, images, the counters of dropout and the learning rate, is in tensors
that are written in place before.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from fastalex.distributed.exchange import Exchange, exchanged
from fastalex.training.inputs import Inputs
from fastalex_kernels.common.program import Program

Replay = Callable[[], object]
Places = tuple[int, ...]  # in memory, of inputs

WARM_UP = 3  # runs before the capture: they load kernels and open connections
_CAPTURES = 2  # a loader alternates between two buffers


def capture_on_gpu(run: Callable[[], None]) -> Replay:
    """``run``, captured and not run."""
    graph = torch.cuda.CUDAGraph()
    # Threads that load batches lock pages meanwhile, which forbids every other mode.
    captured = torch.cuda.graph(graph, capture_error_mode="thread_local")
    try:
        # Whatever becomes of the capture, the stream is the one it was before.
        with torch.cuda.stream(torch.cuda.current_stream()), captured:
            run()
    except RuntimeError as error:
        raise error.__context__ or error from None  # ending a broken capture raises another one
    return graph.replay


class Graph:
    """A program that is captured for the two sets of inputs that follow the warm-up.

    Inputs in other memory are copied into the first set's. Two towers capture in the same runs, and
    both replay or neither.

    Args:
        program: on a GPU; recorded, and so run once.
        exchange: with the other tower, or None.
        tell: is told where a capture fails; from then on each run goes launch by launch.
        capture: makes of a function on the GPU one that replays it.
    """

    def __init__(
        self,
        program: Program,
        exchange: Exchange | None,
        tell: Callable[[str], object],
        capture: Callable[[Callable[[], None]], Replay] = capture_on_gpu,
    ) -> None:
        self._program, self._exchange, self._tell = program, exchange, tell
        self._capture, self._runs, self._most = capture, 1, _CAPTURES
        self._captured: dict[Places, tuple[Inputs, Replay]] = {}

    def run(self, inputs: Inputs) -> None:
        """Run the program with ``inputs``, of the shapes it was recorded with."""
        self._runs += 1
        if self._runs > WARM_UP and len(self._captured) < self._most:
            self._try_to_capture(inputs)
        if not self._captured:
            self._program.run(inputs)
            return
        held, replay = self._captured.get(_places(inputs)) or next(iter(self._captured.values()))
        if _places(held) != _places(inputs):
            for mine, new in zip(held, inputs, strict=True):
                if mine is not None and new is not None:
                    mine.copy_(new)
        replay()

    def _try_to_capture(self, inputs: Inputs) -> None:
        self._program.set_inputs(inputs)
        failure = "not in another process"
        try:
            self._captured[_places(inputs)] = list(inputs), self._capture(self._program.run)
            works = True
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            failure, works = str(error).splitlines()[0], False
        if self._exchange is not None:  # both towers, or neither
            device = next(x.device for x in inputs if x is not None)
            theirs = exchanged(self._exchange, torch.tensor([float(works)], device=device))
            works = works and bool(theirs.item())
        if not works:
            self._captured, self._most = {}, 0
            self._tell(
                "the step can't be captured as a CUDA graph and goes on launch by launch: "
                f"{failure}"
            )


def _places(inputs: Inputs) -> Places:
    return tuple(0 if x is None else x.data_ptr() for x in inputs)
