"""Write docs/generated/rivals.md: Triton kernels of others at AlexNet's sizes; no GPU is needed.

    python docs/rivals.py

The templates are those of the installed torch's Inductor: convolutions and both of their gradients,
and matrix products, of which the persistent ones load by TMA. They are filled in as Inductor fills
them in for channels_last tensors of fixed sizes, in those configurations of its own list that have
tiles of 64 x 128 at least, compiled, and read by the same code as our kernels. The best by the
estimate is printed.
"""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch._inductor.kernel import conv, mm
from torch._inductor.template_heuristics.triton import CUDAConfigHeuristic

from fastalex.common.compile import TARGETS, compile_ahead
from fastalex.inspection import forecast
from fastalex.inspection.gpus import GPU, GPUS
from fastalex.inspection.record import Event, record_step
from fastalex.inspection.report import Reading, Row
from fastalex_kernels.common.program import Launch

PAGE = Path(__file__).parent / "generated" / "rivals.md"
BATCH = 128
CONVOLUTIONS = {  # channels in, side, channels out, kernel, padding, groups
    "conv2": (96, 27, 256, 5, 2, 2),
    "conv3": (256, 13, 384, 3, 1, 1),
    "conv4": (384, 13, 384, 3, 1, 2),
    "conv5": (384, 13, 256, 3, 1, 2),
}
FC6 = (9216, 4096)  # inputs, outputs
HEAD = (
    "pass", "kernel", "tile, warps", "registers", "spills", "shared KB", "loop", "issue", "smem",
    "L2 MB", "estimate us", "limit",
)  # fmt: skip
INTRODUCTION = """\
# Triton kernels of others at AlexNet's sizes

`python docs/rivals.py` writes this page: bfloat16, batch {batch}, Triton {triton}, torch {torch}.
Inductor's templates (`torch/_inductor/kernel`) are filled in for channels_last tensors, in those
configurations of its own list that have tiles of 64 x 128 at least and 32 or 64 in a turn; the one
with the lowest estimate is shown, without spills where there is one. Ours are the launches of the
training step. Both are compiled without a GPU and read by the same code;
[roofline.md](../roofline.md) explains the columns. **All of it is computed,
an estimate, unmeasured**; `bench/bench_layers.py` times both where there is a GPU.

A launch is seen alone. Ours of a convolution's weight leave out the kernel that adds up the parts
and applies the update, fc6's forward the one that adds up its parts; fc6's weight gradient includes
the update of 38 million weights; on sm_90 one launch makes both gradients of fc6, and neither
is shown. Inductor's sums are whole and its gradients are stored. The
estimate sees neither the latency of loads that wait for their addresses nor bank conflicts.
"""
Shape = tuple[tuple[int, ...], tuple[int, ...]]  # sizes and strides


class Problem(NamedTuple):
    """A template with what it is filled in with.

    Args:
        name: "conv2 forward".
        template: one of Inductor's.
        inputs: by the template's names.
        output: what it writes.
        sizes: M, N and K, by which Inductor cuts its blocks.
        constants: of the template.
        warps: the most that Inductor takes.
    """

    name: str
    template: Any
    inputs: dict[str, Shape]
    output: Shape
    sizes: tuple[int, int, int]
    constants: dict[str, Any]
    warps: int = 8

    @property
    def title(self) -> str:
        """The template's name."""
        return str(self.template.name)


def _last(n: int, c: int, h: int, w: int) -> Shape:
    """A channels_last tensor."""
    return (n, c, h, w), (c * h * w, 1, w * c, c)


