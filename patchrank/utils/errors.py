"""What a user is told when something that he handed us cannot be used."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Bad input: one line that names the file, key or value and the rule it broke; commands exit with status 2."""


class StoreError(UserError):
    """A remote store does not answer, or refuses: one line that names the URL. Nothing is wrong with the work."""


def one_line(error: BaseException | str) -> str:
    """What an error says, in one line; the name of its kind where it says nothing."""
    return " ".join(str(error).split()) or type(error).__name__


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, of the machine or of a GPU; torch has no class of its own for the former."""
    ran_out = "can't allocate memory" in str(error) or type(error).__name__ == "OutOfMemoryError"
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and ran_out)


def near(name: str, known: Iterable[str]) -> str:
    """The end of a message on an unknown name: the known name that is most like it, if any is, and all known names."""
    known = sorted(map(str, known))
    close = difflib.get_close_matches(str(name), known, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}known: {', '.join(known)}"
