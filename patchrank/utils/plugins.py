"""Components of a user's own, by modules that register predictors, reducers or prompt layers when they are imported."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module

from patchrank.utils.errors import UserError


def import_modules(names: Sequence[str]) -> None:
    """Imports modules by name, as a sweep's key `imports` lists them. Each is imported once.

    Raises:
        UserError: there is no module of that name, or importing it raises.
    """
    for name in names:
        try:
            import_module(name)
        except (Exception, SystemExit) as error:  # the second: a script that parses arguments when it is imported
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise UserError(
                f"imports: module {name!r} cannot be imported ({reason}); it must be importable on every node, "
                "e.g. installed or beside where the command runs"
            ) from error