def problems(gpu: GPU) -> Iterator[Problem]:
    """Every pass of the convolutions, and of fc6."""
    for name, (c, side, k, kernel, pad, groups) in CONVOLUTIONS.items():
        x, y = _last(BATCH, c, side, side), _last(BATCH, k, side, side)
        w, pixels = _last(k, c // groups, kernel, kernel), BATCH * side**2
        constants = {
            "KERNEL_H": kernel, "KERNEL_W": kernel, "STRIDE_H": 1, "STRIDE_W": 1,
            "DILATION_H": 1, "DILATION_W": 1, "PADDING_H": pad, "PADDING_W": pad,
            "GROUPS": groups, "UNROLL": False, "ALLOW_TF32": True,
        }  # fmt: skip
        sizes = (pixels, k, c // groups)
        for which, template, inputs, out in (
            ("forward", conv.conv2d_template, {"X": x, "W": w}, y),
            ("input", conv.conv2d_bwd_input_template, {"dY": y, "W": w}, x),
            ("weight", conv.conv2d_bwd_weight_template, {"X": x, "dY": y}, w),
        ):
            warps = 4 if which == "forward" else 8
            yield Problem(f"{name} {which}", template, inputs, out, sizes, constants, warps)
    n, k = FC6
    x, w, y = ((BATCH, n), (n, 1)), ((k, n), (n, 1)), ((BATCH, k), (k, 1))
    for which, a, b, out in (
        ("forward", x, _transposed(w), y), ("input", y, w, x), ("weight", _transposed(y), x, w),
    ):  # fmt: skip
        sizes = (a[0][0], b[0][1], a[0][1])
        constants = {
            "GROUP_M": 8, "ACC_TYPE": "tl.float32", "ALLOW_TF32": True, "USE_FAST_ACCUM": False,
            "EVEN_K": True, "NUM_SMS": gpu.processors, "TMA_EXPERIMENTAL_API": False,
            "A_ROW_MAJOR": a[1][1] == 1, "B_ROW_MAJOR": b[1][1] == 1,
        }  # fmt: skip
        templates = [mm.mm_template, mm.persistent_tma_mm_template]
        for template in templates[: 2 if gpu.target == "sm_90" else 1]:
            yield Problem(f"fc6 {which}", template, {"A": a, "B": b}, out, sizes, constants)


def _transposed(matrix: Shape) -> Shape:
    return matrix[0][::-1], matrix[1][::-1]


def _rendered(problem: Problem, blocks: dict[str, int]) -> str:
    """The source of a kernel, as ``TritonTemplate`` makes it."""
    constants = {**problem.constants, **blocks, "INDEX_DTYPE": "tl.int32"}
    shapes = {**problem.inputs, None: problem.output}

    def def_kernel(*names: str) -> str:
        head = f"import triton\nimport triton.language as tl\n\n@triton.jit\ndef {problem.title}("
        values = [f"    {name}: tl.constexpr = {value}" for name, value in constants.items()]
        return "\n".join([f"{head}{', '.join(names)}, out_ptr):", *values])

    def address(indices: tuple[str, ...], strides: tuple[int, ...]) -> str:
        return " + ".join(f"({i}) * {s}" for i, s in zip(indices, strides, strict=True))

    def store_output(
        indices: tuple[str, ...], value: str, mask: str = "", block_indexing: bool = False,
        **_: Any,
    ) -> str:  # fmt: skip
        if block_indexing:
            m, n = (
                f"({i} + tl.arange(0, {b}))"
                for i, b in zip(indices, ("BLOCK_M", "BLOCK_N"), strict=True)
            )
            indices, mask = (f"{m}[:, None]", f"{n}[None, :]"), f"({m} < M)[:, None]"
            mask += f" & ({n} < N)[None, :]"
        where = f"out_ptr + ({address(indices, problem.output[1])})"
        return f"tl.store({where}, {value}.to(out_ptr.dtype.element_ty), {mask})"

    def load_input(name: str, value: str, indices: tuple[str, ...], **_: Any) -> str:
        return f"{value} = tl.load({name} + ({address(indices, shapes[name][1])}))"

    return str(
        problem.template.template.render(
            **constants, def_kernel=def_kernel, store_output=store_output, load_input=load_input,
            size=lambda name, axis: shapes[name][0][axis],
            stride=lambda name, axis: shapes[name][1][axis],
        )
    )  # fmt: skip


def launches(problem: Problem, gpu: GPU, folder: Path) -> Iterator[Launch]:
    """The template in the configurations of Inductor's list that suit such sizes."""
    heuristic, seen = CUDAConfigHeuristic(), set()
    listed = heuristic.mm_configs if problem.name.startswith("fc") else heuristic.conv_configs
    for config in listed:
        wanted = (config.block_m, config.block_n, config.block_k)
        cut = tuple(
            max(16, min(block, triton.next_power_of_2(size)))
            for block, size in zip(wanted, problem.sizes, strict=True)
        )
        warps = min(config.num_warps, problem.warps, cut[0] * cut[1] // 256)
        key = (*cut, warps, config.num_stages)
        if key in seen or cut[0] * cut[1] < 64 * 128 or cut[2] not in (32, 64):
            continue
        seen.add(key)
        blocks = dict(zip(("BLOCK_M", "BLOCK_N", "BLOCK_K"), cut, strict=True))
        path = folder / f"{problem.name} {problem.title} {key}.py".replace(" ", "_")
        path.write_text(_rendered(problem, blocks))
        spec = importlib.util.spec_from_file_location(f"rival{len(seen)}", path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        tensors = [
            torch.empty_strided(*shape, dtype=torch.bfloat16, device="meta")
            for shape in (*problem.inputs.values(), problem.output)
        ]
        groups = problem.constants.get("GROUPS", 1)
        layer, phase = problem.name.split()
        kernel = getattr(module, problem.title)
        options = {"num_warps": warps, "num_stages": config.num_stages}
        grid = _grid(problem, cut, groups, gpu)
        yield Launch.of(layer, phase, kernel, grid, tuple(tensors), options)


def _grid(problem: Problem, cut: tuple[int, ...], groups: int, gpu: GPU) -> tuple[int, ...]:
    rows, columns = problem.sizes[:2]
    if problem.title == "convolution2d":
        return -(-rows // cut[0]), -(-columns // groups // cut[1]), groups
    if problem.title == "convolution2d_bwd_input":
        each = problem.inputs["W"][0][1]
        return -(-rows // cut[0]), -(-each // cut[1]), groups
    if problem.title == "convolution2d_bwd_weight":
        out, each, *kernel = problem.output[0]
        return -(-each * kernel[0] * kernel[1] // cut[0]), -(-out // groups // cut[1]), groups
    tiles = -(-rows // cut[0]) * -(-columns // cut[1])
    return (min(tiles, gpu.processors) if "persistent" in problem.title else tiles,)


class Found(NamedTuple):
    """A launch that was read."""

    row: Row
    made: forecast.Estimate


def _read(launch: Launch, gpu: GPU) -> Found:
    """One launch alone: L2 holds nothing of what it reads."""
    reading, rates = Reading(launch, gpu), forecast.ASSUMED[gpu.name]
    row = reading.row(Event(launch.layer, launch.phase, launch.name, launch), None)
    terms = [reading.terms(row, r, forecast.L2(r.l2_size), "bf16") for r in rates]
    return Found(row, forecast.estimate(rates, terms))


def best(problem_list: list[Problem], gpu: GPU, folder: Path) -> Found:
    """Of all templates and configurations for a pass that fit."""
    jobs = [launch for problem in problem_list for launch in launches(problem, gpu, folder)]
    compiled = list(compile_ahead([[job] for job in jobs], gpu.target))
    found = [
        _read(job, gpu) for job, one in zip(jobs, compiled, strict=True) if one.failure is None
    ]
    limit = TARGETS[gpu.target].shared_limit
    fits = [one for one in found if (one.row.shared or 0) <= limit and one.row.loop]
    return min(fits, key=lambda one: (bool(one.row.spills), one.made.middle))


def ours(gpu: GPU) -> dict[str, Found]:
    """The launches of our step with products, by layer and pass."""
    step = record_step(gpu.target, BATCH)
    found = {}
    for event in step.events:
        if event.launch is not None and event.layer in (*CONVOLUTIONS, "fc6"):
            role = Reading(event.launch, gpu).row(event, step.layers[event.layer]).role
            if role is not None:
                found[f"{event.layer} {role}"] = _read(event.launch, gpu)
    return found


def _cells(name: str, who: str, found: Found) -> str:
    row, made = found
    assert row.loop is not None
    assert row.tile is not None
    cells = [
        name, who, f"{'x'.join(map(str, row.tile))}, {row.warps}", str(row.registers),
        str(row.spills), f"{(row.shared or 0) / 1024:.0f}", str(row.loop.instructions),
        f"{row.loop.issue_ratio:.2f}", f"{row.loop.shared_ratio:.2f}",
        f"{(row.loop.loaded or 0) / 1e6:.0f}",
        f"{1e6 * made.middle:.0f} ({1e6 * made.low:.0f}-{1e6 * made.high:.0f})", made.limit,
    ]  # fmt: skip
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    """Write the page."""
    versions = {"batch": BATCH, "triton": triton.__version__, "torch": torch.__version__}
    lines = [INTRODUCTION.format(**versions)]
    with tempfile.TemporaryDirectory() as folder:
        for gpu in (GPUS["h100"], GPUS["a100"]):
            lines += [f"## {gpu.name}\n", "| " + " | ".join(HEAD) + " |", "|---" * len(HEAD) + "|"]
            mine, theirs = ours(gpu), list(problems(gpu))
            for name in mine:
                same = [problem for problem in theirs if problem.name == name]
                if same:
                    found = best(same, gpu, Path(folder))
                    lines += [_cells(name, "ours", mine[name])]
                    lines += [_cells("", f"Inductor, {found.row.name}", found)]
                    print("\n".join(lines[-2:]), flush=True)
            lines.append("")
    PAGE.write_text("\n".join(lines).rstrip() + "\n")


if __name__ == "__main__":
    main()
