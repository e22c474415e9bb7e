"""Which images a set holds, told by the names and sizes of its files, and what changed in it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

Contents = dict[str, tuple[int, str]]  # of each class: its images, and a digest of them in order

_NAMED = 3  # classes that a message names
_DIGITS = 16  # of a class's digest: against mistakes, not against an author


def digest(value: object) -> str:
    """SHA-256 of anything that JSON can hold."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def class_contents(classes: Sequence[str], images: Mapping[str, Sequence[Any]]) -> Contents:
    """What ``ImageDataset.contents`` returns.

    Args:
        classes: their names, in order.
        images: of each class, whatever tells its images apart, in the order of their indices.
    """
    return {
        name: (len(images.get(name, ())), digest(list(images.get(name, ())))[:_DIGITS])
        for name in classes
    }


def describe_changes(before: Mapping[str, Sequence[Any]], now: Contents) -> str:
    """What changed between two ``ImageDataset.contents``, in a few words; empty where nothing did.

    Args:
        before: an earlier one, which may have been through JSON.
        now: today's.
    """
    gone = [f"class {name!r} is gone" for name in before if name not in now]
    new = [f"class {name!r} is new" for name in now if name not in before]
    counted, others = [], []
    for name in now:
        if name in before and before[name][0] != now[name][0]:
            counted.append(f"{name}: {before[name][0]} images before, {now[name][0]} now")
        elif name in before and before[name][1] != now[name][1]:
            others.append(f"{name}: other names or sizes of files")
    lines = [*gone, *new, *counted, *others]
    if not lines and list(before) != list(now):
        lines = ["the classes are in another order"]
    more = f"; and {len(lines) - _NAMED} more classes" if len(lines) > _NAMED else ""
    return "; ".join(lines[:_NAMED]) + more
