"""An executable model of Gluon on sm_90: a kernel's own source, run step by step in any order.

``launch`` runs the Python function of a ``@gluon.jit`` kernel with the names of this module in the
place of Gluon's. Blocks in registers are torch tensors. What runs at the same time on a GPU takes
turns here, a step of one after a step of another, in an order drawn from ``seed``:

* a partition of ``warp_specialize``, up to its next operation on a barrier, a load or a product;
* a load of the tensor memory accelerator: the block, zeros outside of the tensor, is written to
  shared memory, which holds NaN since the load was issued, and its bytes are counted;
* a product: it reads shared memory at any time between its call and the wait that covers it.
  Products of a partition end in order; each call is a group of its own.

``SCHEDULES`` add the extremes: loads or products as late or as early as can be.

Barriers are the hardware's: a phase ends when no arrival and no byte is missing, and a wait passes
where the parity of the current phase is not the one waited for, be that a phase too early or too
late. ``expect`` arrives, too.

Order is checked apart from values. An access to shared memory is an event. Agents and barriers
carry the set of events that have ended for them: an arrival adds the agent's to the barrier's, the
end of a load adds the load, a wait adds those of the phase that ended last, a wait for products
adds their reads, and ``fence_async_shared`` the agent's own, which a load would not heed otherwise.
An access that conflicts with an event that is not in its agent's set is a fault, whether or not the
two met in this run. So one run finds every race under the waits that passed in it; other orders are
tried because a wait may pass otherwise.

``Fault`` is raised for: such a race; a slot that is read and was never loaded; a deadlock, with
what each agent waits for; more or fewer bytes expected than loaded, or a load before its bytes are
expected; more arrivals than a barrier's count; sums read before the wait for their products, used
again after they were passed on, or in flight and not among the ``deps`` of a wait; a load that
signals a barrier with no fence since its ``init``; an index outside of a buffer; a store outside of
its tensor, or by offsets of 32 bits, and a load of a whole block outside, but for ``padded``
arguments; an element of an output stored twice, or never; at the end a load that nobody waited for,
products in flight or a barrier inside of a phase; an integer past 32 bits, outside of a tensor; a
negative integer divided, which Triton rounds to 0 and Python down.

Not modelled, and whether that is enough:

* Threads: a partition is one agent. One thread arrives for all, so the partition's threads have to
  meet before it does. Triton's compiler puts ``bar.sync`` there; that is read in its code
  (``unsynchronized_arrivals``), for each version of the compiler.
* Registers: which of them a product in flight reads is the compiler's affair, and ptxas knows.
* Ordinary stores to shared memory: a kernel that has them fails here as not modelled. Barriers
  initialized before ``warp_specialize`` are taken to be seen by the threads of all partitions.
* Other kernels in flight: ``wait_for_predecessor`` does nothing. Programs run one after another;
  they share only what they store, and no element twice.
* Layouts, swizzles, bank conflicts, the size of shared memory, time: what the compiler takes does
  not change values. The order of sums inside a product, and of two bytes or arrivals that come
  together: neither changes what is found here.
* What Gluon's compiler makes of the source, and what no version of this file knows of the hardware:
  no GPU has confirmed either.
"""

from __future__ import annotations

import builtins
import functools
import itertools
import linecache
import random
import re
import sys
import threading
import types
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.runtime.jit import JITFunction

# Kinds of steps that go first; the others go when none of these can.
SCHEDULES: dict[str, tuple[str, ...]] = {
    "random": (),
    "late loads": ("partition", "product"),
    "late products": ("partition", "load"),
    "late": ("partition",),
    "early": ("load", "product"),
}


class Fault(AssertionError):
    """What is wrong with a kernel, and where."""


def _frame() -> types.FrameType:
    """Where the kernel is."""
    frame = sys._getframe(1)
    while frame.f_code.co_filename == __file__ and frame.f_back is not None:
        frame = frame.f_back
    return frame


def _site(frame: types.FrameType | None = None) -> str:
    frame = frame or _frame()
    code, line = frame.f_code, frame.f_lineno
    return f"{code.co_name}:{line} `{linecache.getline(code.co_filename, line).strip()}`"


def _fault(message: str) -> Fault:
    return Fault(f"{_site()}: {message}")


