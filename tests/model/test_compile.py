"""torch.compile: one graph, the same bits, the same launches."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import fastalex
import fastalex_kernels as fk
from fastalex.model.layers import Conv2dReLU, Linear, LinearReLUDropout, LRNMaxPool2d
from fastalex.model.variants import VARIANTS
from fastalex_kernels.common.backend import record_launches
from tests._nets import narrow

Net = Callable[[torch.Tensor], torch.Tensor]
Launches = list[tuple[str, tuple[int, ...]]]


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def _model(variant: str = "paper") -> fastalex.AlexNet:
    model = fastalex.AlexNet(10, variant=narrow(variant))
    model.init_parameters("he", torch.Generator().manual_seed(0))
    return model


def _images(batch: int = 2, size: int = 67) -> torch.Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1))


def _step(model: nn.Module, net: Net, images: torch.Tensor) -> list[torch.Tensor]:
    """The logits and every gradient of a training step that drops the same units each time."""
    model.zero_grad()
    if isinstance(model, fastalex.AlexNet):
        model.seed_dropout(5, 1)
    logits = net(images)
    F.cross_entropy(logits.float(), torch.arange(len(images)) % 10).backward()
    return [logits.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


def _assert_equal(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    assert [t.dtype for t in found] == [t.dtype for t in expected]
    assert all(map(torch.equal, found, expected))


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "variant", [v if v == "paper" else pytest.param(v, marks=SLOW) for v in VARIANTS]
)
def test_a_net_is_one_graph_with_the_bits_of_eager(variant: str) -> None:
    model, images = _model(variant), _images()
    expected = _step(model, model, images)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    found = _step(model, compiled, images)
    assert len(found) == 17
    _assert_equal(found, expected)


def _small_net() -> nn.Sequential:
    torch.manual_seed(0)
    dropping = LinearReLUDropout(144, 24)
    dropping.set_mask(rng=torch.tensor([123_456_789_123, 7 << 33]))
    return nn.Sequential(
        Conv2dReLU(3, 16, 5, stride=2),
        LRNMaxPool2d(alpha=1.0, groups=2),
        nn.Flatten(),
        dropping,
        Linear(24, 10),
    )


def test_a_batch_of_another_size_is_one_graph_too() -> None:
    net, recorder = _small_net(), _Recorder()
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    for batch in (4, 6):
        images = _images(batch, 17)
        _assert_equal(_step(net, compiled, images), _step(net, net, images))
    with record_launches("sm_90", recorder):
        for batch in (4, 6):
            taken = []
            for each in (net, compiled):
                _step(net, each, _images(batch, 17))
                taken.append(recorder.taken())
            assert taken[0]
            assert taken[1] == taken[0]


@SLOW
@pytest.mark.compiled
@pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor compiles with g++")
def test_inductor_drops_the_same_units() -> None:
    """Its C++ is not allowed to overflow, which a random number generator does with intent."""
    net, images = _small_net(), _images(4, 17)
    expected = _step(net, net, images)
    found = _step(net, torch.compile(net, fullgraph=True), images)
    for a, b in zip(found, expected, strict=True):
        assert (a - b).norm() <= 1e-6 * b.norm()


class _Recorder:
    """Stands for a GPU, and keeps what it was asked to launch."""

    def __init__(self) -> None:
        self.launches: Launches = []

    def __call__(self, kernel: Any, grid: tuple[int, ...], args: Any, kwargs: Any) -> None:
        self.launches.append((kernel.fn.__name__, grid))

    def taken(self) -> Launches:
        launches, self.launches = self.launches, []
        return launches


@pytest.mark.parametrize("target", [pytest.param("sm_80", marks=SLOW), "sm_90"])
def test_the_kernels_of_a_gpu_are_launched_from_one_graph(target: str) -> None:
    model, images, recorder = _model(), _images(), _Recorder()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with record_launches(target, recorder):
        taken = []
        for net in (model, compiled):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                logits = net(images)
            logits.float().sum().backward()
            taken.append(recorder.taken())
    assert len(taken[0]) > 40
    assert taken[1] == taken[0]


def test_a_graph_on_a_gpu_holds_an_operator_for_each_layer() -> None:
    """Traced on tensors of a GPU that is not there, so that no driver can be asked."""
    found: list[str] = []

    def look(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        targets = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
        found.extend(t.split(".")[1] for t in targets if t.startswith("fastalex."))
        return graph.forward

    # Without gradients: torch's CPU build has no leaf on a GPU.
    with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True):
        model = _model().eval().requires_grad_(False)
        for module in model.modules():
            for name, p in module._parameters.items():
                if p is not None:
                    on_gpu = torch.empty(p.shape, device="cuda", dtype=torch.bfloat16)
                    module._parameters[name] = nn.Parameter(on_gpu, requires_grad=False)
        images = torch.empty(4, 3, 67, 67, device="cuda", dtype=torch.bfloat16)
        logits = torch.compile(model, backend=look, fullgraph=True)(images)
    assert logits.device.type == "cuda"
    pooled = ["conv2d_relu", "lrn_max_pool2d"]
    assert found == [*pooled, *pooled, *["conv2d_relu"] * 2, *pooled, *["linear_relu_dropout"] * 3]


def test_inference_launches_no_backward_and_saves_no_maxima() -> None:
    model, images, saves = _model().eval(), _images(), []

    def record(kernel: Any, grid: Any, args: Any, kwargs: Any) -> None:
        assert "bwd" not in kernel.fn.__name__
        saves.extend(kwargs[k] for k in ("SAVE",) if k in kwargs)

    with record_launches("sm_90", record), torch.no_grad():
        torch.compile(model, backend="aot_eager", fullgraph=True)(images)
    assert saves == [False] * 3


def test_a_compiled_net_follows_the_backend() -> None:
    layer, recorder = Conv2dReLU(3, 4, 3), _Recorder()
    compiled, images = torch.compile(layer, backend="eager", fullgraph=True), _images(2, 8)
    with record_launches("sm_90", recorder), torch.no_grad():
        compiled(images)
        assert recorder.taken()
        with fk.backend("aten"):
            assert torch.equal(compiled(images), layer(images))
        assert not recorder.taken()
        compiled(images)
        assert recorder.taken()

    def elsewhere() -> None:  # what is recorded and what is chosen are each thread's own
        with record_launches("sm_90", recorder), torch.no_grad():
            compiled(images)

    with fk.backend("aten"):
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
    assert recorder.taken(), "another thread took this one's backend"


def test_a_second_backward_is_refused() -> None:
    x = torch.randn(2, 3, 5, 5, requires_grad=True)
    compiled = torch.compile(fk.lrn_max_pool2d, backend="aot_eager", fullgraph=True)
    (dx,) = torch.autograd.grad(compiled(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        dx.sum().backward()


def test_what_a_compiled_layer_returns_may_be_changed() -> None:
    layer, images = Conv2dReLU(3, 4, 3, relu=False), _images(2, 8)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    grads = []
    for net in (layer, compiled):
        layer.zero_grad()
        net(images).add_(1).mul_(2).sum().backward()
        grads.append([p.grad for p in layer.parameters()])
    _assert_equal(*grads)
