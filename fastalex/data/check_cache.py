"""Which files of a folder were found readable before, so that no start decodes them all again.

A file is known by its path below the folder, its size and its time of change: one that differs in
any of them is another file. What is known is kept in ``.fastalex-check.json`` in the folder or,
where that can't be written, in the user's cache directory.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import PIL

from fastalex.common.files import replacing
from fastalex.data.decode import PASSING

NAME = ".fastalex-check.json"
_FORMAT = f"fastalex-check-2, Pillow {PIL.__version__}"  # another decoder may read other files

Verdicts = dict[str, str | None]  # why a file can't be read; "" where it can, None if unknown


class CheckCache:
    """What is known of the files of a folder.

    Args:
        root: the folder.

    Attributes:
        values: whatever was measured on the files, by a name; JSON.
    """

    def __init__(self, root: Path) -> None:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser())
        name = hashlib.sha256(os.fsencode(os.path.realpath(root))).hexdigest()[:16]
        self._places = [root / NAME, cache / "fastalex" / f"check-{name}.json"]
        self._verdicts: dict[str, str] = {}
        self.values: dict[str, Any] = {}
        for place in self._places:
            # One that is damaged, or another version's, only costs the time of a check.
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
                known = json.loads(place.read_text(encoding="utf-8"))
                if known["format"] == _FORMAT:
                    verdicts = {str(key): str(reason) for key, reason in known["files"].items()}
                    self._verdicts |= verdicts
                    self.values |= known["values"]

    def look_up(self, files: Iterable[tuple[str, int, int]]) -> Verdicts:
        """What is known of each (path, bytes, nanoseconds of its last change), by a short key."""
        keys = (
            hashlib.blake2b(
                "\0".join(map(str, file)).encode(errors="surrogateescape"), digest_size=8
            )
            for file in files
        )
        return {key: self._verdicts.get(key) for key in (digest.hexdigest() for digest in keys)}

    def keep(self, verdicts: Mapping[str, str | None]) -> None:
        """Keep what is known of these files, and of no others, for the next time.

        What may be another day's is not: that a file was not there, or memory short.
        """
        known = {key: why for key, why in verdicts.items() if why is not None}
        self._verdicts = {key: why for key, why in known.items() if why not in PASSING}
        self.save()

    def save(self) -> None:
        """Write what is known to the first place that takes it; to none, if there is none."""
        known = {"format": _FORMAT, "files": self._verdicts, "values": self.values}
        for place in self._places:
            with contextlib.suppress(OSError):
                if place.name != NAME:
                    place.parent.mkdir(parents=True, exist_ok=True)
                with replacing(place) as temporary:
                    temporary.write_text(json.dumps(known), encoding="utf-8")
                return