def _name(value: Any) -> str:
    """What the kernel calls a value."""
    return next((name for name, local in _frame().f_locals.items() if local is value), "buffer")


class Int(int):
    """An integer at run time, of 32 bits; Python's own are constants."""


def _checked(name: str) -> Callable[[Int, Any], Any]:
    def method(self: Int, other: Any) -> Any:
        if not isinstance(other, int):
            return NotImplemented
        value = getattr(int, name)(self, other)
        if not -(2**31) <= value < 2**31:
            raise _fault(f"{value} does not fit in 32 bits")
        if name.strip("_r") in ("floordiv", "mod") and (self < 0 or other < 0):
            raise _fault(f"{int(self)} and {int(other)} are divided: Triton rounds to 0")
        return Int(value)

    return method


for _operator in ("add", "sub", "mul", "floordiv", "mod", "and", "or", "xor"):
    for _method in (f"__{_operator}__", f"__r{_operator}__"):
        setattr(Int, _method, _checked(_method))


# Global memory


class Memory:
    """A tensor in global memory, and which of its elements were stored."""

    def __init__(self, name: str, tensor: Tensor) -> None:
        self.name, self.flat = name, tensor.as_strided((tensor.numel(),), (1,))
        self.stored = torch.zeros(tensor.numel(), dtype=torch.bool)

    def places(self, offsets: Tensor) -> Tensor:
        """Offsets, all inside of the tensor."""
        if offsets.min() < 0 or offsets.max() >= self.flat.numel():
            lo, hi = int(offsets.min()), int(offsets.max())
            raise _fault(f"{self.name}[{lo}..{hi}] of {self.flat.numel()} elements")
        return offsets.long()


class Pointer(NamedTuple):
    memory: Memory
    offset: Any = 0

    @property
    def dtype(self) -> Any:
        return types.SimpleNamespace(element_ty=self.memory.flat.dtype)

    def __add__(self, offset: Any) -> Pointer:  # type: ignore[override]
        return Pointer(self.memory, self.offset + offset)


def load(pointer: Pointer) -> Tensor:
    return pointer.memory.flat[pointer.memory.places(pointer.offset)]


def store(pointer: Pointer, value: Tensor) -> None:
    memory, places = pointer.memory, pointer.memory.places(pointer.offset)
    if pointer.offset.dtype != torch.int64:
        raise _fault(f"{memory.name} is stored to by offsets of 32 bits: it may be larger")
    if memory.stored[places].any() or places.unique().numel() < places.numel():
        raise _fault(f"an element of {memory.name} is stored twice")
    memory.stored[places] = True
    memory.flat[places] = value.to(memory.flat.dtype).broadcast_to(places.shape)


class Descriptor:
    """A tensor described to the accelerator, in blocks."""

    def __init__(self, name: str, host: Any, padded: bool) -> None:
        self.name, self.padded, self.layout = name, padded, host.layout
        self.source = host.base.as_strided(host.shape, host.strides)
        self.block_shape, self.dtype = list(host.block_shape), host.base.dtype
        nbytes = torch.Size(self.block_shape).numel() * self.dtype.itemsize
        self.block_type = types.SimpleNamespace(nbytes=nbytes)

    def block(self, at: list[int]) -> Tensor:
        """The block at these coordinates, zeros outside of the tensor."""
        block = torch.zeros(self.block_shape, dtype=self.dtype)
        sizes = zip(at, self.block_shape, self.source.shape, strict=True)
        inside = [(max(i, 0), min(i + size, end)) for i, size, end in sizes]
        if all(lo < hi for lo, hi in inside):
            there = [slice(lo - i, hi - i) for i, (lo, hi) in zip(at, inside, strict=True)]
            block[tuple(there)] = self.source[tuple(slice(lo, hi) for lo, hi in inside)]
        elif not self.padded:
            raise _fault(f"{self.name}{at} lies outside of {list(self.source.shape)}")
        return block


# Shared memory, barriers and loads


class Access(NamedTuple):
    """A read or write of elements lo to hi of a buffer."""

    lo: int
    hi: int
    event: int  # a set of one
    kind: str  # load, product or read
    site: str


