"""Tables in a terminal."""

from __future__ import annotations


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
