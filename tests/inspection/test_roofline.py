"""What the roofline report computes, against counts made another way, and what it refuses."""

from __future__ import annotations

import functools
import itertools
import math
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fastalex import AlexNet
from fastalex.common import compile
from fastalex.common.compile import TARGETS
from fastalex.distributed.exchange import LoopbackExchange
from fastalex.distributed.towers import cut_to_tower
from fastalex.inspection import cost, offline, roofline, sass, ttir
from fastalex.inspection.gpus import GPUS
from fastalex.inspection.record import Step, record_step
from fastalex.inspection.report import inspect
from fastalex.training import TrainStep
from fastalex.training.optim import build_optimizer
from fastalex_kernels.common.backend import TRITON, interpreted, record_launches
from fastalex_kernels.common.tuned import PROCESSORS

pytestmark = pytest.mark.skipif(interpreted(), reason="an interpreted kernel has no machine code")
recorded = functools.cache(record_step)


@pytest.mark.slow
@pytest.mark.parametrize(("target", "pixels", "chunks"), [("sm_80", 1, 1), ("sm_90", 3, 3)])
def test_the_turns_of_a_program_are_its_taps_that_touch_the_image(
    target: str, pixels: int, chunks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """conv2, 5 x 5 on 27 x 27 with padding 2: counted tap by tap.

    Pixels of a program take the taps that any of them needs, in chunks of 48 channels.
    """
    monkeypatch.setenv("FASTALEX_GLUON", "never")
    recorded.cache_clear()
    (event,) = [e for e in recorded(target, 128, step="infer").events if e.layer == "conv2"]
    assert event.launch is not None
    assert event.launch.grid == (27 * 27 // pixels, 2)
    compiled = offline.compile_launch(event.launch, target)
    work = ttir.read(compiled.asm["ttir"]).work(event.launch.grid, event.launch.named)
    taps = [{r for r in range(5) if 0 <= p + r - 2 < 27} for p in range(27)]
    order = [(p % 27, q) for p in range(2, 29) for q in range(27)]  # lines at a border come last
    expected = []
    for first in range(0, len(order), pixels):
        program = order[first : first + pixels]
        axes = [len(set().union(*(taps[at] for at in axis))) for axis in zip(*program, strict=True)]
        expected.append(chunks * math.prod(axes))
    assert work is not None
    assert sorted(w.turns[0] for w in work) == sorted(2 * expected)  # of two groups
    turn = 2 * 128 * pixels * 128 * 48 // chunks
    assert sum(w.flops for w in work) == 2 * turn * sum(expected)


@pytest.mark.slow
@pytest.mark.skipif(TRITON < (3, 9), reason="Gluon has other names there")
def test_what_a_warp_of_its_own_loads_counts_to_the_turns_of_the_products() -> None:
    """conv2's input gradient in Gluon: lines of taps by 16 channels, and blocks of a turn."""
    recorded.cache_clear()
    step = recorded("sm_90", 128)
    event = next(
        e
        for e in step.events
        if (e.layer, e.phase) == ("conv2", "backward") and "warp_specialized" in e.name
    )
    (row,) = inspect(Step([event], {"conv2": step.layers["conv2"]}), GPUS["h100"], "bf16")
    lines = sum(sum(0 <= p + r - 2 < 27 for r in range(5)) for p in range(27))
    turns = lines * 7 * 2 * 8  # runs of four pixels, two groups, 128 channels
    loop = row.loop
    assert loop is not None
    assert (row.role, row.tile, row.warps) == ("input", (4 * 128, 48), 8)
    assert (loop.turns, loop.turn_flops) == (turns, 2 * 4 * 25 // 5 * 128 * 48 * 16)
    assert loop.turn_bytes == 2 * 16 * (8 * 128 + 5 * 48)
    assert row.flops == loop.turns * loop.turn_flops


def test_a_launch_s_figures_are_those_of_its_product() -> None:
    """fc8's product and what finishes it, against counts by hand."""
    step = recorded("sm_90", 128)
    found = [e for e in step.events if (e.layer, e.phase) == ("fc8", "forward")]
    product, finish = inspect(Step(found, {"fc8": step.layers["fc8"]}), GPUS["h100"], "bf16")
    assert (product.role, product.grid, product.tile) == ("forward", (16, 1, 8), (128, 64))
    assert product.flops == 2 * 128 * 1024 * 4096
    assert product.read == 2 * (128 * 4096 + 1000 * 4096)
    assert product.written == finish.read - 2 * 1000 == 8 * 4 * 128 * 1000
    assert product.useful == pytest.approx(1000 / 1024)
    assert product.floor_flops == 2 * 128 * 1000 * 4096
    assert product.loads[0] == "TMA"
    assert (product.spills, finish.spills) == (0, 0)
    loop = product.loop
    assert loop is not None
    assert loop.product.startswith("HGMMA.64x64x16")
    assert loop.turn_bytes == 2 * 64 * (128 + 64)
    assert loop.turns is not None
    assert loop.turns * loop.turn_flops == product.flops
    assert loop.loaded == loop.turns * loop.turn_bytes
    assert loop.barriers > 0
    assert (finish.loop, finish.flops, finish.written) == (None, 0.0, 2 * 128 * 1000)


def test_columns_that_a_tensor_lacks_are_not_read() -> None:
    """conv1's weight gradient: blocks of 64 columns of x for three taps, and 128 of dz."""
    step = recorded("sm_90", 128)
    found = [e for e in step.events if e.launch is not None and "bwd_weight" in e.name]
    (row,) = inspect(Step(found[-1:], {"conv1": step.layers["conv1"]}), GPUS["h100"], "bf16")
    assert (row.layer, row.tile) == ("conv1", (3 * 64, 128))
    loop = row.loop
    assert loop is not None
    assert loop.turn_bytes == 2 * 64 * (3 * 64 + 128)
    assert loop.turns == 3 * 55 * 55 * 128 // 64  # a line of taps for each block of images
    assert loop.loaded == loop.turns * 2 * 64 * (3 * 48 + 96)


def test_the_figures_of_two_gradients_and_an_update_in_one_pass() -> None:
    """fc8's, against counts by hand: 128 strips of 32 inputs, 16 blocks of 64 outputs."""
    step = recorded("sm_90", 128)
    found = [e for e in step.events if (e.layer, e.phase) == ("fc8", "backward")]
    (row,) = inspect(Step(found, {"fc8": step.layers["fc8"]}), GPUS["h100"], "bf16")
    assert (row.role, row.grid, row.tile) == ("backward", (128,), (128, 32))
    assert row.flops == 2 * 2 * 128 * 1024 * 4096
    assert row.updated == 18 * (1000 * 4096 + 1000)
    assert row.floor_flops == 2 * 2 * 128 * 1000 * 4096
    assert row.spills == 0
    assert row.estimate is not None
    assert row.loop is not None
    assert row.loop.loaded == 128 * 16 * (2 * 128 * 64 + 2 * 4 * 64 * 32)


@pytest.mark.parametrize("grid", [(4,), (2, 3, 2)])
def test_work_that_depends_on_the_place_in_the_grid(grid: tuple[int, ...]) -> None:
    """A loop of x + 1 turns in which a product is made where y is odd, or always."""
    x, y, z = (*grid, 1, 1)[:3]
    work = ttir.Code(IR).work(grid, {"n": 3})
    places = itertools.product(range(z), range(y), range(x))
    expected = [((i + 1) * (1 + (j % 2) * 3), [i + 1]) for _, j, i in places]
    assert work is not None
    assert [(w.flops // (2 * 16 * 32 * 64), w.turns) for w in work] == expected


IR = """
module {
  tt.func public @k(%p_ptr: !tt.ptr<f32> loc("p"(#loc)), %n: i32 loc("n"(#loc))) {
    %c0 = arith.constant 0 : i32 loc(#loc)
    %c1 = arith.constant 1 : i32 loc(#loc)
    %c2 = arith.constant 2 : i32 loc(#loc)
    %x = tt.get_program_id x : i32 loc(#loc)
    %y = tt.get_program_id y : i32 loc(#loc)
    %hi = arith.addi %x, %c1 : i32 loc(#loc)
    %odd = arith.remsi %y, %c2 : i32 loc(#loc)
    %acc:2 = scf.for %i = %c0 to %hi step %c1 iter_args(%a = %cst, %b = %c1) -> (t, i32)  : i32 {
      %is = arith.cmpi eq, %odd, %b : i32 loc(#loc)
      %d = tt.dot %u, %v, %a : tensor<16x64xf16> * tensor<64x32xf16> -> tensor<16x32xf32> loc(#loc)
      %r = scf.if %is -> (tensor<16x32xf32>) {
        %e = tt.dot %u, %w, %d : tensor<16x64xf16> * tensor<64x96xf16> -> tensor<1xf32> loc(#loc)
        scf.yield %e : tensor<16x32xf32> loc(#loc)
      } else {
        scf.yield %d : tensor<16x32xf32> loc(#loc)
      } loc(#loc)
      scf.yield %r, %b : tensor<16x32xf32>, i32 loc(#loc)
    } loc(#loc)
    tt.store %p_ptr, %acc#0 : tensor<16x32x!tt.ptr<f32>> loc(#loc)
    tt.return loc(#loc)
  } loc(#loc)
} loc(#loc)
"""


SLOW_CEILINGS = [("h100", 1024, 147e3), ("a100", 128, 44e3), ("a100", 1024, 55e3)]


@pytest.mark.parametrize(
    ("gpu", "batch", "ceiling"),
    [
        ("h100", 128, 104e3),
        *(pytest.param(*row, marks=pytest.mark.slow) for row in SLOW_CEILINGS),
    ],
)
def test_the_floor_of_a_step(gpu: str, batch: int, ceiling: float) -> None:
    """The ceilings that were computed by hand for these rates, of the net without its input."""
    step = recorded(GPUS[gpu].target, batch)
    floors = cost.floors(step.layers, 2, train=True)
    augment = floors.pop(("augment", "forward"))
    assert augment.size == batch * (224 * 224 * 3 + 2 * 57 * 57 * 48)  # crops, blocks
    seconds = sum(GPUS[gpu].seconds(f.flops, f.size, "bf16") for f in floors.values())
    seconds += cost.UPDATE_BYTES * step.parameters / (1e12 * GPUS[gpu].bandwidth)
    assert batch / seconds == pytest.approx(ceiling, rel=0.01)
    # In one pass the output's gradient is read once, and the weight for the update alone.
    apart = floors["fc6", "input"], floors["fc6", "weight"]
    backward = cost.floors(step.layers, 2, train=True, one_pass=["fc6"])["fc6", "backward"]
    assert backward.flops == sum(f.flops for f in apart)
    assert backward.size == sum(f.size for f in apart) - 2 * 4096 * (9216 + batch)


@pytest.mark.slow
@pytest.mark.compiled
def test_narrow_momentum_saves_two_bytes_each_way_of_a_fully_connected_weight() -> None:
    reports = [
        roofline.make_report(GPUS["h100"], roofline.Case(128, momentum_dtype=dtype))[0]
        for dtype in ("float32", "bf16")
    ]
    wide, narrow = (report["summary"] for report in reports)
    parameters = sum(p.numel() for p in AlexNet().parameters())
    weights = 4096 * (9216 + 4096 + 1000)
    for figure in ("optimizer_bytes_per_parameter", "floor_of_the_update"):
        assert parameters * (wide[figure] - narrow[figure]) == pytest.approx(4 * weights), figure
    assert wide["floor_of_the_update"] == 18
    assert narrow["estimate"]["middle"] < wide["estimate"]["middle"]


@pytest.mark.parametrize(
    ("target", "towers", "dtype"),
    [
        ("sm_90", 1, "bf16"),
        pytest.param("sm_80", 1, "fp32", marks=pytest.mark.slow),
        pytest.param("sm_90", 2, "fp32", marks=pytest.mark.slow),
    ],
)
def test_from_bytes_to_the_first_convolution_is_one_kernel(
    target: str, towers: int, dtype: str
) -> None:
    """Nothing of torch's between: what it would rearrange the images with, or cast."""
    events = recorded(target, 128, dtype, towers=towers).events
    before = [e for e in events if e.layer in ("augment", "conv1") and e.phase == "forward"]
    assert [e.layer for e in before] == ["augment", "conv1"]
    augment, convolution = (e.launch for e in before)
    assert augment is not None
    assert convolution is not None
    assert augment.name == "_augment_kernel"
    assert augment.named["images_ptr"].shape == (128, 256, 256, 3)
    backward = [e.name for e in events if e.layer == "conv1" and e.phase == "backward"]
    assert not [name for name in backward if name.startswith("aten")]


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["paper", "source2012"])
@pytest.mark.parametrize("towers", [1, 2])
def test_the_launches_are_those_that_a_training_step_makes(towers: int, variant: str) -> None:
    """Of a step that is run again: what it launches, as it comes to whoever records launches."""
    made: list[tuple[str, Any]] = []

    def recorder(kernel: Any, grid: tuple[int, ...], *_: Any) -> None:
        made.append((kernel.fn.__name__, grid))

    with FakeTensorMode(), record_launches("sm_90", recorder):
        model = AlexNet(variant=variant)
        if towers == 2:
            cut_to_tower(model, LoopbackExchange())
        images, labels = torch.empty(128, 3, 224, 224), torch.empty(128, dtype=torch.int64)
        step = TrainStep(model, build_optimizer(model, lr=0.1), "bf16")
        for number in (1, 2):
            made.clear()
            model.seed_dropout(0, number)
            step(images, labels)
    events = record_step("sm_90", 128, towers=towers, variant=variant).events
    listed = [(e.name, e.launch.grid) for e in events if e.launch is not None]
    assert listed[0] == ("_augment_kernel", (3328,))  # the step above begins at images
    assert listed[1:] == made
    assert len(made) > 30


def test_what_a_step_does_beside_its_launches_is_counted() -> None:
    events = recorded("sm_90", 128).events
    others = [(e.layer, e.name, e.read, e.written) for e in events if e.launch is None]
    maps = 128 * 256 * 6 * 6 * 2
    assert others == [
        ("pool5", "aten.copy_", maps, maps),  # to rows of features
        ("pool5", "aten.copy_", maps, maps),  # their gradient, back
        ("step", "aten.fill_", 0, 2 * 8),  # the step's number, for fc6 and fc7
        ("step", "aten.sum", 32 * 4, 4),  # of the loss, for the caller
    ]


def test_a_tower_s_own_half_is_made_while_the_other_s_gradient_is_exchanged() -> None:
    step = recorded("sm_90", 128, towers=2)
    first, *rest = step.exchanges
    assert (first.layer, first.phase, first.ended) == ("conv3", "forward", first.started)
    meanwhile = {
        (one.layer, one.phase): [e.name for e in step.events[one.started : one.ended]]
        for one in rest
    }
    product = ["_linear_relu_dropout_fwd_kernel"]
    assert meanwhile == {
        ("conv3", "forward"): ["conv2d_relu_fwd_tma_kernel"],  # of the first rows
        **{(name, "forward"): product for name in ("fc6", "fc7")},
        ("fc8", "forward"): [],
        **{(name, "backward"): ["_linear_bwd_kernel"] for name in ("fc7", "fc6")},
        ("conv3", "backward"): ["_conv2d_bwd_weight_kernel", "_sum_update_kernel"],
    }
    sizes = {(one.layer, one.phase): one.size for one in rest}
    rows = [one.size for one in step.exchanges if (one.layer, one.phase) == ("conv3", "forward")]
    assert rows == [2 * 128 * 128 * 13 * number for number in (4, 13)]
    assert sizes["fc8", "forward"] == 4 * 128 * 1000
    assert sizes["fc7", "backward"] == 2 * 128 * 2048


def test_a_forward_pass_is_the_step_s_without_loss_and_dropout() -> None:
    train, infer = recorded("sm_90", 128).events, recorded("sm_90", 128, step="infer").events
    forward = [e.name for e in train if e.phase == "forward" and e.layer not in ("loss", "step")]
    forward.remove("_pack_lines_kernel")  # a copy for the backward pass
    assert [e.name for e in infer] == forward
    assert not any(e.launch.named.get("DROPOUT") for e in infer if e.launch is not None)
    assert any(e.launch.named.get("DROPOUT") for e in train if e.launch is not None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"towers": 2, "variant": "owt"}, "towers: variant owt has 1, got 2"),
        ({"dtype": "fp16"}, "precision: expected one of float32, bf16, got 'fp16': "),
    ],
)
def test_a_step_that_cannot_be_recorded(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        record_step("sm_90", 128, **options)


@pytest.mark.parametrize(
    ("programs", "slots", "turns"), [(1, 1, 1), (132, 1, 1), (133, 1, 2), (264, 1, 2), (264, 2, 1)]
)
def test_programs_take_turns_on_the_processors(programs: int, slots: int, turns: int) -> None:
    end = cost.schedule(GPUS["h100"], [1e6] * programs, slots)
    assert end == pytest.approx(turns * (1e6 * slots + 1500))


def test_places_that_stay_free_take_no_time() -> None:
    few, many = (cost.schedule(GPUS["h100"], [1e6] * 264, slots) for slots in (2, 8))
    assert few == many


def test_resident_programs() -> None:
    gpu = GPUS["h100"]
    assert cost.resident(gpu, registers=154, shared=0, warps=8) == 1  # 160 * 256 of 65536
    assert cost.resident(gpu, registers=128, shared=0, warps=8) == 2
    assert cost.resident(gpu, registers=16, shared=98368, warps=8) == 2
    assert cost.resident(gpu, registers=16, shared=0, warps=8) == 8  # threads


def test_a_loop_in_a_loop_counts_apart() -> None:
    """Two instructions, an outer loop of four and the inner one of two."""
    text = "".join(
        f"{label}\n /*{16 * number:04x}*/ {name} ;\n"
        for number, (label, name) in enumerate(
            [
                ("", "MOV R1, R2"),
                (".L_x_1:", "MOV R3, R2"),
                (".L_x_2:", "FADD R4, R4, R3"),
                ("", "@P0 BRA `(.L_x_2)"),
                ("", "STG.E [R2.64], R4"),
                ("", "IADD3 R2, R2, 0x1, RZ"),
                ("", "@P1 BRA `(.L_x_1)"),
                ("", "EXIT"),
            ]
        )
    )
    found = sass.loops(sass.parse(text))
    assert found == [range(1, 7), range(2, 4)]
    assert sass.lengths(8, found) == [2, 4, 2]


LISTING = """
        /*0000*/              MOV R1, c[0x0][0x28] ;
.L_x_1:
        /*0010*/              LDGSTS.E.BYPASS.128 [R2], desc[UR4][R4.64] ;
        /*0020*/         @!P0 BRA `(.L_x_3) ;
.L_x_2:
        /*0030*/              HGMMA.64x128x16.F32.BF16 R24, gdesc[UR12], R24 ;
        /*0040*/          @P1 BRA `(.L_x_1) ;
        /*0050*/              STG.E.64 desc[UR4][R2.64], R6 ;
        /*0060*/              EXIT ;
.L_x_3:
        /*0070*/              NOP ;
        /*0080*/              BRA `(.L_x_2) ;
"""


def test_a_loop_is_what_returns_to_its_label() -> None:
    """The slow way of a wait, moved behind the end, jumps into the loop and is no loop itself."""
    instructions = sass.parse(LISTING)
    ((start, stop),) = [(at.start, at.stop) for at in sass.loops(instructions)]
    loop = instructions[start:stop]
    assert [i.name.split(".")[0] for i in loop] == ["LDGSTS", "BRA", "HGMMA", "BRA"]
    assert sum(i.product for i in loop) == 1
    assert sass.tensor_cycles(loop, warps=8, flops_per_cycle=4096) == 2 * 128 / 2
    accesses = [(a.store, a.how, a.width) for a in sass.accesses(instructions)]
    assert accesses == [(False, "async", 16), (True, "register", 8)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpu", "v100"], "argument --gpu: invalid choice: 'v100'"),
        (["--batch", "0"], "argument --batch: expected a whole number of at least 1, got '0'"),
        (["--gpus", "2", "--variant", "owt"], "--gpus 2: variant owt has no two towers"),
        (["--step", "infer", "--sass", "nosuch"], "--sass: no kernel 'nosuch' here"),
    ],
)
def test_refused(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        code = roofline.main(arguments)
    except SystemExit as end:
        code = int(str(end.code))
    output, error = capsys.readouterr()
    assert (code, output) == (2, "")
    assert error.startswith(f"roofline: error: {message}")
    assert error.count("\n") == 1


def test_a_triton_that_lacks_the_target(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("ptxas fatal: Value 'sm_120a' is not defined\nmore")

    monkeypatch.setattr(compile, "compile_launch", fail)
    assert roofline.main(["--gpu", "rtx5090"]) == 2
    error = capsys.readouterr().err
    assert (
        "can't compile for sm_120: RuntimeError: ptxas fatal: Value 'sm_120a' is not defined\n"
        in error
    )
    assert error.count("\n") == 1


def test_kernels_are_cut_for_the_processors_of_each_gpu() -> None:
    for gpu in GPUS.values():
        assert PROCESSORS[gpu.target] == gpu.processors
        assert TARGETS[gpu.target].shared_limit <= gpu.shared
