"""Launches as Triton makes them and as a program replays them: what the driver gets. See the test.

python -m tests.training._packed_script FOLDER
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from triton.backends.nvidia import driver as nvidia

from fastalex_kernels.common.backend import record_launches
from fastalex_kernels.common.parameters import Dropout
from fastalex_kernels.common.program import Program
from fastalex_kernels.conv2d.forward import conv2d_relu_forward
from fastalex_kernels.linear.forward import Epilogue, matmul
from tests.training._libcuda import StubDriver

STREAM = 7


def main() -> None:
    driver = StubDriver(Path(sys.argv[1]))
    if not hasattr(driver.utils, "launch"):
        print(json.dumps(None))
        return
    x = torch.zeros(9, 9, 16, 64, dtype=torch.bfloat16)
    w = torch.zeros(3, 3, 64, 64, dtype=torch.bfloat16)
    rows = torch.zeros(16, 64, dtype=torch.bfloat16)
    rng = torch.zeros(2, dtype=torch.int64)
    bias = torch.zeros(64, dtype=torch.bfloat16)

    def record() -> Program:
        program = Program([rows])
        with record_launches("sm_90", run), program.recording():
            y = conv2d_relu_forward(x, w, bias, ((1, 1), (1, 1)), 1, True)
            matmul(rows, w[0, 0], Epilogue(bias, True, Dropout(0.25, rng)))
            matmul(y.permute(2, 3, 0, 1)[0, 0], w[0, 0])
        return program

    packed = seen(driver, record())
    wrap, nvidia.wrap_handle_tensordesc = nvidia.wrap_handle_tensordesc, broken
    raises = seen(driver, record())
    nvidia.wrap_handle_tensordesc = wrap
    del driver.utils.launch  # as a Triton with another launcher has none
    print(json.dumps({"packed": packed, "raises": raises, "plain": seen(driver, record())}))


def broken(*args: Any) -> Any:
    raise RuntimeError("another interface")


def run(kernel: Any, grid: Any, args: Any, kwargs: Any) -> Any:
    return kernel[grid](*args, **kwargs)


def seen(driver: StubDriver, program: Program) -> list[dict[str, Any]]:
    """Of each launch what the driver got: from Triton, from the program, and for other inputs."""
    found = []
    other = torch.zeros_like(program.inputs[0])
    for launch in program.launches:
        program.set_inputs(program.inputs)
        compiled = launch.kernel[launch.grid](*launch.arguments, **launch.options)
        driver.look(compiled.run.kernel_signature)
        launch.kernel[launch.grid](*launch.arguments, **launch.options)
        by_triton = driver.last
        launch.run(STREAM)
        replayed = driver.last
        program.set_inputs([other])
        launch.run(STREAM)
        found.append(
            {
                "name": launch.name,
                "grids": [by_triton[0], replayed[0]],
                "streams": [by_triton[1], replayed[1]],
                "bytes": len(replayed[2]),
                "same": by_triton[2] == replayed[2],
                "same with another input": by_triton[2] == driver.last[2],
                "descriptors": sum(code == 14 for code in compiled.run.kernel_signature),
                "calls Triton": calls_triton(launch.run),
            }
        )
    return found


def calls_triton(launch: Any) -> bool:
    """Whether a launch goes through Triton's Python once more."""
    files = set()

    def watch(frame: Any, event: str, argument: Any) -> None:
        files.add(frame.f_code.co_filename)

    sys.setprofile(watch)
    launch(STREAM)
    sys.setprofile(None)
    return any("triton" in name for name in files)


if __name__ == "__main__":
    main()