class Shared:
    """A buffer of shared memory, or a view of one."""

    def __init__(self, data: Tensor, accesses: list[Access], name: str = "") -> None:
        self.data, self.accesses, self.name = data, accesses, name
        self.dtype, self.shape = data.dtype, list(data.shape)

    def index(self, i: int) -> Shared:
        if not 0 <= i < self.shape[0]:
            raise _fault(f"index {i} of {self.shape[0]}")
        self.name = self.name or _name(self)
        return Shared(self.data[int(i)], self.accesses, f"{self.name}[{i}]")

    def permute(self, order: Iterable[int]) -> Shared:
        return Shared(self.data.permute(*order), self.accesses, self.name)

    def load(self, layout: Any) -> Tensor:
        agent = _agent()
        agent.pause()
        agent.unfenced |= self.begin("read")
        return self.data.clone()

    def begin(self, kind: str) -> int:
        """Begin an access, checked against those before; returns its event, as a set of one."""
        agent, lo, loads = _agent(), self.data.storage_offset(), kind == "load"
        steps = zip(self.shape, self.data.stride(), strict=True)
        hi = lo + sum((size - 1) * stride for size, stride in steps)
        others = [a for a in self.accesses if a.lo <= hi and lo <= a.hi]
        others = [a for a in others if loads or a.kind == "load"]
        if not loads and not others:
            raise _fault(f"{self.name} is read, and was never loaded")
        for other in others:
            if not other.event & agent.known:
                fence = " or fence_async_shared" if other.kind == "read" else ""
                did = "loaded" if loads else "read"
                raise _fault(
                    f"{self.name} is {did} with no wait{fence} after {other.kind} {other.site}"
                )
        event = agent.program.new_event()
        if loads:  # who comes after this one comes after those that it covers
            self.accesses[:] = [a for a in self.accesses if a.lo < lo or hi < a.hi]
        self.accesses.append(Access(lo, hi, event, kind, _site()))
        return event


def fence_async_shared() -> None:
    agent = _agent()
    agent.known |= agent.unfenced
    for barrier in agent.program.barriers:
        barrier.fenced = True


class Barrier:
    """Phases that end when no arrival and no byte is missing."""

    def __init__(self) -> None:
        self.name, self.fenced = "", False
        self.phase = self.count = self.arrivals = self.bytes = 0  # the last two are what is missing
        self.known = self.ended = 0  # events, of this phase and of the one before

    def arrive(self, count: int, known: int) -> None:
        if count > self.arrivals:
            raise _fault(f"more arrivals than {self} takes")
        self.arrivals -= count
        self.add(known)

    def add(self, known: int) -> None:
        """Add events; end the phase if nothing is missing."""
        self.known |= known
        if not (self.arrivals or self.bytes):
            self.ended, self.known = self.known, 0
            self.arrivals, self.phase = self.count, self.phase + 1

    def __str__(self) -> str:
        missing = f"{self.arrivals} of {self.count} arrivals and {self.bytes} bytes missing"
        return f"{self.name} (phase {self.phase}, {missing})"


class Barriers:
    """A buffer of barriers."""

    def __init__(self, number: int) -> None:
        self.all = [Barrier() for _ in range(number)]

    def index(self, i: int) -> Barrier:
        if not 0 <= i < len(self.all):
            raise _fault(f"barrier {i} of {len(self.all)}")
        barrier = self.all[int(i)]
        barrier.name = barrier.name or f"{_name(self)}[{i}]"
        return barrier


def init(barrier: Barrier, count: int) -> None:
    barrier.count = barrier.arrivals = count
    _agent().program.barriers.append(barrier)


def expect(barrier: Barrier, bytes_per_cta: int) -> None:
    _agent().pause()
    barrier.bytes += bytes_per_cta
    barrier.arrive(1, _agent().known)


def arrive(barrier: Barrier, *, count: int = 1, pred: Any = True) -> None:
    _agent().pause()
    if pred:
        barrier.arrive(count, _agent().known)


def wait(barrier: Barrier, phase: int) -> None:
    _agent().pause(lambda: barrier.phase % 2 != phase % 2, barrier)
    _agent().known |= barrier.ended


@dataclass(eq=False)
class Load:
    """A load in flight."""

    block: Tensor
    slot: Shared
    barrier: Barrier
    event: int

    def end(self, program: Program) -> None:
        program.loads.remove(self)
        self.slot.data.copy_(self.block)
        self.barrier.bytes -= self.block.nbytes
        self.barrier.add(self.event)


