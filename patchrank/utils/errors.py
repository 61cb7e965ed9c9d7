"""What a user is told when something they handed us cannot be used."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Bad input: one line that names the file, key or value and the rule it broke; commands exit with status 2."""


class StoreError(UserError):
    """A remote store that does not answer, or says no: one line that names the URL; nothing was wrong with the work."""


def near(name: str, known: Iterable[str]) -> str:
    """Ends an "unknown ..." message: the nearest known name where one is near, and all that are known."""
    known = sorted(map(str, known))
    close = difflib.get_close_matches(str(name), known, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}known: {', '.join(known)}"
