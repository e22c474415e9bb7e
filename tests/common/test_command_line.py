"""What the command lines share: words for a wrong argument, and Ctrl-C at any time."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fastalex.common import command_line
from tests import _commands

# All but data, which does without torch.
COMMANDS = ["train", "evaluate", "predict", "figures", "ablate", "roofline", "profiler"]


@pytest.fixture
def slow_torch(tmp_path: Path) -> Path:
    """A folder with a torch that takes an hour to import, and says when it is being imported."""
    folder = tmp_path / "slow"
    folder.mkdir()
    lines = ["import pathlib, time", "pathlib.Path('importing').touch()", "time.sleep(3600)"]
    (folder / "torch.py").write_text("\n".join(lines))
    return folder


@contextlib.contextmanager
def _children_hear_ctrl_c() -> Iterator[None]:
    """Start children as a terminal does: they inherit that SIGINT is ignored, a handler they don't.

    A script's shell has its background jobs ignore it, these tests among them.
    """
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _interrupted(
    slow_torch: Path, folder: Path, arguments: list[str], variables: dict[str, str]
) -> tuple[int, str, str]:
    """How ``python *arguments`` ends on Ctrl-C while it imports torch."""
    environment = {**_commands.environment(), **variables}
    environment["PYTHONPATH"] = os.pathsep.join([str(slow_torch), environment["PYTHONPATH"]])
    with _children_hear_ctrl_c():
        process = subprocess.Popen(
            [sys.executable, *arguments],
            cwd=folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
    try:
        _commands.wait_until((folder / "importing").exists, "torch is being imported")
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    finally:
        _commands.end(process)
    return process.returncode, out, err


@pytest.mark.parametrize("name", COMMANDS)
def test_ctrl_c_while_torch_is_imported_is_one_line(
    slow_torch: Path, tmp_path: Path, name: str
) -> None:
    code, out, err = _interrupted(slow_torch, tmp_path, ["-m", f"fastalex.{name}"], {})
    assert (code, out) == (130, "")
    assert err == f"{name}: interrupted while starting, nothing was written\n"


def test_of_torchrun_s_processes_one_says_it(slow_torch: Path, tmp_path: Path) -> None:
    arguments = ["-m", "fastalex.train"]
    assert _interrupted(slow_torch, tmp_path, arguments, {"RANK": "1"}) == (130, "", "")


def test_a_program_that_imports_us_keeps_its_own_ctrl_c(slow_torch: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("import fastalex.model.alexnet")
    for arguments in (["mine.py"], ["-m", "mine"], ["-c", "import fastalex.model.alexnet"]):
        (tmp_path / "importing").unlink(missing_ok=True)
        code, _, err = _interrupted(slow_torch, tmp_path, arguments, {})
        assert code == -signal.SIGINT
        assert err.endswith("KeyboardInterrupt\n")


def test_a_command_that_has_begun_sees_ctrl_c(capsys: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(signal.SIGINT)
    command_line.interrupts.end_quietly()

    def command() -> int:
        signal.raise_signal(signal.SIGINT)
        return 0

    try:
        assert command_line.guarded("name", command, "all is well") == 130
    finally:
        signal.signal(signal.SIGINT, before)
    assert capsys.readouterr().err == "name: interrupted, all is well\n"


def test_a_wrong_argument_is_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    parser = command_line.Parser(prog="python -m fastalex.name part")
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(SystemExit, match="2"):
        parser.parse_args(["--no"])
    expected = "name part: error: unrecognized arguments: --no (--help lists the options)\n"
    assert capsys.readouterr().err == expected
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit, match="2"):
        parser.parse_args(["--no"])
    assert capsys.readouterr().err == ""


def test_whole_numbers_have_limits() -> None:
    count, share = command_line.whole_number(1), command_line.whole_number(0, 3)
    assert (count("1"), count("12"), share("0"), share("3")) == (1, 12, 0, 3)
    for convert, text, limit in (
        (count, "0", "of at least 1"),
        (count, "1.5", "of at least 1"),
        (count, "", "of at least 1"),
        (share, "4", "from 0 to 3"),
        (share, "-1", "from 0 to 3"),
    ):
        with pytest.raises(argparse.ArgumentTypeError, match=f"{limit}, got '{text}'"):
            convert(text)


def test_a_reader_that_had_enough_is_no_error() -> None:
    code = (
        "from fastalex.common.command_line import guarded\n"
        "def command():\n"
        "    for _ in range(100_000):\n"
        "        print('a line of a long answer')\n"
        "    return 1\n"
        "raise SystemExit(guarded('name', command))\n"
    )
    process = _commands.start(["-c", code], Path.cwd())
    assert process.stdout is not None
    assert process.stderr is not None
    try:
        process.stdout.readline()
        process.stdout.close()
        assert process.wait(120) == 0
        assert process.stderr.read() == ""
    finally:
        _commands.end(process)
