"""Tables in a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple


class Row(NamedTuple):
    """One thing that the doctor looked at."""

    part: str  # environment, kernels, ...
    what: str  # was looked at
    verdict: str  # ok, wrong, or - where nothing can be wrong
    text: str  # what was found
    values: Mapping[str, Any] = {}  # the same as data


def table(rows: list[list[str]], right: int) -> list[str]:
    """Lines of aligned columns, the last ``right`` of them to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    left = len(widths) - right
    return [
        "  ".join(
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
