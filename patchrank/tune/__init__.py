"""The sweep driver: Ray Tune and Optuna over trials, with records that survive anything.

The only room that imports ray and optuna, and only once a sweep runs.
"""

from __future__ import annotations

from collections.abc import Sequence


def run(spec: str, overrides: Sequence[str] = (), **options) -> list[dict]:
    """Runs a sweep file, as `python -m patchrank.tune` does, and returns its result rows in plan order.

    Args:
        spec: path of a sweep file, or the name of one that ships.
        overrides: `trial.key=value` strings.
        **options: the command's flags (`quick`, `fresh`, `dry_run`, `address`, `wait`, `dashboard`, `best`, `out`).

    Raises:
        UserError: bad input. A failed trial raises nothing; its row is missing.
    """
    from patchrank.tune.driver import run_sweep

    return run_sweep(spec, overrides, **options).rows
