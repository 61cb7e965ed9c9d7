"""How words, numbers and tables are written in a report."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Sequence


def table(head: Sequence[str], lines: Sequence[Sequence[str]], texts: int = 1) -> str:
    """A Markdown table. Its first columns, `texts` of them, are words on the left; numbers stand on the right."""
    rules = ["---" if n < texts else "--:" for n in range(len(head))]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [head, rules, *lines])


def literal(words: str) -> str:
    """Any text as one line that Markdown and HTML leave alone, in a table too."""
    return re.sub(r"([\\`*_\[\]|~#])", r"\\\1", html.escape(" ".join(words.split()), quote=False))


def listed(words: Iterable[str]) -> str:
    """Words in one phrase: "a, b and c"."""
    words = list(words)
    return " and ".join(filter(None, [", ".join(words[:-1]), *words[-1:]]))


def plural(count: int, word: str) -> str:
    """A count with its word: "1 image", "2 images"."""
    return f"{count} {word}" if count == 1 else f"{count} {word}s"


def signed(value: float, places: int = 2) -> str:
    """A number with its sign, and never "-0.00"."""
    return f"{round(value, places) + 0.0:+.{places}f}"
