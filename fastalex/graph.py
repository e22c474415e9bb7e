"""A computation captured once as a CUDA graph, and launched as a whole from then on.

A step of this net is some 45 kernels of a few microseconds; launched one by one, the host is
what they wait for. A captured graph is launched at once, and runs the same kernels on the same
memory. So nothing in it may depend on the host: what changes from step to step, images, the
counters of dropout and the learning rate, lies in tensors that are written in place before.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch

Compute = Callable[..., torch.Tensor]
Replay = Callable[[], None]
# Captures a call, without running it: what runs it, and the tensor in which its result will be.
Capture = Callable[[Callable[[], torch.Tensor]], tuple[Replay, torch.Tensor]]

WARM_UP = 3  # calls that compile kernels, choose algorithms and allocate what stays


class Graphed:
    """``compute``, called as it is for ``WARM_UP`` times, then captured and replayed.

    Every call does the work once, in the order of the current stream: warming up is part of the
    training and no extra. Inputs keep their shapes from the captured call on.

    Args:
        compute: of tensors on ``device``, to one tensor. It may neither read a value on the host
            nor keep its inputs or its result; what else it changes, it changes in place.
        device: a GPU.
        tell: is told where a capture fails; every call then runs as it is.
        capture: how a call is captured.
        agree: whether a capture is used, given whether it worked here: of processes that exchange
            data inside ``compute`` all replay theirs, or none.
    """

    def __init__(
        self,
        compute: Compute,
        device: torch.device,
        tell: Callable[[str], None] = warnings.warn,
        capture: Capture | None = None,
        agree: Callable[[bool], bool] = bool,
    ) -> None:
        self._compute = compute
        self._device = device
        self._tell = tell
        self._agree = agree
        self._capture: Capture | None = capture or _capture_on_gpu
        self._calls = 0
        self._stream: torch.cuda.Stream | None = None
        self._inputs: list[torch.Tensor] = []
        self._replay: Replay | None = None
        self._output: torch.Tensor | None = None

    def __call__(self, *inputs: torch.Tensor) -> torch.Tensor:
        """The result, in a tensor that no later call changes."""
        self._calls += 1
        if self._calls <= WARM_UP:
            return self._beside(inputs)
        if self._replay is None and self._capture is not None:
            self._try_to_capture(self._capture, inputs)
        if self._replay is None:
            return self._compute(*inputs)
        for held, given in zip(self._inputs, inputs, strict=True):
            assert held.shape == given.shape, "a graph holds one shape"
            held.copy_(given)
        self._replay()
        assert self._output is not None
        return self._output.clone()

    def _try_to_capture(self, capture: Capture, inputs: tuple[torch.Tensor, ...]) -> None:
        self._inputs = [torch.empty_like(x) for x in inputs]
        failure = "not in another process"
        try:
            self._replay, self._output = capture(lambda: self._compute(*self._inputs))
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            failure = str(error).splitlines()[0]
        if not self._agree(self._replay is not None):
            self._capture = self._replay = None  # nothing of it has run
            self._tell(
                "the step can't be captured as a CUDA graph and goes on launch by launch: "
                f"{failure}"
            )

    def _beside(self, inputs: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """A call on another stream than the default one, which can't be captured later on."""
        if self._device.type != "cuda":
            return self._compute(*inputs)
        current = torch.cuda.current_stream(self._device)
        if self._stream is None:
            self._stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            output = self._compute(*inputs)
        current.wait_stream(self._stream)
        output.record_stream(current)
        return output


def _capture_on_gpu(call: Callable[[], torch.Tensor]) -> tuple[Replay, torch.Tensor]:
    graph = torch.cuda.CUDAGraph()
    failure: BaseException | None = None

    def watched() -> torch.Tensor:
        nonlocal failure
        try:
            return call()
        except BaseException as error:
            failure = error
            raise

    # Threads that load batches lock pages meanwhile, which forbids every other mode.
    captured = torch.cuda.graph(graph, capture_error_mode="thread_local")
    try:
        # Whatever becomes of the capture, the stream is the one it was before.
        with torch.cuda.stream(torch.cuda.current_stream()), captured:
            output = watched()
    except RuntimeError as error:
        raise failure or error from None  # ending a broken capture raises an error of its own
    return graph.replay, output
