"""The explicit step beside the module, autograd and the optimizer."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import fastalex_kernels as kernels
from fastalex import AlexNet
from fastalex.data import Normalization
from fastalex.data.augment import Augment
from fastalex.distributed.exchange import LoopbackExchange
from fastalex.distributed.towers import cut_to_tower
from fastalex.model.layers import Conv2dReLU, Linear
from fastalex.model.variants import VARIANTS, Variant
from fastalex.training import TrainStep, chain
from fastalex.training.autograd_step import tf32
from fastalex.training.optim import build_optimizer
from fastalex.training.passes import Gather
from fastalex.training.step import Tricks
from tests._nets import narrow

from ._towers import PairExchange, run_towers

CPU = torch.device("cpu")
CLASSES, BATCH, SIDE = 10, 4, 67
NORMAL = Normalization((127.0,) * 3, (74.0,) * 3)
INTERPRETED = pytest.param("interpreter", marks=[pytest.mark.interpreted, pytest.mark.slow])
BACKENDS = ["aten", INTERPRETED]


def bare(name: str) -> Variant:
    """A narrow net without response normalisation, which takes the interpreter longest."""
    net = narrow(name)
    return replace(net, convolutions=tuple(replace(c, norm=None) for c in net.convolutions))


def make_net(variant: str | Variant = "paper") -> AlexNet:
    model = AlexNet(CLASSES, variant=narrow(variant) if isinstance(variant, str) else variant)
    model.init_parameters("he", torch.Generator().manual_seed(0))
    return model


def images(number: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(number)
    labels = torch.randint(CLASSES, (BATCH,), generator=generator)
    return torch.randn(BATCH, 3, SIDE, SIDE, generator=generator), labels


def pixels(number: int) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Bytes with their crops and colours, and labels."""
    generator = torch.Generator().manual_seed(number)

    def draw(high: int, *shape: int) -> torch.Tensor:
        return torch.randint(high, shape, generator=generator)

    drawn = [draw(256, BATCH, 76, 76, 3).byte(), draw(9, BATCH).int(), draw(9, BATCH).int()]
    colors = 20 * torch.randn(BATCH, 3, generator=generator)
    return [*drawn, draw(2, BATCH).bool(), colors], draw(CLASSES, BATCH)


@dataclass
class Trained:
    """Losses of some steps, and what they left."""

    losses: list[float]
    weights: dict[str, torch.Tensor]
    buffers: list[torch.Tensor]


def result_of(
    model: AlexNet, optimizer: torch.optim.Optimizer, losses: list[torch.Tensor]
) -> Trained:
    buffers = [optimizer.state[p]["momentum_buffer"].clone() for p in model.parameters()]
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    return Trained([loss.item() for loss in losses], weights, buffers)


def by_step(model: AlexNet, optimizer: Any, steps: int, **options: Any) -> Trained:
    step = TrainStep(model, optimizer, **options)
    return result_of(model, optimizer, [one_by_step(step, number) for number in range(steps)])


def one_by_step(step: TrainStep, number: int, rows: int = BATCH) -> torch.Tensor:
    step.model.seed_dropout(3, number)
    x, labels = images(number)
    return step(x[:rows], labels[:rows])


def one_by_autograd(
    model: AlexNet, optimizer: torch.optim.Optimizer, number: int, rows: int = BATCH
) -> torch.Tensor:
    model.seed_dropout(3, number)
    x, labels = images(number)
    loss = kernels.cross_entropy(model(x[:rows]), labels[:rows])
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.detach()


def by_autograd(model: AlexNet, optimizer: Any, steps: int) -> Trained:
    losses = [one_by_autograd(model, optimizer, number) for number in range(steps)]
    return result_of(model, optimizer, losses)


def compare(one: Trained, other: Trained, losses: float = 1e-6, weights: float = 1e-5) -> None:
    assert one.losses == pytest.approx(other.losses, rel=losses)
    for name, weight in one.weights.items():
        error = float((weight - other.weights[name]).norm() / other.weights[name].norm())
        assert error <= weights, name
    for a, b in zip(one.buffers, other.buffers, strict=True):
        assert float((a - b).norm()) <= 1e-4 * float(b.norm()) + 1e-12


