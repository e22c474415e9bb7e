"""Where and how kernels run: backend choice, the target's name, and the only launch in the package.

Importing this module asks no driver anything; a target is looked up at the first launch on it.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import triton
from torch._subclasses.fake_tensor import FakeTensor
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

from fastalex_kernels.common.tuned import tuned_tile

BACKENDS = ("auto", "triton", "aten", "interpreter")
TRITON = tuple(int(n) for n in triton.__version__.split(".")[:2])
MOST_PROGRAMS = (2**31 - 1, 65535, 65535)  # along the axes of a grid
MOST_COUNTED = 2**31 - 2**24  # what a block or a program's share counts beyond the end fits, too
# Of the largest GPU of a target. What is chosen by them is a speed, and the same everywhere.
PROCESSORS = {"sm_80": 108, "sm_90": 132, "sm_100": 148, "sm_120": 170, "gfx942": 304}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # what the Triton kernels store
_KINDS = {dtype: str(dtype).removeprefix("torch.") for dtype in DTYPES}


class _Choice(threading.local):
    """The backend chosen in this thread; torch.compile guards on it, as on no context variable."""

    def __init__(self) -> None:
        self.name = "auto"
        self.program: Any = None  # what is being recorded, see program.py


_backend = _Choice()

# While set, a launch is handed to this function, and ``target`` answers with the name beside it.
# Offline compilation and the roofline report read every launch of a step this way.
Recorder = Callable[[Any, tuple[int, ...], tuple[Any, ...], dict[str, Any]], Any]
_recorder: tuple[str, Recorder] | None = None


@triton.jit
def _probe():
    pass


def interpreted() -> bool:
    """Whether kernels are interpreted here, by ``backend`` or ``TRITON_INTERPRET=1``."""
    return _backend.name == "interpreter" or not isinstance(_probe, JITFunction)


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Choose what runs the functions of this package inside the ``with`` block.

    Args:
        name: ``"auto"``, Triton on a GPU and under ``TRITON_INTERPRET=1``, ATen otherwise;
            ``"triton"``, Triton or an error; ``"aten"``, torch's own operators (oneDNN, cuDNN);
            ``"interpreter"``, Triton's interpreter, which is slow, on CPU tensors.

    Raises:
        ValueError: for another name.
    """
    if name not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(BACKENDS)}, got {name!r}")
    previous, _backend.name = _backend.name, name
    try:
        yield
    finally:
        _backend.name = previous


@contextlib.contextmanager
def record_launches(target_name: str, recorder: Recorder) -> Iterator[None]:
    """Hand every launch to ``recorder(kernel, grid, args, kwargs)`` as if on ``target_name``."""
    global _recorder
    previous, _recorder = _recorder, (target_name, recorder)
    try:
        yield
    finally:
        _recorder = previous


def use_triton(x: torch.Tensor) -> bool:
    """Whether an operation on ``x`` runs as Triton kernels here; float64 never does."""
    name = _backend.name
    if name == "aten" or x.dtype == torch.float64:
        return False
    here = x.is_cuda or _recorder is not None or interpreted()
    if name == "triton" and not here:
        raise ValueError(
            f"backend 'triton' needs a GPU tensor or TRITON_INTERPRET=1, got a tensor on {x.device}"
        )
    if name == "interpreter" and x.is_cuda:
        raise ValueError(f"backend 'interpreter' needs a CPU tensor, got one on {x.device}")
    return here


@functools.cache
def _device_target(index: int) -> str:
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip:
        return str(properties.gcnArchName).split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


def target(device: torch.device) -> str:
    """The name tiles are chosen by: ``"sm_90"``, ``"gfx942"``, ... or ``"interpreter"``."""
    if _recorder is not None:
        return _recorder[0]
    if interpreted() or (device.type == "cpu" and not torch.cuda.is_available()):
        return "interpreter"
    return _device_target(torch.cuda.current_device() if device.index is None else device.index)


def has_tma(device: torch.device) -> bool:
    """Whether kernels fetch blocks by tensor descriptors there, through the TMA unit."""
    return target(device) in ("sm_90", "sm_100", "sm_103")


