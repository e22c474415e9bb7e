"""One net over several real processes: what they compute is what one process computes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from tests._commands import ROOT, end, start

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="torch without gloo")

# float32: relative roundings of 6e-8 in sums of up to 9,216 terms through eight layers and back,
# added in another order. A dropped unit, a missing row or a wrong share is off by more than 1e-2.
BOUND = 1e-5

Results = list[dict[str, Any]]


def _launch(measurement: str, world: int, folder: Path) -> Results:
    """The results of each process; a file is the meeting point, so that no port is taken."""
    script = str(ROOT / "tests" / "_parallel_script.py")
    files = [folder / f"{rank}.json" for rank in range(world)]
    processes = [
        start([script, measurement, str(rank), str(world), str(folder / "meet"), str(file)], folder)
        for rank, file in enumerate(files)
    ]
    try:
        errors = [process.communicate(timeout=300)[1] for process in processes]
    finally:
        for process in processes:
            end(process)
    assert [process.returncode for process in processes] == [0] * world, "\n".join(errors)
    return [json.loads(file.read_text()) for file in files]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return _launch("two", 2, tmp_path_factory.mktemp("two"))


def _agrees(first: dict[str, Any]) -> None:
    whole, parts = first["loss"]
    assert abs(parts - whole) < BOUND * abs(whole)
    assert first["logits"] < BOUND
    assert len(first["gradients"]) == 16
    assert {n: e for n, e in first["gradients"].items() if not e < BOUND} == {}


@pytest.mark.parametrize("variant", ["paper", "source2012"])
def test_two_towers_compute_what_one_process_does(two: Results, variant: str) -> None:
    _agrees(two[0][variant])


@pytest.mark.parametrize("variant", ["caffe", "owt"])
def test_replicas_compute_what_one_process_does(two: Results, variant: str) -> None:
    _agrees(two[0][variant])


@pytest.mark.parametrize("variant", ["paper", "source2012"])
def test_both_towers_know_the_logits(two: Results, variant: str) -> None:
    first, second = (result[variant]["logits digest"] for result in two)
    assert first == second


@pytest.mark.parametrize("variant", ["paper", "source2012", "caffe", "owt"])
def test_every_process_gets_the_first_one_s_weights_and_the_whole_gradients(
    two: Results, variant: str
) -> None:
    assert two[0][variant]["weights are the first process's"]
    assert two[0][variant]["digest"] == two[1][variant]["digest"]


@pytest.mark.parametrize("variant", ["paper", "source2012", "caffe", "owt"])
def test_parts_of_whole_tensors_are_what_each_process_holds(two: Results, variant: str) -> None:
    assert all(result[variant]["undone"] for result in two)


def test_a_tower_holds_half_of_all_but_the_last_bias(two: Results) -> None:
    bias = 10
    whole = two[0]["caffe"]["held"]
    for variant in ("paper", "source2012"):
        assert [r[variant]["held"] for r in two] == [(whole - bias) // 2 + bias] * 2


def test_tensors_are_exchanged(two: Results) -> None:
    assert two[0]["sent"] == [10.0, 11.0, 12.0]
    assert two[1]["sent"] == [0.0, 1.0, 2.0]
    assert two[0]["empty"] == [0, 4]


def test_towers_that_cannot_exchange_data_say_so_on_both_sides(two: Results) -> None:
    for result in two:
        assert result["sound"] == "nothing"
        for damaged in ("damaged", "damaged to rank 1"):
            assert "the towers cannot exchange data" in result[damaged]


def test_two_towers_decode_each_image_once_and_both_see_all(two: Results) -> None:
    first, second = (result["fed"] for result in two)
    assert first["equal"]
    assert second["equal"]
    for needed, *decoded in zip(first["needed"], first["decoded"], second["decoded"], strict=True):
        assert sorted(decoded[0] + decoded[1]) == sorted(needed)
        assert len(decoded[0]) >= len(decoded[1])
    assert sum(map(len, second["decoded"])) > 0


def test_copies_that_differ_are_noticed_by_all_of_towers_and_of_replicas(two: Results) -> None:
    assert [result["copies agree"] for result in two] == [[True, False, True, False]] * 2


def test_a_net_without_towers_is_not_cut(two: Results) -> None:
    for result in two:
        assert result["no towers"].startswith("ValueError: mesh: variant 'caffe' has 1 tower")


@pytest.mark.slow
def test_two_replicas_of_two_towers_compute_what_one_process_does(tmp_path: Path) -> None:
    results = _launch("four", 4, tmp_path)
    first = results[0]["paper"]
    _agrees(first)
    assert first["weights are the first process's"]
    assert len({result["paper"]["digest"] for result in results}) == 1
    assert all(result["paper"]["undone"] for result in results)
    digests = [result["paper"]["logits digest"] for result in results]
    assert digests[0] == digests[1] != digests[2] == digests[3]


@pytest.mark.slow
def test_steps_of_two_towers_learn_what_one_process_learns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    first, second = _launch("trained", 2, tmp_path)
    whole = first["whole losses"]
    assert abs(whole[1] - whole[0]) > 0.1  # what is read next was updated, too
    assert first["losses"] == second["losses"] == pytest.approx(whole, rel=BOUND)
    assert len(first["moved"]) == 16
    assert {n: e for n, e in first["moved"].items() if not e < 10 * BOUND} == {}
    assert first["digest"] == second["digest"]  # of the last bias each process has its own
