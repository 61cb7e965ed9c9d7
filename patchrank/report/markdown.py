"""Markdown tables."""

from __future__ import annotations

from collections.abc import Sequence


def table(head: Sequence[str], lines: Sequence[Sequence[str]], texts: int = 1) -> str:
    """A table whose first columns, `texts` of them, are words and start at the left; numbers end at the right."""
    rules = ["---" if n < texts else "--:" for n in range(len(head))]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [head, rules, *lines])
