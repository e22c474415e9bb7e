"""Which images a set holds, told by the names and sizes of its files, and what changed in it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from fastalex.data.base import ImageDataset

Contents = dict[str, tuple[int, str]]  # of each class: its images, and a digest of them in order

_NAMED = 3  # classes that a message names
_DIGITS = 16  # of a class's digest: against mistakes, not against an author


def digest(value: object) -> str:
    """SHA-256 of anything that JSON can hold."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def contents(dataset: ImageDataset) -> Contents:
    """Of each class, in order, how many images it has and a digest of them; none is decoded."""
    keys: dict[str, list[tuple[Any, ...]]] = {name: [] for name in dataset.classes}
    for label, key in zip(dataset.labels.tolist(), dataset.keys(), strict=True):
        keys[dataset.classes[label]].append(key)
    return {name: (len(mine), digest(mine)[:_DIGITS]) for name, mine in keys.items()}


def describe_changes(before: Mapping[str, Sequence[Any]], now: Contents) -> str:
    """What changed between two ``contents``, in a few words; empty where nothing did.

    ``before`` may have been through JSON.
    """
    lines = [f"class {name!r} is gone" for name in before if name not in now]
    lines += [f"class {name!r} is new" for name in now if name not in before]
    counted, others = [], []
    for name, (count, files) in now.items():
        old = before.get(name, (count, files))
        if old[0] != count:
            counted.append(f"{name}: {old[0]} images before, {count} now")
        elif old[1] != files:
            others.append(f"{name}: other names or sizes of files")
    lines += [*counted, *others]
    if not lines and list(before) != list(now):
        lines = ["the classes are in another order"]
    more = f"; and {len(lines) - _NAMED} more classes" if len(lines) > _NAMED else ""
    return "; ".join(lines[:_NAMED]) + more
