"""Print how exact each kernel of AlexNet is: ``python -m tests.kernels.report``.

A table in markdown: the relative error of the forward pass and of each gradient, layer by layer
at batch 2, against float64, in float32 (interpreter) and in bfloat16 (ttsem, where it is installed
or ``FASTALEX_TTSEM_PYTHON`` names an interpreter that has it).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]  # ttsem runs this file as a script

from fastalex.model.layers import Conv2dReLU, LRNMaxPool2d, MaxPool2d  # noqa: E402
from tests.kernels import _alexnet, _oracle  # noqa: E402
from tests.kernels._suites import TTSEM_PYTHON, missing_ttsem, ttsem_cache  # noqa: E402

RESULTS = ("output", "input", "weight", "bias")


def cases(batch: int) -> list[_oracle.Case]:
    """The layers of AlexNet as cases of the oracle."""
    made = []
    for name, layer in _alexnet.layers(batch).items():
        module = layer.module
        if isinstance(module, Conv2dReLU):
            padding, frozen = module.sides(*layer.input[2:]), () if made else ("input",)
            options = {"stride": module.stride[0], "padding": padding, "groups": module.groups}
            k, size = module.out_channels, module.kernel_size[0]
            made.append(_oracle.conv(name, layer.input, k, size, frozen=frozen, **options))
        elif isinstance(module, LRNMaxPool2d):
            made.append(_oracle.lrn(name, layer.input, groups=module.groups))
        elif isinstance(module, MaxPool2d):
            made.append(_oracle.pool(name, layer.input))
        else:
            p = getattr(module, "p", 0.0)
            made.append(_oracle.linear(name, *layer.input, layer.output[1], p=p, relu=p > 0))
    return made


def print_errors(dtype: str, device: str) -> None:
    """One JSON line for each layer: its name and its errors."""
    for case in cases(batch=2):
        errors, _ = _oracle.measure(case, getattr(torch, dtype), device)
        print(json.dumps([case.name, errors]), flush=True)


def _errors(command: list[str], **environment: str) -> dict[str, dict[str, float]]:
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    environment = {**os.environ, "PYTHONPATH": paths, **environment}
    output = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    return dict(json.loads(line) for line in output.stdout.splitlines() if line.startswith("["))


def error_table() -> list[str]:
    script = str(Path(__file__).resolve())
    single = _errors([sys.executable, script, "float32", "cpu"], TRITON_INTERPRET="1")
    half = {}
    if not missing_ttsem():
        command = [TTSEM_PYTHON, "-m", "ttsem.sanitize", script, "bfloat16", "cuda"]
        half = _errors(command, TRITON_CACHE_DIR=ttsem_cache())
    lines = ["| layer | result | float32 | bfloat16 |", "|---|---|---|---|"]
    for layer, errors in single.items():
        for result in filter(errors.__contains__, RESULTS):
            name = "forward" if result == "output" else f"{result} gradient"
            other = f"{half[layer][result]:.1e}" if layer in half else "not measured"
            lines.append(f"| {layer} | {name} | {errors[result]:.1e} | {other} |")
    return lines


if __name__ == "__main__":
    if len(sys.argv) == 3:
        print_errors(*sys.argv[1:])
    else:
        print("\n".join(error_table()))
