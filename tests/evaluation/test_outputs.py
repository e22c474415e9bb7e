"""Where commands write: found out before the work, and named by the option."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from fastalex.common.command_line import check_output
from fastalex.data import __main__ as data
from fastalex.evaluation import ablate, evaluate, figures
from fastalex.tuning import profiler, tune
from tests._pictures import save, smooth
from tests._types import Capture

Main = Callable[[list[str]], int]

# A command line, without the option that is last; nothing that it names is there.
FILES: list[tuple[Main, list[str], str]] = [
    (evaluate.main, ["--weights", "none"], "--confusion"),
    (tune.main, ["--dry-run"], "--output"),
]
FOLDERS: list[tuple[Main, list[str], str]] = [
    (figures.main, ["--weights", "none"], "--output"),
    (ablate.main, ["--data", "none"], "--output"),
    (profiler.main, ["--device", "cpu"], "--output"),
]


def refused(capsys: Capture, main: Main, arguments: list[str]) -> str:
    assert main(arguments) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("\n") == 1
    return said.err


@pytest.mark.parametrize(("main", "arguments", "option"), FILES)
def test_a_folder_in_a_file_s_place_is_named_first(
    tmp_path: Path, capsys: Capture, main: Main, arguments: list[str], option: str
) -> None:
    said = refused(capsys, main, [*arguments, option, str(tmp_path)])
    assert f"{option} {tmp_path}: a folder, name a file" in said
    (tmp_path / "file").write_text("mine")
    said = refused(capsys, main, [*arguments, option, str(tmp_path / "file" / "x")])
    assert f"error: {option} {tmp_path / 'file'}" in said
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize(("main", "arguments", "option"), FOLDERS)
@pytest.mark.parametrize("below", ["", "a/b"])
def test_a_file_in_a_folder_s_place_is_named_first(
    tmp_path: Path, capsys: Capture, main: Main, arguments: list[str], option: str, below: str
) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    said = refused(capsys, main, [*arguments, option, str(file / below)])
    assert f"error: {option} {file / below}: {file} is not a folder" in said
    assert file.read_text() == "mine"


@pytest.mark.parametrize(("main", "arguments", "option"), [*FILES, *FOLDERS])
def test_a_place_that_takes_no_files_is_named_first(
    capsys: Capture, main: Main, arguments: list[str], option: str
) -> None:
    """Even to the superuser /proc gives no new files."""
    if not Path("/proc/self").is_dir():
        pytest.skip("there is no /proc here")
    said = refused(capsys, main, [*arguments, option, "/proc/x"])
    assert f"error: {option} /proc" in said
    assert "can't be written" in said


@pytest.mark.parametrize("place", ["file", "file/a/b", "/proc/x"])
def test_packing_names_its_folder_first(tmp_path: Path, capsys: Capture, place: str) -> None:
    if place == "/proc/x" and not Path("/proc/self").is_dir():
        pytest.skip("there is no /proc here")
    (tmp_path / "file").write_text("mine")
    save(tmp_path / "source" / "a" / "0.png", smooth(30, 30))
    said = refused(capsys, data.main, ["pack", str(tmp_path / "source"), str(tmp_path / place)])
    assert str(tmp_path / place) in said
    assert "name" in said
    said = refused(capsys, data.main, ["photos", str(tmp_path / place)])
    assert str((tmp_path / place).parent) in said
    assert "name another" in said


def test_nothing_is_left_of_a_check(tmp_path: Path) -> None:
    check_output("--output", tmp_path / "new" / "folder", folder=True)
    check_output("--output", tmp_path / "file")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match=r"--output .*: its folder does not exist, make it"):
        check_output("--output", tmp_path / "no" / "file")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="is not a folder"):
        check_output("--output", tmp_path / "dangling", folder=True)
    with pytest.raises(ValueError, match=r"--output .*: can't be written: file name too long"):
        check_output("--output", tmp_path / ("x" * 300) / "file", folder=True)
