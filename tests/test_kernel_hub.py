"""The build for the Kernel Hub, loaded as the Hub's own library loads it."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests._commands import ROOT

# Two builds, whose sources differ by a comment, beside the installed package.
SCRIPT = """
import sys
from pathlib import Path
import torch
import kernels

first, second = (kernels.get_local_kernel(Path(folder)) for folder in sys.argv[1:])
import fastalex_kernels as installed

assert len({module.__name__ for module in (first, second, installed)}) == 3
torch.manual_seed(0)
x, weight = torch.randn(2, 3, 11, 11, requires_grad=True), torch.randn(8, 3, 3, 3)
results = []
for module in (first, second, installed):
    with module.backend("interpreter"):
        y = module.lrn_max_pool2d(module.conv2d_relu(x, weight, padding=1))
        (gradient,) = torch.autograd.grad(y.square().sum(), x)
    results.append((y.detach(), gradient))
for got in results[1:]:
    assert all(map(torch.equal, got, results[0]))

# Its layers take the place of others.
@kernels.use_kernel_forward_from_hub("Conv")
class Conv(torch.nn.Conv2d):
    pass

net = torch.nn.Sequential(Conv(3, 8, 3, padding=1))
expected = torch.relu(net(x))
layer = kernels.LocalLayerRepository(Path(sys.argv[1]), layer_name="Conv2dReLU")
with kernels.use_kernel_mapping({"Conv": {"cpu": layer}}):
    net = kernels.kernelize(net, mode=kernels.Mode.TRAINING, device="cpu")
torch.testing.assert_close(net(x), expected)
assert (net(x) == 0).any()
"""


def test_two_builds_and_the_package_live_in_one_process(tmp_path: Path) -> None:
    found = pytest.importorskip("kernels", reason="needs Hugging Face's kernels")
    if not hasattr(found, "get_local_kernel"):  # the checkout's own folder
        pytest.skip("needs Hugging Face's kernels")
    source = tmp_path / "source"
    shutil.copytree(ROOT / "kernels", source / "kernels")
    shutil.copytree(ROOT / "fastalex", source / "fastalex")
    folders = [tmp_path / "first", tmp_path / "second"]
    for folder in folders:
        script = source / "kernels/build_universal.py"
        subprocess.run([sys.executable, script, folder], check=True, timeout=60)
        with open(source / "kernels/fastalex_kernels/layers.py", "a") as file:
            file.write("# another version\n")
    process = subprocess.run(
        [sys.executable, "-c", SCRIPT, *folders],
        capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
