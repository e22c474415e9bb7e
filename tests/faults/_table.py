"""What the faults came to, as a table."""

from __future__ import annotations

from fastalex.common.tables import table


class Table:
    """Counts faults by their kind."""

    def __init__(self) -> None:
        self.faults: list[tuple[str, bool, int, int, float]] = []

    def add(self, what: str, equal: bool, left: int, orphans: int, seconds: float) -> None:
        """One fault: whether the weights were equal after the same command, files and processes
        left over, and seconds: until the process ended, or until the same command had."""
        self.faults.append((what, equal, left, orphans, seconds))

    def lines(self) -> list[str]:
        """Nothing where there was no fault."""
        rows = [["fault", "tried", "equal", "leftovers", "orphans", "seconds, most"]]
        for what in sorted({fault[0] for fault in self.faults}):
            equal, left, orphans, seconds = zip(
                *(fault[1:] for fault in self.faults if fault[0] == what), strict=True
            )
            numbers = (len(equal), sum(equal), sum(left), sum(orphans), f"{max(seconds):.1f}")
            rows.append([what, *map(str, numbers)])
        return table(rows, right=5) if self.faults else []
