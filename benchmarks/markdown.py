"""Tables of the pages."""

from __future__ import annotations

NOT_YET = "Not measured yet on this version"


def table(head: list[str], rows: list[list[str]]) -> str:
    """The first column to the left, numbers to the right."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