def tile_entry(
    tiles: Mapping[tuple[str, int], tuple[int, ...]], x: torch.Tensor, kernel: str, *sizes: int
) -> tuple[int, ...]:
    """The tile of a problem of ``sizes``: one tuned on this GPU, or what a table holds for ``x``.

    Args:
        tiles: by (target, bits of an operand).
        kernel: the name that tuned tiles bear.
    """
    name, bits = target(x.device), 8 * x.element_size()
    return tuned(tiles.get((name, bits)) or tiles["other", bits], x, kernel, *sizes)


def tuned(own: tuple[int, ...], x: torch.Tensor, kernel: str, *sizes: int) -> tuple[int, ...]:
    """What was found best for a problem of ``sizes`` on this GPU, or ``own``.

    Args:
        own: what is chosen where nothing was tuned, of the same length: see ``_tuned.FIELDS``.
        x: an operand.
        kernel: the name that what was tuned bears.
    """
    kind = "tf32" if dot_precision(x.dtype) == "tf32" else _KINDS[x.dtype]
    return tuned_tile((kernel, kind, sizes), own, _device_name(x.device))


def _device_name(device: torch.device) -> str | None:
    """What a tuned table is looked up by; None where launches are recorded."""
    if _recorder is not None:
        return None
    if interpreted() or (device.type == "cpu" and not torch.cuda.is_available()):
        return "interpreter"
    return _gpu_name(torch.cuda.current_device() if device.index is None else device.index)


@functools.cache
def _gpu_name(index: int) -> str:
    return torch.cuda.get_device_name(index)


def cut(block: int, size: int) -> int:
    """A block no longer than an axis of ``size`` needs, and no shorter than ``tl.dot`` takes."""
    return max(16, min(block, int(triton.next_power_of_2(size))))


def dot_precision(dtype: torch.dtype) -> str:
    """``tl.dot``'s input precision: TF32 for float32 where torch's matmul setting allows it."""
    # Torch's setting is slow to read, and this runs before every launch.
    tf32 = dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if tf32 else "ieee"


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, counted: int, **kwargs: Any) -> None:
    """Run ``kernel[grid]`` on the device of its first tensor; an empty grid is no launch.

    Args:
        kernel, grid, args, kwargs: as Triton takes them.
        counted: the largest number that the kernel counts to in 32 bits: of rows, mostly.

    Raises:
        ValueError: for more than the kernel can count, or more programs than a GPU starts.
    """
    if 0 in grid:
        return
    if counted > MOST_COUNTED or any(map(int.__gt__, grid, MOST_PROGRAMS)):
        raise ValueError(
            f"input: too large for one launch of {kernel.fn.__name__.strip('_')}, which would count"
            f" to {counted} and start {' x '.join(map(str, grid))} programs; the most are "
            f"{MOST_COUNTED} and {' x '.join(map(str, MOST_PROGRAMS))}, split the batch"
        )
    if _backend.program is None:
        execute(kernel, grid, args, kwargs)
    else:
        _backend.program.launch(kernel, grid, args, kwargs)