def async_load(tensor_desc: Descriptor, coord: Any, barrier: Barrier, result: Shared) -> None:
    agent = _agent()
    agent.pause()
    if (result.shape, result.dtype) != (tensor_desc.block_shape, tensor_desc.dtype):
        raise _fault(f"a block of {tensor_desc.block_shape} is loaded into {result.shape}")
    if not barrier.fenced:
        raise _fault(f"no fence_async_shared since {barrier.name} was initialized")
    in_flight = sum(x.block.nbytes for x in agent.program.loads if x.barrier is barrier)
    if in_flight + tensor_desc.block_type.nbytes > barrier.bytes:
        raise _fault(f"{barrier.name} expects fewer bytes than are loaded")
    event, block = result.begin("load"), tensor_desc.block([int(i) for i in coord])
    agent.program.loaded[event] = _site()
    agent.program.loads.append(Load(block, result, barrier, event))
    result.data.fill_(torch.nan)


# Products


class Sums:
    """An accumulator that a product may still add to: it is passed on, or waited for."""

    def __init__(self, value: Tensor | None, product: Product | None) -> None:
        self._value, self._product, self._passed = value, product, False

    def _pass(self) -> Sums:
        if self._passed:
            raise _fault("sums are used again after they were passed on")
        self._passed = True
        return Sums(self._value, self._product)

    def _get(self) -> Any:
        return self._value if self._product is None else self._product.sums

    def __getattr__(self, name: str) -> Any:
        raise _fault("sums are read before warpgroup_mma_wait")

    @classmethod
    def __torch_function__(cls, *_: Any) -> Any:
        raise _fault("sums are read before warpgroup_mma_wait")


for _operator in ("add", "radd", "sub", "rsub", "mul", "rmul", "lt", "le", "gt", "ge", "getitem"):
    setattr(Sums, f"__{_operator}__", lambda self, _: self.read)


class Product:
    """A product in flight: ``a`` in registers, or both operands in shared memory."""

    def __init__(self, a: Tensor | Shared, b: Shared, before: Sums) -> None:
        self.a, self.b, self.before = a.data, b.data, before  # a tensor's data is its own
        self.events = b.begin("product") | (a.begin("product") if isinstance(a, Shared) else 0)
        self.sums: Tensor | None = None

    def end(self) -> None:
        self.sums = self.a.float() @ self.b.float() + self.before._get()


def warpgroup_mma_init(value: Any) -> Sums:
    return value._pass() if isinstance(value, Sums) else Sums(value, None)


def warpgroup_mma(a: Any, b: Shared, acc: Any, *, is_async: bool) -> Sums:
    assert is_async
    agent = _agent()
    agent.pause()
    product = Product(a, b, warpgroup_mma_init(acc))
    agent.products.append(product)
    return Sums(None, product)


def warpgroup_mma_wait(num_outstanding: int, deps: Iterable[Any]) -> Any:
    agent = _agent()
    passed = [warpgroup_mma_init(dep) for dep in deps]
    latest = set(agent.products) - {product.before._product for product in agent.products}
    if not latest <= {sums._product for sums in passed}:
        raise _fault("sums of a product in flight are not among deps")
    covered = agent.products[: max(len(agent.products) - num_outstanding, 0)]
    agent.pause(lambda: all(product.sums is not None for product in covered), "products")
    for product in covered:
        agent.known |= product.events
    del agent.products[: len(covered)]
    values = [sums if sums._product in agent.products else sums._get() for sums in passed]
    return values[0] if len(values) == 1 else tuple(values)


# Agents and the order of their steps


class _Stopped(BaseException):
    """Ends the thread of an agent after a fault."""


class Agent:
    """A partition, in a thread that runs while the program waits for it."""

    def __init__(self, program: Program, call: Callable[[], Any], known: int) -> None:
        self.program, self.call, self.known = program, call, known
        self.unfenced = 0  # events: its reads since the last fence
        self.products: list[Product] = []  # in flight
        self.frame: types.FrameType | None = None
        self.ready: Callable[[], bool] = lambda: True
        self.waits_for: Any = None
        self.done = False
        self.turn = threading.Semaphore(0)
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()
        program.agents.append(self)

    def _run(self) -> None:
        _running.agent = self
        self.turn.acquire()
        try:
            if not self.program.stopped:
                self.call()
                if self.products:
                    raise Fault("a partition ends with products in flight")
        except _Stopped:
            pass
        except BaseException as error:
            self.program.error = error
        self.done = True
        self.program.turn.release()

    def step(self) -> None:
        self.turn.release()
        self.program.turn.acquire()

    def pause(self, ready: Callable[[], bool] = lambda: True, waits_for: Any = None) -> None:
        """End a step; the next one begins when it is ready, or later."""
        self.ready, self.waits_for, self.frame = ready, waits_for, _frame()
        self.program.turn.release()
        self.turn.acquire()
        if self.program.stopped:
            raise _Stopped

    def __str__(self) -> str:
        return f"{_site(self.frame)} waits for {self.waits_for}"


