"""What the command lines share: how they start, wrong arguments, Ctrl-C."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import fastalex
from fastalex.__main__ import COMMANDS
from fastalex.common import command_line
from tests import _commands


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


@pytest.mark.parametrize("command", ["fastalex.train", "fastalex.profiler", "fastalex evaluate"])
def test_ctrl_c_while_torch_is_imported_is_one_line(
    slow_torch: Path, tmp_path: Path, command: str
) -> None:
    code, out, err = _interrupted(slow_torch, tmp_path, ["-m", *command.split()], {})
    assert (code, out) == (130, "")
    assert err == f"{command[9:]}: interrupted while starting, nothing was written\n"


def test_of_torchrun_s_processes_one_says_it(slow_torch: Path, tmp_path: Path) -> None:
    arguments = ["-m", "fastalex.train"]
    assert _interrupted(slow_torch, tmp_path, arguments, {"RANK": "1"}) == (130, "", "")


def test_importing_the_net_installs_no_signal_handler_and_shows_it() -> None:
    code = (
        "import signal\n"
        "before = [signal.getsignal(s) for s in range(1, 32)]\n"
        "import fastalex\n"
        "assert 'AlexNet' in dir(fastalex)\n"
        "fastalex.AlexNet\n"
        "assert [signal.getsignal(s) for s in range(1, 32)] == before\n"
    )
    done = _commands.run(["-c", code], _commands.ROOT)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_commands_are_subcommands_of_one(tmp_path: Path) -> None:
    def said(*arguments: str) -> tuple[int, str, str]:
        done = _commands.run(["-X", "importtime", "-m", "fastalex", *arguments], tmp_path)
        imports, lines = [], []
        for line in done.stderr.splitlines():
            (imports if line.startswith("import time:") else lines).append(line)
        modules = "\n".join(line.rpartition("|")[2].strip() for line in imports)
        return done.returncode, modules, done.stdout + "\n".join(lines)

    code, modules, text = said("--help")
    assert code == 0
    assert all(f"\n  {name} " in text for name in COMMANDS)
    assert "torch" not in modules.split("\n")
    assert said("--version")[::2] == (0, f"fastalex {fastalex.__version__}\n")
    code, _, text = said("trian")
    assert code == 2
    assert text.startswith("fastalex: error: no command 'trian': train, data, ")
    code, modules, text = said("data", "--help")
    assert code == 0
    assert "usage: python -m fastalex.data" in text
    assert "fastalex.evaluation" not in modules.split("\n")


@pytest.mark.parametrize("name", [name for name in COMMANDS if name != "data"])  # a package
def test_each_command_is_a_module_too(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr("fastalex.__main__.run", asked.append)
    with pytest.raises(SystemExit):
        runpy.run_module(f"fastalex.{name}", run_name="__main__")
    assert asked == [name]
    assert callable(importlib.import_module(COMMANDS[name][0]).main)


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
