"""A recorded step as a CUDA graph: launched as a whole, its kernels don't wait for the host.

A graph runs the same kernels on the same memory. So nothing in it may depend on the host: what
changes from step to step, images, the counters of dropout and the learning rate, is in tensors
that are written in place before.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from fastalex.distributed.exchange import Exchange, exchanged
from fastalex_kernels.common.program import Program

Replay = Callable[[], object]
Inputs = Sequence[torch.Tensor | None]

WARM_UP = 3  # runs before the capture: they load kernels and open connections
_CAPTURES = 2  # a loader alternates between two buffers


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
        capture: Callable[[Callable[[], None]], Replay] | None = None,
    ) -> None:
        self._program, self._exchange, self._tell = program, exchange, tell
        self._capture = capture or capture_on_gpu
        self._runs = 1
        self._captured: list[tuple[Inputs, Replay]] = []
        self._failed = False

    def run(self, inputs: Inputs) -> None:
        """Run the program with ``inputs``, of the shapes it was recorded with."""
        self._runs += 1
        wanted = self._runs > WARM_UP and len(self._captured) < _CAPTURES
        if wanted and not self._failed:
            self._program.set_inputs(inputs)
            self._try_to_capture(inputs)
        replay = next((r for held, r in self._captured if _same_memory(held, inputs)), None)
        if replay is None and self._captured:
            held, replay = self._captured[0]
            for mine, new in zip(held, inputs, strict=True):
                if mine is not None and new is not None:
                    mine.copy_(new)
        if replay is not None:
            replay()
        else:
            self._program.run(inputs)

    def _try_to_capture(self, inputs: Inputs) -> None:
        failure, replay = "not in another process", None
        try:
            replay = self._capture(self._program.run)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            failure = str(error).splitlines()[0]
        if self._agree(replay is not None):
            assert replay is not None
            self._captured.append((list(inputs), replay))
            return
        self._failed = True
        self._captured.clear()
        self._tell(
            f"the step can't be captured as a CUDA graph and goes on launch by launch: {failure}"
        )

    def _agree(self, verdict: bool) -> bool:
        """Whether the capture worked in both towers."""
        if self._exchange is None:
            return verdict
        device = next(x.device for x in self._program.inputs if x is not None)
        theirs = exchanged(self._exchange, torch.tensor([float(verdict)], device=device))
        return verdict and bool(theirs.item())


def _same_memory(one: Inputs, other: Inputs) -> bool:
    pairs = zip(one, other, strict=True)
    return all(
        a is b or (a is not None and b is not None and a.data_ptr() == b.data_ptr())
        for a, b in pairs
    )


def capture_on_gpu(run: Callable[[], None]) -> Replay:
    """``run``, captured and not run."""
    graph = torch.cuda.CUDAGraph()
    failure: BaseException | None = None

    def watched() -> None:
        nonlocal failure
        try:
            run()
        except BaseException as error:
            failure = error
            raise

    # Threads that load batches lock pages meanwhile, which forbids every other mode.
    captured = torch.cuda.graph(graph, capture_error_mode="thread_local")
    try:
        # Whatever becomes of the capture, the stream is the one it was before.
        with torch.cuda.stream(torch.cuda.current_stream()), captured:
            watched()
    except RuntimeError as error:
        raise failure or error from None  # ending a broken capture raises an error of its own
    return graph.replay