@pytest.mark.parametrize(
    "variant",
    ["caffe", *(pytest.param(v, marks=pytest.mark.slow) for v in VARIANTS if v != "caffe")],
)
def test_trains_as_autograd_and_the_optimizer_do(variant: str) -> None:
    models = [make_net(variant) for _ in range(2)]
    mine, theirs = (torch.optim.SGD(m.parameters(), 0.001, 0.9, weight_decay=0.01) for m in models)
    one, other = by_step(models[0], mine, 20), by_autograd(models[1], theirs, 20)
    assert one.losses[:10] == pytest.approx(other.losses[:10], rel=1e-6)
    compare(one, other, losses=1e-4, weights=1e-4)


@pytest.mark.slow
@pytest.mark.interpreted
@pytest.mark.parametrize(
    ("variant", "rule"),
    [
        (narrow("paper"), "paper"),
        (bare("paper"), "torch"),
        (narrow("source2012"), "torch"),
        (bare("caffe"), "paper"),  # its biases have a rate and a decay of their own
        (bare("owt"), "torch"),
        (bare("paper-without-tower-traffic"), "torch"),  # fully connected layers in groups
    ],
    ids=lambda value: getattr(value, "name", value),
)
def test_kernels_train_as_autograd_does(variant: Variant, rule: str) -> None:
    models = [make_net(variant) for _ in range(2)]
    mine, theirs = (build_optimizer(m, 0.001, 0.9, 0.01, rule) for m in models)
    with kernels.backend("interpreter"):
        compare(by_step(models[0], mine, 2), by_autograd(models[1], theirs, 2))


@functools.cache
def whole(backend: str, steps: int, left_out: str | None = None) -> Trained:
    """Steps of a whole net, without one trick."""
    model, tricks = make_net(bare("paper")), Tricks()
    if left_out is not None:
        tricks = replace(tricks, **{left_out: False})
    with kernels.backend(backend):
        return by_step(model, build_optimizer(model, 0.001), steps, tricks=tricks)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("left_out", ["fused_update", "fused_activation", "early"])
def test_each_trick_changes_no_result(backend: str, left_out: str) -> None:
    compare(whole(backend, 3), whole(backend, 3, left_out))


@pytest.mark.parametrize("backend", BACKENDS)
def test_bytes_train_as_their_images(backend: str) -> None:
    """Augmentation writes the blocks that the first convolution reads: the same values."""
    augment = Augment(NORMAL, SIDE, CPU, colored=True)
    trained = []
    with kernels.backend(backend):
        for as_bytes in (True, False):
            model = make_net(bare("paper"))
            optimizer = build_optimizer(model, 0.001)
            step = TrainStep(model, optimizer, augment=augment)
            losses = []
            for number in range(3):
                model.seed_dropout(3, number)
                given, labels = pixels(number)
                losses.append(step(given if as_bytes else augment(*given), labels))
            trained.append(result_of(model, optimizer, losses))
    assert trained[0].losses == trained[1].losses
    assert all(torch.equal(w, trained[1].weights[n]) for n, w in trained[0].weights.items())


def put_together(name: str, halves: list[torch.Tensor]) -> torch.Tensor:
    """What is cut between two towers: the last layer by its inputs, but for its bias."""
    if name != "classifier.6.bias":
        return torch.cat(halves, int(name == "classifier.6.weight"))
    assert torch.equal(*halves), "the copies of the last bias part"
    return halves[0]