_running = threading.local()


def _agent() -> Agent:
    return _running.agent  # type: ignore[no-any-return]


class Program:
    """One program of a grid."""

    def __init__(self, index: tuple[int, ...], rng: random.Random, first: tuple[str, ...]) -> None:
        self.index, self.rng, self.first = index, rng, first
        self.agents: list[Agent] = []
        self.barriers: list[Barrier] = []
        self.loads: list[Load] = []  # in flight
        self.loaded: dict[int, str] = {}  # where each load was issued, by event
        self.events = 0
        self.error: BaseException | None = None
        self.stopped = False
        self.turn = threading.Semaphore(0)
        # Of two agents, one may be a hundred times as fast.
        self.speeds: defaultdict[Any, float] = defaultdict(lambda: 10 ** rng.uniform(-1, 1))

    def new_event(self) -> int:
        self.events += 1
        return 1 << self.events

    def steps(self) -> Iterator[tuple[str, float, Callable[[], None]]]:
        """What can happen next: its kind, its speed, and what does it."""
        for agent in self.agents:
            if not agent.done and agent.ready():
                yield "partition", self.speeds[agent], agent.step
            for product in agent.products:
                if product.sums is None:
                    yield "product", self.speeds[agent, "products"], product.end
                    break  # they end in order
        if self.loads:
            transfer = self.rng.choice(self.loads)
            yield "load", self.speeds["loads"], functools.partial(transfer.end, self)

    def run(self, call: Callable[[], Any]) -> None:
        first = Agent(self, call, 0)
        try:
            while not all(agent.done for agent in self.agents):
                steps = list(self.steps())
                steps = [step for step in steps if step[0] in self.first] or steps
                if not steps:
                    blocked = [str(agent) for agent in self.agents if not agent.done]
                    raise Fault(f"deadlock: {'; '.join(blocked)}")
                self.rng.choices(steps, [speed for _, speed, _ in steps])[0][2]()
                if self.error is not None:
                    raise self.error
            for event, site in self.loaded.items():
                if not event & first.known:
                    raise Fault(f"nobody waits for the load by {site}")
            for barrier in self.barriers:
                if barrier.arrivals != barrier.count or barrier.bytes:
                    raise Fault(f"the program ends inside of a phase of {barrier}")
        finally:
            self.stopped = True
            for agent in self.agents:
                if not agent.done:
                    agent.step()
                agent.thread.join()


def warp_specialize(functions_and_args: Any, *_: Any) -> Any:
    (function, args), *workers = functions_and_args
    agent = _agent()
    others = [Agent(agent.program, functools.partial(f, *a), agent.known) for f, a in workers]
    result = function(*args)
    agent.pause(lambda: all(other.done for other in others), "the other partitions")
    for other in others:
        agent.known |= other.known
    return result


# The language


def where(condition: Any, x: Any, y: Any) -> Any:
    if isinstance(condition, Tensor):
        return torch.where(condition, x, y)
    return _number(x if condition else y)


def allocate_shared_memory(element: torch.dtype, shape: Iterable[int], layout: Any) -> Shared:
    return Shared(torch.full(tuple(shape), torch.nan, dtype=element), [])


def static_assert(condition: bool) -> None:
    if not condition:
        raise _fault("the compiler refuses it")


def _number(value: Any) -> Any:
    return Int(value) if type(value) is int else value


def _range(*bounds: int) -> Iterator[Int]:
    return map(Int, builtins.range(*bounds))


def _no_layout(*_: Any) -> None:
    """Layouts don't change values."""


class Block(Tensor):
    """Sums in registers."""

    type = types.SimpleNamespace(layout=None)  # type: ignore[assignment]


