"""What an installation brings, read from the archives that the build makes."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path

import pytest

from fastalex import __version__
from tests._commands import ROOT

pytest.importorskip("build", reason="needs the packages of the extra 'test'")
pytest.importorskip("hatchling", reason="needs the packages of the extra 'test'")

PACKAGES = {"fastalex": ROOT / "fastalex", "fastalex_kernels": ROOT / "kernels/fastalex_kernels"}


def _python(folder: Path, *arguments: str) -> str:
    """The output of an isolated Python, which sees its own packages and no checkout."""
    process = subprocess.run(
        [sys.executable, "-I", *arguments], cwd=folder, capture_output=True, text=True, timeout=240
    )
    assert process.returncode == 0, process.stdout + process.stderr
    return process.stdout.strip()


def _build(source: Path, *options: str) -> None:
    _python(source, "-m", "build", "--no-isolation", *options, str(source))


def _one(folder: Path, pattern: str) -> Path:
    (found,) = folder.glob(pattern)
    return found


def _names(archive: Path) -> list[str]:
    """The files of a wheel, or of a source archive without its leading folder."""
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            return sorted(wheel.namelist())
    with tarfile.open(archive) as source:
        return sorted(m.name.partition("/")[2] for m in source.getmembers() if m.isfile())


def _unpack(wheel: Path, folder: Path) -> Path:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def _modules() -> set[str]:
    """The modules of the checkout, as an installation names them."""
    return {
        f"{name}/{path.relative_to(root).as_posix()}"
        for name, root in PACKAGES.items()
        for path in root.rglob("*.py")
    }


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the checkout, which no test or editor changes between two builds."""
    copy = tmp_path_factory.mktemp("source") / "checkout"
    kept = shutil.ignore_patterns(".git", "__pycache__", ".*_cache", "*venv*", "runs", "dist")
    shutil.copytree(ROOT, copy, ignore=kept)
    return copy


@pytest.fixture(scope="module")
def built(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source archive, and the wheel that was built from it."""
    folder = tmp_path_factory.mktemp("built")
    _build(source, "--outdir", str(folder))
    return folder


@pytest.fixture(scope="module")
def wheel(built: Path) -> Path:
    return _one(built, "*.whl")


@pytest.fixture(scope="module")
def metadata(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        name = next(n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        return Parser().parsestr(archive.read(name).decode())


def test_the_wheel_holds_the_two_packages_and_nothing_else(wheel: Path) -> None:
    names = _names(wheel)
    information = f"fastalex-{__version__}.dist-info"
    assert {name.split("/")[0] for name in names} == {"fastalex", "fastalex_kernels", information}
    assert {name for name in names if name.endswith(".py")} == _modules()


def test_type_checkers_read_both_packages(wheel: Path) -> None:
    assert {f"{name}/py.typed" for name in PACKAGES} <= set(_names(wheel))


def test_no_archive_holds_a_package_called_kernels(built: Path, wheel: Path) -> None:
    # Another project's package has that name: ours must not stand in its place.
    for archive in (wheel, _one(built, "*.tar.gz")):
        assert "kernels/__init__.py" not in _names(archive)


def test_the_source_archive_holds_what_a_developer_needs(built: Path) -> None:
    names = set(_names(_one(built, "*.tar.gz")))
    for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "pyproject.toml"):
        assert name in names
    tests = {f"tests/{p.relative_to(ROOT / 'tests')}" for p in (ROOT / "tests").rglob("*.py")}
    assert tests <= names
    assert {f"kernels/{m}" if m.startswith("fastalex_k") else m for m in _modules()} <= names


def test_the_source_archive_and_the_checkout_make_the_same_wheel(
    source: Path, wheel: Path, tmp_path: Path
) -> None:
    _build(source, "--wheel", "--outdir", str(tmp_path))
    direct = _one(tmp_path, "*.whl")
    assert _names(direct) == _names(wheel)
    with zipfile.ZipFile(direct) as a, zipfile.ZipFile(wheel) as b:
        assert {n: a.read(n) for n in a.namelist()} == {n: b.read(n) for n in b.namelist()}


def test_the_metadata_says_what_is_needed(metadata: Message) -> None:
    assert (metadata["Name"], metadata["Version"]) == ("fastalex", __version__)
    assert metadata["Requires-Python"] == ">=3.10"
    assert "MIT" in (metadata["License-Expression"] or metadata["License"])
    assert {"test", "bench"} <= set(metadata.get_all("Provides-Extra", []))
    required = [r.replace(" ", "") for r in metadata.get_all("Requires-Dist", [])]
    assert {"torch>=2.11", "triton>=3.6"} <= set(required)
    for extra in ("test", "bench"):
        assert [r for r in required if f"extra=='{extra}'" in r.replace('"', "'")]
    assert "# fastalex" in str(metadata.get_payload())
    versions = {c.rpartition(" ")[2] for c in metadata.get_all("Classifier", []) if "3." in c}
    assert versions == {"3.10", "3.11", "3.12", "3.13"}


def test_the_licence_comes_along(wheel: Path) -> None:
    licences = [n for n in _names(wheel) if n.rpartition("/")[2] == "LICENSE"]
    assert len(licences) == 1


WHERE = """
import site, sys
before = len(sys.path)
site.addsitedir(sys.argv[1])
sys.path[:] = sys.path[before:] + sys.path[:before]  # ahead of an editable fastalex
import fastalex, fastalex_kernels, torch
assert fastalex_kernels.max_pool2d(torch.ones(1, 1, 3, 3)).item() == 1
print(fastalex.__version__, fastalex.__file__, fastalex_kernels.__file__, sep="\\n")
"""


def _installed(folder: Path) -> tuple[str, list[Path]]:
    """The version and the places of both packages where ``folder`` is a place of packages."""
    version, *files = _python(folder, "-c", WHERE, str(folder)).splitlines()
    return version, [Path(file).parent.resolve() for file in files]


def test_an_unpacked_wheel_works(wheel: Path, tmp_path: Path) -> None:
    _unpack(wheel, tmp_path)
    places = [(tmp_path / name).resolve() for name in PACKAGES]
    assert _installed(tmp_path) == (__version__, places)


@pytest.mark.slow
def test_an_editable_wheel_leads_to_both_packages_of_the_checkout(
    source: Path, tmp_path: Path
) -> None:
    build = "import sys, hatchling.build as b; b.build_editable(sys.argv[1])"
    _python(source, "-c", build, str(tmp_path))
    wheel = _one(tmp_path, "*.whl")
    assert not [name for name in _names(wheel) if name.endswith(".py")]
    folder = _unpack(wheel, tmp_path / "packages")
    roots = _one(folder, "*.pth").read_text().split()
    assert [Path(root).resolve() for root in roots] == [source, source / "kernels"]
    places = [source / root.relative_to(ROOT) for root in PACKAGES.values()]
    assert _installed(folder) == (__version__, places)