@pytest.mark.parametrize("left_out", [None, "fused_update", "fused_activation", "early"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_two_towers_train_as_one_process(backend: str, left_out: str | None) -> None:
    def tower(exchange: PairExchange) -> tuple[Trained, list[str]]:
        model = make_net(bare("paper"))
        cut_to_tower(model, exchange)
        with kernels.backend(backend):
            trained = by_step(model, build_optimizer(model, 0.001), steps, tricks=tricks)
        return trained, exchange.events

    tricks, steps = Tricks(), 20 if backend == "aten" else 3
    if left_out is not None:
        tricks = replace(tricks, **{left_out: False})
    expected, towers = whole(backend, steps), run_towers(tower)
    for trained, events in towers:
        # Later ones are further apart: of one process, too, with another number of threads.
        assert trained.losses[:5] == pytest.approx(expected.losses[:5], rel=1e-6)
        # conv3, twice where it begins early, fc6, fc7 and fc8 forward; fc7, fc6 and conv3 backward.
        first = 2 if tricks.early and backend != "aten" else 1
        conv3 = ["start"] * first + ["wait"] * first
        assert events == [*conv3, *["start", "wait"] * 6] * steps
    for name, weight in expected.weights.items():
        halves = [trained.weights[name] for trained, _ in towers]
        found = put_together(name, halves)
        assert float((found - weight).norm() / weight.norm()) < 1e-5, name


def narrow_optimizer(model: AlexNet, **options: Any) -> torch.optim.Optimizer:
    return build_optimizer(
        model, 0.0005, rule="paper", momentum_dtype=torch.bfloat16, seed=7, **options
    )


def assert_same_rounding(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Of buffers whose sums are equal to float32 rounding: few elements have other neighbours."""
    assert found.dtype == expected.dtype
    if found.dtype == torch.bfloat16:
        assert float((found != expected).double().mean()) < 0.02
    assert float((found.float() - expected.float()).norm() / expected.float().norm()) < 1e-3


@pytest.mark.parametrize("other", ["autograd", "stored", "towers", INTERPRETED])
def test_narrow_momentum_is_rounded_alike(other: str) -> None:
    """By autograd and the optimizer, by stored gradients, on two towers and by kernels."""
    variant, steps = bare("paper"), 2

    def tower(exchange: PairExchange) -> Trained:
        model = make_net(variant)
        cut_to_tower(model, exchange)
        return by_step(model, narrow_optimizer(model), steps)

    whole, model = make_net(variant), make_net(variant)
    expected = by_step(whole, narrow_optimizer(whole), steps)
    if other == "autograd":
        found = by_autograd(model, narrow_optimizer(model), steps)
    elif other == "stored":
        tricks = Tricks(fused_update=False)
        found = by_step(model, narrow_optimizer(model), steps, tricks=tricks)
    elif other == "interpreter":
        with kernels.backend("interpreter"):
            found = by_step(model, narrow_optimizer(model), steps)
    else:
        halves = run_towers(tower)
        names = list(expected.weights)
        found = replace(halves[0], buffers=[])
        for i, name in enumerate(names):
            found.buffers.append(put_together(name, [h.buffers[i] for h in halves]))
    assert found.losses == pytest.approx(expected.losses, rel=1e-5)
    dtypes = [torch.bfloat16 if p.dim() == 2 else torch.float32 for p in whole.parameters()]
    assert [buffer.dtype for buffer in expected.buffers] == dtypes
    for buffer, wanted in zip(found.buffers, expected.buffers, strict=True):
        assert_same_rounding(buffer, wanted)


def test_narrow_momentum_goes_on_from_a_state_dict_bit_for_bit() -> None:
    model, steps = make_net(), 4
    whole = by_step(model, narrow_optimizer(model), steps)
    model = make_net()
    step = TrainStep(model, narrow_optimizer(model))
    for number in range(2):
        one_by_step(step, number)
    weights, state = copy.deepcopy((model.state_dict(), step.optimizer.state_dict()))
    model = make_net()
    model.load_state_dict(weights)
    step = TrainStep(model, narrow_optimizer(model))
    step.optimizer.load_state_dict(state)
    for number in range(2, steps):
        one_by_step(step, number)
    for name, weight in model.named_parameters():
        assert torch.equal(weight, whole.weights[name]), name


@pytest.mark.slow
def test_what_needs_no_answer_runs_while_halves_are_exchanged() -> None:
    """Recorded for a GPU: between start and wait of a transfer there are launches."""
    from fastalex.distributed.exchange import LoopbackExchange
    from fastalex_kernels.common.backend import record_launches

    model = AlexNet(CLASSES)
    cut_to_tower(model, LoopbackExchange())
    with record_launches("sm_90", lambda *_: None):
        step = TrainStep(model, build_optimizer(model, 0.01))
        step(torch.zeros(BATCH, 3, 224, 224), torch.zeros(BATCH, dtype=torch.int64))
    names = [launch.name for launch in step.launches]
    starts = [i for i, name in enumerate(names) if name == "LoopbackTransfer.start"]
    meanwhile = []
    for i in starts:
        wait = step.launches[i].kernel.__self__.wait
        end = next(j for j, launch in enumerate(step.launches) if launch.kernel == wait)
        meanwhile.append([x for x in step.launches[i:end] if x.grid is not None])
    layers = [step.launches[i].layer for i in starts]
    assert layers == ["conv3", "conv3", "fc6", "fc7", "fc8", "fc7", "fc6", "conv3"]
    waits = [i for i, launches in enumerate(meanwhile) if not launches]
    assert waits == [0, 4], "conv3's first rows and fc8 wait in their forward passes"


def test_shares_of_a_gradient_that_torch_made_lie_as_kernels_read_them() -> None:
    gather = Gather(LoopbackExchange(), early=True)
    halves = torch.arange(48.0).view(2, 2, 3, 4).chunk(2, -1)
    shares = gather.start_reduce_scatter(halves)()
    for share, half in zip(shares, halves, strict=True):
        assert share.is_contiguous()
        assert torch.equal(share, half)


def test_another_precision_of_torch_makes_other_launches() -> None:
    from fastalex_kernels.common.backend import record_launches

    model = make_net(bare("paper"))
    found = []
    with record_launches("sm_90", lambda *_: None):
        step = TrainStep(model, build_optimizer(model, 0.01))
        for precision in ("float32", "tf32", "float32"):
            with tf32(precision):
                one_by_step(step, 0)
            fc6 = next(x for x in step.launches if x.layer == "fc6" and "PRECISION" in x.named)
            found.append(fc6.named["PRECISION"])
    assert found == ["ieee", "tf32", "ieee"]


def counted(step: TrainStep) -> list[tuple[Any, ...]]:
    return [(q.kernel, q.grid, [id(a) for a in q.arguments]) for q in step.launches]


def test_later_steps_run_the_recorded_launches_on_the_same_memory() -> None:
    model = make_net()
    step = TrainStep(model, build_optimizer(model, 0.01))
    step(*images(0))
    recorded = counted(step)
    for number in (1, 2):
        step(*images(number))
    again = counted(step)
    differ = [i for i, (a, b) in enumerate(zip(recorded, again, strict=True)) if a != b]
    assert differ in ([0], [0, len(recorded) // 2], differ[:2]), "only what reads the inputs"
    assert len(differ) <= 2


def test_a_step_on_a_cpu_has_the_same_bits_each_time_and_close_ones_on_other_threads() -> None:
    before, results = torch.get_num_threads(), []
    try:
        for threads in (2, 2, 3, 1):
            torch.set_num_threads(threads)
            model = make_net()
            step = TrainStep(model, build_optimizer(model, 0.01))
            for number in range(2):
                model.seed_dropout(3, number)
                step(*images(number))
            results.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    for other in results[2:]:
        torch.testing.assert_close(other, results[0], rtol=1e-4, atol=1e-6)


class _NoHost(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Fails where a value is read on the host, or a tensor is made of the host's values."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.split("::")[1]
        assert name not in ("_local_scalar_dense", "lift_fresh", "nonzero", "is_pinned"), name
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_reads_nothing_on_the_host(dtype: torch.dtype) -> None:
    model = make_net()
    optimizer = build_optimizer(model, 0.01, rule="paper", momentum_dtype=dtype)
    step = TrainStep(model, optimizer)
    model.seed_dropout(3, 0)
    step(*images(0))
    optimizer.param_groups[0]["lr"] = 0.001
    batch = images(1)
    with _NoHost():
        model.seed_dropout(3, 1)
        loss = step(*batch)
    with pytest.raises(AssertionError, match="_local_scalar_dense"), _NoHost():
        loss.item()


@contextlib.contextmanager
def attributes_watched(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Names of attributes that are set on tensors inside the ``with`` block."""
    found: list[str] = []

    def watch(self: torch.Tensor, name: str, value: object) -> None:
        if name not in ("requires_grad", "grad", "data"):
            found.append(name)
        object.__setattr__(self, name, value)

    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "__setattr__", watch, raising=False)
        yield found


@pytest.mark.slow
@pytest.mark.interpreted
def test_a_step_sets_no_attribute(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_net(bare("paper"))
    optimizer = build_optimizer(model, 0.01)
    keys = [set(group) for group in optimizer.param_groups]
    with attributes_watched(monkeypatch) as found, kernels.backend("interpreter"):
        TrainStep(model, optimizer)(*(x[:1] for x in images(0)))
    assert found == []
    assert [set(group) for group in optimizer.param_groups] == keys
    assert all(list(state) == ["momentum_buffer"] for state in optimizer.state.values())


@pytest.mark.interpreted
def test_a_function_sets_no_attribute(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither on a tensor nor on the grad_fn of what another function returned."""
    nodes: list[tuple[Any, set[str]]] = []
    x = torch.randn(2, 16, 9, 9, requires_grad=True)
    kernel = torch.randn(16, 16, 3, 3, requires_grad=True)
    weight = torch.randn(16, 16, requires_grad=True)
    functions: list[Any] = [
        lambda x: kernels.conv2d_relu(x, kernel, padding=1),
        kernels.lrn_max_pool2d,
        kernels.max_pool2d,
        lambda x: kernels.linear_relu_dropout(x.flatten(1), weight),
        lambda x: kernels.cross_entropy(x, torch.zeros(2, dtype=torch.int64)),
    ]
    with attributes_watched(monkeypatch) as found, kernels.backend("interpreter"):
        for function in functions:
            x = function(x)
            nodes.append((x.grad_fn, set(vars(x.grad_fn))))
        found += [name for node, before in nodes for name in set(vars(node)) - before]
        x.backward()
    assert found == []


Pair = tuple[list[AlexNet], list[torch.optim.Optimizer]]


def _pair(variant: str | Variant = "paper") -> Pair:
    models = [make_net(variant) for _ in range(2)]
    optimizers = [torch.optim.SGD(m.parameters(), 0.001, 0.9, weight_decay=0.01) for m in models]
    return models, list(optimizers)


def assert_equal_losses(step: TrainStep, pair: Pair, numbers: Iterable[int]) -> None:
    for number in numbers:
        mine = one_by_step(step, number)
        with kernels.backend("aten"):
            theirs = one_by_autograd(pair[0][1], pair[1][1], number)
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=0)


def _move(model: AlexNet, optimizer: torch.optim.Optimizer) -> None:
    for parameter in model.parameters():
        parameter.data = parameter.data.clone() * 0.9


def _change_in_place(model: AlexNet, optimizer: torch.optim.Optimizer) -> None:
    with torch.no_grad():
        model.features[0].weight.mul_(0.9)
        model.classifier[1].bias.add_(0.01)
    model.features[3].weight.data = model.features[3].weight.data * 0.95


def _load_weights(model: AlexNet, optimizer: torch.optim.Optimizer) -> None:
    model.load_state_dict({name: 0.9 * x for name, x in model.state_dict().items()})


def _load_state(model: AlexNet, optimizer: torch.optim.Optimizer) -> None:
    state = copy.deepcopy(optimizer.state_dict())
    state["param_groups"][0]["lr"] = 0.0
    for of in state["state"].values():
        of["momentum_buffer"].mul_(0.5)
    optimizer.load_state_dict(state)


def _forget(model: AlexNet, optimizer: torch.optim.Optimizer) -> None:
    optimizer.state.clear()


def _replace_buffers(model: AlexNet, optimizer: torch.optim.Optimizer) -> None:
    for parameter in model.parameters():
        optimizer.state[parameter]["momentum_buffer"] = torch.full_like(parameter, 0.01)


def _replace_layer(model: AlexNet, optimizer: torch.optim.Optimizer) -> None:
    torch.manual_seed(1)
    old, new = model.classifier[6], Linear(64, CLASSES)
    model.classifier[6] = new
    optimizer.param_groups[0]["params"][-2:] = list(new.parameters())
    for parameter in old.parameters():
        optimizer.state.pop(parameter)


@pytest.mark.parametrize(
    "change",
    [
        _move, _change_in_place, _load_weights, _load_state, _forget, _replace_buffers,
        _replace_layer,
    ],
)  # fmt: skip
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_step_takes_over_what_was_changed(backend: str, change: Any) -> None:
    """The oracle is autograd on ATen with torch.optim.SGD, which looks all up at each step."""
    pair = _pair(bare("paper"))
    with kernels.backend(backend):
        step = TrainStep(pair[0][0], pair[1][0])
        assert_equal_losses(step, pair, range(2))
        for model, optimizer in zip(*pair, strict=True):
            change(model, optimizer)
        assert_equal_losses(step, pair, range(2, 4))
    compare(*(result_of(m, o, []) for m, o in zip(*pair, strict=True)))


def test_learning_rate_scheduler_of_torch() -> None:
    pair = _pair()
    step = TrainStep(pair[0][0], pair[1][0])
    schedulers = [torch.optim.lr_scheduler.StepLR(o, 2, gamma=0.1) for o in pair[1]]
    for number in range(5):
        assert_equal_losses(step, pair, [number])
        for scheduler in schedulers:
            scheduler.step()
    compare(*(result_of(m, o, []) for m, o in zip(*pair, strict=True)))


def test_state_dict_goes_on_in_another_optimizer() -> None:
    pair = models, optimizers = _pair()
    step = TrainStep(models[0], optimizers[0])
    for number in range(2):
        one_by_step(step, number)
    models[1].load_state_dict(models[0].state_dict())
    optimizers[1].load_state_dict(copy.deepcopy(optimizers[0].state_dict()))
    assert_equal_losses(step, pair, [2])
    # And back: what torch left the step takes.
    optimizers[0].load_state_dict(copy.deepcopy(optimizers[1].state_dict()))
    models[0].load_state_dict(models[1].state_dict())
    assert_equal_losses(step, pair, [3, 4])
    compare(*(result_of(m, o, []) for m, o in zip(models, optimizers, strict=True)))


def test_gradient_norms_are_those_of_autograd() -> None:
    models, optimizers = _pair("caffe")
    step = TrainStep(models[0], optimizers[0])
    one_by_step(step, 0)
    one_by_autograd(models[1], optimizers[1], 0)  # it leaves its gradients
    norms = step.gradient_norms()
    assert norms.keys() == dict(models[1].named_parameters()).keys()
    for name, parameter in models[1].named_parameters():
        assert parameter.grad is not None
        assert float(norms[name]) == pytest.approx(float(parameter.grad.double().norm()), rel=1e-5)


def test_masks_are_drawn_anew_where_nobody_seeds_them() -> None:
    torch.manual_seed(7)
    model = make_net()
    step = TrainStep(model, torch.optim.SGD(model.parameters(), 0.0, momentum=0.9))
    batch = images(0)
    losses = [float(step(*batch)) for _ in range(3)]
    assert len(set(losses)) == 3
    torch.manual_seed(7)
    other = make_net()
    again = TrainStep(other, torch.optim.SGD(other.parameters(), 0.0, momentum=0.9))
    assert [float(again(*batch)) for _ in range(3)] == losses


def test_loss_is_not_overwritten_by_the_next_step() -> None:
    model = make_net()
    step = TrainStep(model, build_optimizer(model, 0.01))
    first = step(*images(0))
    value = float(first)
    step(*images(1))
    assert float(first) == value


def test_batches_of_two_shapes_share_the_parameters() -> None:
    models, optimizers = _pair()
    step = TrainStep(models[0], optimizers[0])
    for number, rows in enumerate((4, 2, 4, 2)):
        mine = one_by_step(step, number, rows)
        theirs = one_by_autograd(models[1], optimizers[1], number, rows)
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=0)


def _with_hook(model: AlexNet) -> None:
    model.features[3].register_forward_hook(lambda *_: None)


def _replaced(model: AlexNet) -> None:
    model.classifier[6] = nn.Linear(64, CLASSES)


def _frozen(model: AlexNet) -> None:
    model.features[0].weight.requires_grad_(False)


def _narrow_weights(model: AlexNet) -> None:
    model.half()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_with_hook, r"^model: features\.3 is a Conv2dReLU with a hook"),
        (_replaced, r"^model: classifier\.6 is a Linear, which is no layer of fastalex's$"),
        (_frozen, r"^model: features\.0\.weight is frozen"),
        (_narrow_weights, r"^model: features\.0\.weight is torch\.float16, expected float32"),
    ],
)
def test_model_it_cannot_run_is_named(change: Any, message: str) -> None:
    model = make_net()
    change(model)
    with pytest.raises(ValueError, match=message):
        TrainStep(model, torch.optim.SGD(model.parameters(), 0.01))


def test_model_that_changes_into_one_it_cannot_run_is_named() -> None:
    model = make_net()
    step = TrainStep(model, torch.optim.SGD(model.parameters(), 0.01))
    step(*images(0))
    model.classifier[6] = nn.Linear(64, CLASSES)
    with pytest.raises(ValueError, match=r"^model: classifier\.6 is a Linear"):
        step(*images(1))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (torch.optim.Adam, r"^optimizer: expected torch\.optim\.SGD or PaperSGD, got Adam$"),
        (
            lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, nesterov=True),
            r"^optimizer: nesterov=True is not what the kernels apply$",
        ),
        (
            lambda p: torch.optim.SGD(list(p)[:-1], 0.1),
            r"^model: classifier\.6\.bias is not among the optimizer's parameters$",
        ),
        (
            lambda p: torch.optim.SGD([*p, nn.Parameter(torch.zeros(1))], 0.1),
            r"^optimizer: it has parameters that are not the model's$",
        ),
    ],
)
def test_optimizer_it_cannot_follow_is_named(make: Any, message: str) -> None:
    model = make_net()
    with pytest.raises(ValueError, match=message):
        TrainStep(model, make(model.parameters()))


def test_float16_is_refused() -> None:
    model = make_net()
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    with pytest.raises(ValueError, match=r"^precision: expected one of float32, bf16, got 'fp16'"):
        TrainStep(model, optimizer, "fp16")


LABELS = torch.zeros(BATCH, dtype=torch.int64)
IMAGES = torch.zeros(BATCH, 3, SIDE, SIDE)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ((IMAGES[:, :1], LABELS), r"^images: expected floats \[N, 3, H, W\]"),
        ((pixels(0)[0], LABELS), r"^images: bytes need augment="),
        ((IMAGES[..., :20, :20], LABELS), r"^images: 20 x 20 pixels are too few"),
        ((None, LABELS), r"^images: expected a tensor or bytes, got NoneType"),
        ((IMAGES, LABELS[:2]), r"^labels: expected int64 \[4\], got torch.int64 \[2\]"),
        ((IMAGES, LABELS.int()), r"^labels: expected int64 \[4\], got torch.int32 \[4\]"),
        ((IMAGES, LABELS.to("meta")), r"^labels: expected device cpu, got meta"),
    ],
)
def test_wrong_batches_are_named_and_change_nothing(batch: Any, message: str) -> None:
    model = make_net()
    step = TrainStep(model, torch.optim.SGD(model.parameters(), 0.01))
    step(*images(0))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises((TypeError, ValueError), match=message):
        step(*batch)
    assert all(torch.equal(before[name], x) for name, x in model.state_dict().items())


def test_bytes_of_another_form_are_refused_after_good_ones() -> None:
    model = make_net()
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    step = TrainStep(model, optimizer, augment=Augment(NORMAL, SIDE, CPU, colored=True))
    (x, top, left, mirror, colors), labels = pixels(0)
    step((x, top, left, mirror, colors), labels)
    with pytest.raises((TypeError, ValueError), match="mirrors: expected"):
        step((x, top, left, top, colors), labels)
    with pytest.raises((TypeError, ValueError), match="images: expected"):
        step((x.float(), top, left, mirror, colors), labels)


def test_convolutions_get_the_memory_order_of_their_kernels() -> None:
    model = make_net(bare("paper"))
    before = copy.deepcopy(model.state_dict())
    with kernels.backend("interpreter"):
        TrainStep(model, torch.optim.SGD(model.parameters(), 0.01))
    for layer in model.modules():
        if isinstance(layer, Conv2dReLU) and layer.stride == (1, 1):
            assert layer.weight.permute(2, 3, 1, 0).is_contiguous()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_gpu_that_is_too_old_is_left_to_autograd(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chain, "too_old", lambda index: f"GPU {index} is too old")
    with FakeTensorMode():
        weight = nn.Parameter(torch.empty(2, device="cuda"), requires_grad=False)
        model: Any = nn.ParameterList([weight])
        with pytest.raises(ValueError, match=r"^GPU 0 is too old$"):
            chain.check(model, torch.optim.SGD([weight]))
