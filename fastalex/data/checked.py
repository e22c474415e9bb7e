"""Which files of a folder were found readable before, so that no start decodes them all again.

A file is known by its path below the folder, its size and its time of change: one that differs in
any of them is another file. What is known is kept in ``.fastalex-check.json`` in the folder or,
where that can't be written, in the user's cache directory.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import PIL

from fastalex.common.files import replacing
from fastalex.data.decode import PASSING

NAME = ".fastalex-check.json"
_FORMAT = f"fastalex-check-1, Pillow {PIL.__version__}"  # another decoder may read other files

Keys = npt.NDArray[np.uint64]


class Checked:
    """What is known of the files of a folder.

    Args:
        root: the folder.

    Attributes:
        good: of each file that can be read its key, in any order.
        bad: why a file can't be read, by key.
        values: whatever was measured on the files, by a name; JSON.
    """

    def __init__(self, root: Path) -> None:
        self._places = _places(root)
        self.good: Keys = np.zeros(0, np.uint64)
        self.bad: dict[int, str] = {}
        self.values: dict[str, Any] = {}
        for place in self._places:
            # One that is damaged, or another version's, only costs the time of a check.
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
                known = json.loads(place.read_text(encoding="utf-8"))
                if known["format"] == _FORMAT:
                    good = np.frombuffer(base64.b64decode(known["good"]), "<u8")
                    bad = {int(key): str(reason) for key, reason in known["bad"].items()}
                    self.good = np.concatenate([self.good, good])
                    self.bad |= bad
                    self.values |= known["values"]

    def verdicts(self, keys: Keys) -> Iterator[str | None]:
        """Of each file why it can't be read, "" where it can, None where that is not known."""
        known = np.isin(keys, self.good)
        for key, good in zip(keys.tolist(), known.tolist(), strict=True):
            yield "" if good else self.bad.get(key)

    def keep(self, keys: Keys, verdicts: Sequence[str | None]) -> None:
        """Keep what is known of these files, and of no others, for the next time.

        What may be another day's is not: that a file was not there, or memory short.
        """
        self.good = keys[np.array([verdict == "" for verdict in verdicts], np.bool_)]
        self.bad = {
            key: verdict
            for key, verdict in zip(keys.tolist(), verdicts, strict=True)
            if verdict and verdict not in PASSING
        }
        self.save()

    def save(self) -> None:
        """Write what is known to the first place that takes it; to none, if there is none."""
        text = json.dumps(
            {
                "format": _FORMAT,
                "good": base64.b64encode(np.unique(self.good).astype("<u8").tobytes()).decode(),
                "bad": {str(key): reason for key, reason in self.bad.items()},
                "values": self.values,
            }
        )
        for place in self._places:
            with contextlib.suppress(OSError):
                if place.name != NAME:
                    place.parent.mkdir(parents=True, exist_ok=True)
                with replacing(place) as temporary:
                    temporary.write_text(text, encoding="utf-8")
                return


def file_keys(files: Iterable[tuple[str, int, int]]) -> Keys:
    """A number for each (path, bytes, nanoseconds of its last change)."""
    digests = (
        hashlib.blake2b(
            f"{path}\0{size}\0{changed}".encode(errors="surrogateescape"), digest_size=8
        )
        for path, size, changed in files
    )
    return np.frombuffer(b"".join(digest.digest() for digest in digests), "<u8").astype(np.uint64)


def _places(root: Path) -> list[Path]:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser())
    name = hashlib.sha256(os.fsencode(os.path.realpath(root))).hexdigest()[:16]
    return [root / NAME, cache / "fastalex" / f"check-{name}.json"]
