"""Build fastalex_kernels for the Kernel Hub: ``python kernels/build_universal.py FOLDER``.

FOLDER then holds ``build/torch-universal``, which Hugging Face's ``kernels.get_local_kernel``
loads, and which can be uploaded as it is. A loaded package has the id of its build as its name, so
several versions live in one process: it imports relatively within itself, and registers its
operators under that id.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import shutil
from pathlib import Path

PACKAGE = Path(__file__).parent / "fastalex_kernels"


def build(folder: Path) -> Path:
    """Write ``folder``/build/torch-universal, where nothing may be; return it."""
    variant = folder / "build" / "torch-universal"
    shutil.copytree(PACKAGE, variant / PACKAGE.name, ignore=shutil.ignore_patterns("__pycache__"))
    digest = hashlib.sha256()
    for path in sorted(PACKAGE.rglob("*.py")):
        digest.update(path.read_bytes())
    version = (PACKAGE.parents[1] / "fastalex/_version.py").read_text()
    metadata = {
        "name": "fastalex-kernels",
        "id": f"_fastalex_kernels_{digest.hexdigest()[:16]}",
        "version": int(re.findall(r"\d+", version)[0]),
        "license": "MIT",
        "python-depends": [],
        "backend": {"type": "cuda"},
    }
    (variant / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")
    return variant


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split(":")[0] + ".")
    parser.add_argument("folder", type=Path, help="where build/torch-universal is to be")
    try:
        print(f"built: {build(parser.parse_args().folder)}")
    except OSError as error:
        parser.error(f"{error.filename}: {error.strerror}")