def execute(
    kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Run a launch, or hand it to whoever records; returns what ``run`` does."""
    if _recorder is None:
        return run(kernel, grid, args, kwargs)
    return _recorder[1](kernel, grid, args, kwargs)


def call(function: Callable[..., Any], *arguments: Any, **options: Any) -> None:
    """Call a function that writes its results into tensors that exist.

    It is part of the program that is being recorded, if one is: as a whole, whatever it launches.
    What it returns is not used.
    """
    program = _backend.program
    with collecting(None):
        function(*arguments, **options)
    if program is not None:
        program.add(function, None, arguments, options)


def run(
    kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Any:
    """What ``launch`` does where nobody records it; a recorder may call it.

    Returns:
        Triton's compiled kernel; None where it was interpreted.
    """
    first = next(a for a in args if isinstance(a, torch.Tensor))
    device = first.device
    if not first.is_cuda and isinstance(kernel, JITFunction):
        _interpret(kernel, grid, args, kwargs)
        return None
    guard = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
    with guard:
        return kernel[grid](*args, **kwargs)


_twins: dict[int, InterpretedFunction] = {}  # by id: hashing a kernel would parse what it calls


def _interpreted_twin(kernel: JITFunction) -> InterpretedFunction:
    return _twins.setdefault(id(kernel), InterpretedFunction(kernel.fn))


def _interpret(
    kernel: JITFunction, grid: tuple[int, ...], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> None:
    """Run a kernel that was imported to be compiled in the interpreter.

    What it calls was imported so too, and refuses to be called outside of a compiled kernel: while
    this one runs, a call of such a function goes to its interpreted twin.
    """
    refuse = JITFunction.__call__
    JITFunction.__call__ = lambda self, *a, **k: _interpreted_twin(self)(*a, **k)
    try:
        options = ("num_warps", "num_stages")
        constants = {name: value for name, value in kwargs.items() if name not in options}
        _interpreted_twin(kernel)[grid](*args, **constants)
    finally:
        JITFunction.__call__ = refuse


def aligned(x: torch.Tensor) -> bool:
    """Whether ``x`` starts at a multiple of 16 bytes, as wide loads need."""
    if isinstance(x, FakeTensor):  # it has no address, and starts where its storage does
        return x.storage_offset() * x.element_size() % 16 == 0
    return x.data_ptr() % 16 == 0


@contextlib.contextmanager
def collecting(program: Any) -> Iterator[None]:
    """Let ``program`` collect this thread's launches and calls inside the ``with`` block."""
    previous, _backend.program = _backend.program, program
    try:
        yield
    finally:
        _backend.program = previous


def operator(name: str) -> Callable[[Callable[..., Any]], Any]:
    """Register an implementation as torch's operator ``fastalex::name``, for eager and compiled.

    Its ``register_fake`` says what comes out of tensors without data. While launches are recorded
    the implementation itself runs on those tensors, as launches need none; not where torch.compile
    traces, whose graph launches them later.
    """

    def register(implementation: Callable[..., Any]) -> Any:
        registered = torch.library.custom_op(f"fastalex::{name}", implementation, mutates_args=())
        register_fake = registered.register_fake

        def fake(shapes: Callable[..., Any]) -> None:
            def outcome(*args: Any, **kwargs: Any) -> Any:
                traced = torch._guards.TracingContext.try_get() is not None
                chosen = shapes if traced or _recorder is None else implementation
                return chosen(*args, **kwargs)

            register_fake(outcome)

        registered.register_fake = fake  # type: ignore[method-assign, assignment]
        return registered

    return register


def placed(results: Sequence[torch.Tensor], needs: Sequence[bool]) -> list[torch.Tensor | None]:
    """Gradients, of which only those needed were made, each in the place of its argument."""
    rest = iter(results)
    return [next(rest) if need else None for need in needs]


def check_floating(name: str, x: object) -> None:
    """Raise a TypeError unless ``x`` is a tensor of a dtype this package computes in."""
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(x).__name__}")
    if x.dtype not in (*DTYPES, torch.float64):
        raise TypeError(f"{name}: expected float32, bfloat16, float16 or float64, got {x.dtype}")


def check_like(name: str, x: object, like: torch.Tensor) -> None:
    """Raise unless ``x`` is a tensor of the dtype and on the device of ``like``."""
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(x).__name__}")
    if x.dtype != like.dtype:
        raise TypeError(f"{name}: expected dtype {like.dtype} as the input's, got {x.dtype}")
    if x.device != like.device:
        raise ValueError(f"{name}: expected device {like.device} as the input's, got {x.device}")


def interpretable(*tensors: torch.Tensor | None) -> tuple[Any, ...]:
    """bfloat16 tensors as float32 where the kernels are interpreted, anything else as it is.

    The interpreter computes bfloat16 on its raw bits. Kernels sum in float32 anyway, so a result
    that is rounded afterwards is what a GPU gives.
    """
    if not interpreted():
        return tensors
    return tuple(t.float() if t is not None and t.dtype == torch.bfloat16 else t for t in tensors)


def autocast(*tensors: Any) -> tuple[Any, ...]:
    """The tensors as ``torch.autocast`` wants the operands of a product, where it is enabled."""
    device = tensors[0].device.type if isinstance(tensors[0], torch.Tensor) else "cpu"
    available = torch.amp.autocast_mode.is_autocast_available(device)
    if not available or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    cast = lambda t: t.to(dtype) if isinstance(t, torch.Tensor) and t.dtype in DTYPES else t  # noqa: E731
    return tuple(cast(t) for t in tensors)
