"""Markdown tables."""

from __future__ import annotations

NOT_YET = "Not measured yet on this version"


def table(head: list[str], rows: list[list[str]]) -> str:
    """A table with the first column aligned left, the others right."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
