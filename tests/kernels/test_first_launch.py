"""Where Gluon's kernel runs, and what happens where it does not compile, or does not end."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fastalex_kernels.common.backend import TRITON, interpreted, record_launches
from fastalex_kernels.conv2d import forward

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


def test_a_kernel_that_does_not_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is said in one line."""
    from fastalex_kernels.conv2d import warp_specialized

    class Broken:
        def warmup(self, *_: object, **__: object) -> None:
            raise RuntimeError("no such instruction\nand more")

    name = "conv2d_relu_fwd_warp_specialized_kernel"
    monkeypatch.setattr(warp_specialized, name, Broken())
    with pytest.warns(UserWarning, match="plain one runs: no such instruction$"):
        assert not warp_specialized._compiles((), {})