_NAMES: dict[str, Any] = {
    "allocate_mbarrier": lambda batch: Barriers(batch),
    "arange": lambda lo, hi, layout: torch.arange(lo, hi, dtype=torch.int32),
    "convert_layout": lambda block, layout: block,
    "maximum": lambda x, y: _number(max(x, y)),
    "minimum": lambda x, y: _number(min(x, y)),
    "num_warps": lambda: 8,
    "program_id": lambda axis: Int(_agent().program.index[axis]),
    "static_range": range,
    "zeros": lambda shape, kind, layout: torch.zeros(shape, dtype=kind).as_subclass(Block),
}
for _function in (
    allocate_shared_memory, arrive, async_load, expect, fence_async_shared, init, load,
    static_assert, store, wait, warp_specialize, warpgroup_mma, warpgroup_mma_init,
    warpgroup_mma_wait, where,
):  # fmt: skip
    _NAMES[_function.__name__] = _function


class _Language:
    """The modules of Gluon and Triton's language, all in one."""

    def __getattr__(self, name: str) -> Any:
        value = _NAMES.get(name)
        if value is None and isinstance(getattr(torch, name, None), torch.dtype):
            value = getattr(torch, name)
        if value is None and name.endswith("Layout"):
            value = _no_layout
        if value is None:
            raise Fault(f"{name} is not modelled")
        return value


def _stand_in(value: Any) -> Any:
    """What a kernel finds under a global name instead of ``value``."""
    module = getattr(value, "__module__", None) or getattr(value, "__name__", "")
    if module.startswith("triton."):
        named = not isinstance(value, types.ModuleType)
        return getattr(_Language(), value.__name__) if named else _Language()
    return _python(value) if isinstance(value, JITFunction) else value


def _python(kernel: Any) -> Callable[..., Any]:
    """A kernel's Python function, with stand-ins for its global names."""
    function = kernel.fn
    code, names = function.__code__, function.__globals__
    stand_ins = {name: _stand_in(names[name]) for name in code.co_names if name in names}
    return types.FunctionType(code, {"range": _range, **stand_ins})


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    arguments: dict[str, Any],
    *,
    seed: int = 0,
    schedule: str = "random",
    padded: Iterable[str] = (),
) -> None:
    """Run ``kernel[grid]``.

    Args:
        kernel: a function under ``@gluon.jit``.
        arguments: by name: numbers, tensors, tensor descriptors.
        seed: of the order of steps.
        schedule: one of SCHEDULES.
        padded: descriptors whose blocks may lie outside of their tensor altogether.

    Raises:
        Fault: see the module's docstring.
    """
    memories: dict[int, Memory] = {}

    def argument(name: str, value: Any) -> Any:
        if isinstance(value, Tensor):
            return Pointer(memories.setdefault(value.data_ptr(), Memory(name, value)))
        if hasattr(value, "block_shape"):
            return Descriptor(name, value, name in padded)
        return value if name in constants else _number(value)

    constants = {parameter.name for parameter in kernel.params if parameter.is_constexpr}
    values = {name: argument(name, value) for name, value in arguments.items()}
    call, rng = functools.partial(_python(kernel), **values), random.Random(seed)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # blocks are small
    try:
        for index in itertools.product(*map(range, grid)):
            Program(index, rng, SCHEDULES[schedule]).run(call)
    except Fault as fault:
        raise Fault(f"program {index}, {schedule} {seed}: {fault}") from fault
    finally:
        torch.set_num_threads(threads)
    for memory in memories.values():
        missing = int((~memory.stored).sum())
        if memory.stored.any() and missing:
            raise Fault(f"{missing} elements of {memory.name} are never stored")


def unsynchronized_arrivals(ptx: str) -> int:
    """Arrivals by one thread that may come before what the partition's other threads did.

    That is a wait for products, a read of shared memory or a fence with no ``bar.sync`` after it.
    """
    works = r"wgmma\.wait_group|ldmatrix|fence\.proxy\.async"
    found, alone = 0, False
    for step in re.findall(rf"{works}|bar(?:rier)?\.sync|mbarrier\.arrive\.shared", ptx):
        found += alone and step.startswith("mbarrier")
        alone = not step.startswith("bar") and (alone or not step.startswith("mbarrier"))
    return found
