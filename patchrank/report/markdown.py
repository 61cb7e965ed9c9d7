"""Markdown tables, and words that are to stand in them as they are."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence


def table(head: Sequence[str], lines: Sequence[Sequence[str]], texts: int = 1) -> str:
    """A table whose first columns, `texts` of them, are words and start at the left; numbers end at the right."""
    rules = ["---" if n < texts else "--:" for n in range(len(head))]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [head, rules, *lines])


def literal(words: str) -> str:
    """Any text as one line that Markdown and HTML leave alone, in a table too."""
    return re.sub(r"([\\`*_\[\]|~#])", r"\\\1", html.escape(" ".join(words.split()), quote=False))
