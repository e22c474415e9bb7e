"""Print what each kernel of AlexNet is worth: ``python -m tests.kernels.report``.

Two tables in markdown: the relative error of the forward pass and of each gradient, layer by layer
at batch 2, against float64, in float32 (interpreter) and in bfloat16 (ttsem, where it is installed
or ``FASTALEX_TTSEM_PYTHON`` names an interpreter that has it); and the registers and spills of
every kernel at batch 128 in bfloat16.
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

from fastalex import offline  # noqa: E402
from tests.kernels import _alexnet, _oracle  # noqa: E402
from tests.kernels._suites import TTSEM_PYTHON, missing_ttsem, ttsem_cache  # noqa: E402

RESULTS = ("output", "input", "weight", "bias")
TARGETS = ("sm_80", "sm_90")


def cases(batch: int) -> list[_oracle.Case]:
    """The layers of AlexNet as cases of the oracle."""
    made = []
    for name, (c, image, k, size, stride, padding, groups) in _alexnet.CONVOLUTIONS.items():
        options = {"stride": stride, "padding": padding, "groups": groups}
        frozen = ("input",) if c == 3 else ()
        made.append(_oracle.conv(name, (batch, c, image, image), k, size, frozen=frozen, **options))
    for name, (c, image, groups) in _alexnet.POOLINGS.items():
        shape = (batch, c, image, image)
        pool = groups is None
        made.append(_oracle.pool(name, shape) if pool else _oracle.lrn(name, shape, groups=groups))
    for name, (inputs, outputs, p) in _alexnet.LINEARS.items():
        made.append(_oracle.linear(name, batch, inputs, outputs, p=p, relu=p > 0))
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


def code_table() -> list[str]:
    heads = [f"{t} registers, spills" for t in TARGETS]
    lines = ["| layer | kernel | " + " | ".join(heads) + " |", "|---|---|---|---|"]
    for layer, step in _alexnet.layers(128, torch.bfloat16).items():
        rows: dict[str, list[str]] = {}
        for target in TARGETS:
            found: dict[str, list[str]] = {}
            for launch in offline.record(target, step):
                code = offline.read(offline.compile_launch(launch, target))
                name = launch.name.replace("_tma", "")
                found.setdefault(name, []).append(f"{code.registers}, {code.spills}")
            for name, values in found.items():
                rows.setdefault(name, []).append("; ".join(dict.fromkeys(values)))
        lines += [f"| {layer} | {name} | {' | '.join(v)} |" for name, v in rows.items()]
    return lines


if __name__ == "__main__":
    if len(sys.argv) == 3:
        print_errors(*sys.argv[1:])
    else:
        print("\n".join([*error_table(), "", *code_table()]))
