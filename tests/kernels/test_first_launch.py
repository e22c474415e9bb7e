"""Where Gluon's kernel runs, and what happens where it does not compile, or does not end."""

from __future__ import annotations

import subprocess
import sys
from contextlib import nullcontext
from unittest.mock import MagicMock

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from fastalex_kernels import reference
from fastalex_kernels.common import backend
from fastalex_kernels.common.backend import TRITON, interpreted, record_launches
from fastalex_kernels.common.program import Program
from fastalex_kernels.conv2d import forward
from fastalex_kernels.reference import relative_error, tolerance

pytestmark = [
    pytest.mark.skipif(TRITON < (3, 9), reason="Gluon has other names there"),
    pytest.mark.skipif(interpreted(), reason="no interpreter runs Gluon"),
]

NEVER_ENDS = """
from fastalex_kernels.conv2d.warp_specialized import wait_for_first_launch
class Event:
    asked = 0
    def query(self):
        self.asked += 1
        return self.asked > {asked}
wait_for_first_launch(Event(), 0.2)
print("ended")
"""


@pytest.mark.parametrize(("asked", "mode"), [(2, ""), (400, "wait"), (10**9, "")])
def test_a_first_launch_that_does_not_end_ends_the_process(
    monkeypatch: pytest.MonkeyPatch, asked: int, mode: str
) -> None:
    monkeypatch.setenv("FASTALEX_GLUON", mode)
    command = [sys.executable, "-c", NEVER_ENDS.format(asked=asked)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    if asked < 10**9:
        assert (ran.returncode, ran.stdout, ran.stderr) == (0, "ended\n", "")
    else:
        assert (ran.returncode, ran.stdout) == (2, "")
        assert len(ran.stderr.splitlines()) == 1
        assert "FASTALEX_GLUON=never" in ran.stderr


def test_without_gluon_the_plain_kernel_runs() -> None:
    """As with a later Triton, whose Gluon is elsewhere: the package imports, and has no part."""
    code = (
        "import sys; sys.modules['triton.experimental.gluon'] = None\n"
        "from fastalex_kernels.conv2d import forward; print(forward.warp_specialized)"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False
    )
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "None\n", "")


def _launched(target: str, batch: int, sizes: tuple[int, ...] = (48, 96, 3)) -> list[str]:
    """Names of the kernels of a convolution's forward pass."""
    (C, K, side), names = sizes, []
    with (
        FakeTensorMode(),
        record_launches(target, lambda kernel, *_: names.append(kernel.fn.__name__)),
    ):
        x = torch.empty(8, 8, batch, C, dtype=torch.bfloat16)
        w = torch.empty(side, side, C, K, dtype=torch.bfloat16)
        forward.conv2d_relu_forward(x, w, None, ((0, 0), (0, 0)), 1, relu=True)
    return names


def test_where_the_kernel_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """In AlexNet's first layers on sm_90, for whole tiles of 128 images, unless it is left out."""
    assert "warp_specialized" in _launched("sm_90", 128)[0]
    plain = [("sm_100", 128), ("sm_90", 120), ("sm_90", 128, (48, 80, 3)), ("sm_80", 128)]
    for case in plain:
        assert "warp_specialized" not in _launched(*case)[0]  # type: ignore[arg-type]
    monkeypatch.setenv("FASTALEX_GLUON", "never")
    assert "warp_specialized" not in _launched("sm_90", 128)[0]
    monkeypatch.setenv("FASTALEX_GLUON", "off")
    with pytest.raises(ValueError, match=r"^FASTALEX_GLUON: expected never or wait, got 'off'$"):
        _launched("sm_90", 128)


@pytest.fixture
def h100(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU is taken for a GPU that has launched nothing."""
    monkeypatch.setattr(backend, "_gpu", lambda device: ("sm_90", "H100"))
    for name in ("device", "current_stream", "Event"):
        monkeypatch.setattr(torch.cuda, name, MagicMock())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(forward.warp_specialized, "_usable", {})


def test_the_first_launch_of_each_form_is_waited_for(
    monkeypatch: pytest.MonkeyPatch, h100: None
) -> None:
    waited: list[object] = []
    monkeypatch.setattr(forward.warp_specialized, "launch", lambda *_, **__: None)
    monkeypatch.setattr(forward.warp_specialized, "wait_for_first_launch", waited.append)
    x, w, y, b = (
        torch.zeros(n).half() for n in ((1, 3, 128, 48), (3, 3, 48, 48), (1, 1, 128, 48), (64,))
    )

    def convolve(bias: Tensor | None) -> bool:
        taps = ((1, 1), (1, 0), False)
        return forward.warp_specialized.convolve(x, w, bias, y, taps, 1, True, 0)

    for bias, forms in ((b[:48], 1), (b[8:56], 1), (b[1:49], 2), (b[:48], 2)):
        assert convolve(bias)
        assert len(waited) == forms
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert [convolve(bias) for bias in (b[:48], None)] == [True, False]


@pytest.mark.parametrize("recorded", [True, False])
def test_where_the_kernel_fails_the_plain_one_runs(h100: None, recorded: bool) -> None:
    """On a CPU it does fail. That is said once, and nothing of it stays in a program."""
    x = torch.randn(3, 4, 128, 48).half()
    w = torch.randn(3, 3, 48, 48).half()
    program = Program([x])

    def run() -> Tensor:
        return forward.conv2d_relu_forward(x, w, None, ((0, 0), (0, 0)), 1, relu=True)

    with backend.backend("interpreter"), program.recording() if recorded else nullcontext():
        program.add(torch.sin, None, [x], {})
        with pytest.warns(UserWarning, match="Gluon's kernel fails, the plain one runs: .") as said:
            y, again = run(), run()
        assert len(said) == 1
        assert torch.equal(again, y)
    x, w = x.permute(2, 3, 0, 1).double(), w.permute(3, 2, 0, 1).double()
    expected = reference.conv2d_relu(x, w)
    assert relative_error(y, expected) <= tolerance(torch.float16, 9 * 48)
    plain = ["conv2d_relu_fwd_tma_kernel"] * 2 if recorded else []
    assert [launch.name for launch in program.launches[1:]] == plain
