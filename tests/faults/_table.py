"""What the faults came to, as a table."""

from __future__ import annotations

from collections import defaultdict


class Table:
    """Counts faults by their kind."""

    def __init__(self) -> None:
        self._rows: dict[str, list[tuple[bool, int, int, float]]] = defaultdict(list)

    def add(self, what: str, equal: bool, left: int, orphans: int, seconds: float) -> None:
        """One fault: whether the weights were equal after the same command, files and processes
        left over, and seconds: until the process ended, or until the same command had."""
        self._rows[what].append((equal, left, orphans, seconds))

    def lines(self) -> list[str]:
        rows = [("fault", "tried", "equal", "leftovers", "orphans", "seconds, most")]
        for what, tried in self._rows.items():
            equal, left, orphans, seconds = zip(*tried, strict=True)
            numbers = (len(tried), sum(equal), sum(left), sum(orphans), f"{max(seconds):.1f}")
            rows.append((what, *map(str, numbers)))
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        return [
            "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip()
            for row in rows
        ]
