"""The best trial around each point of a grid, for sweeps that search around several, and its settings to be copied."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence

from patchrank.config import DEFAULTS, Constraint, Objective, value_at
from patchrank.report.markdown import plural

ALWAYS = ("pruning.reducer", "pruning.locations")  # written down even where they are at their default


def best_of_cells(
    rows: Sequence[dict], grid: Sequence[str], objectives: Sequence[Objective], constraints: Sequence[Constraint] = ()
) -> list[dict]:
    """Of the rows around each point of a grid the best one, in the order of the grid.

    A trial that breaks a constraint is the best only where all around its point do. Ties go by further objectives, then
    by the lowest id.

    Args:
        grid: dotted paths of the axes that are a grid.
        objectives: by which rows are compared, the first before the others.
    """
    cells: dict[str, list[dict]] = {}
    for row in rows:
        point = json.dumps([value_at(row["config"], axis) for axis in grid])
        cells.setdefault(point, []).append(row)

    def loss(row: dict) -> tuple:
        metrics = row["metrics"]
        signs = {each.metric: 1 if each.mode == "min" else -1 for each in objectives}
        breaks = any(each.metric in metrics and each.excess(metrics) > 0 for each in constraints)
        return breaks, [sign * metrics.get(key, sign * math.inf) for key, sign in signs.items()], row["id"]

    return [min(cell, key=loss) for cell in cells.values()]


def cells_section(best: Sequence[dict], num_trials: int, axes: Sequence[str], objectives: Sequence[Objective]) -> str:
    """Markdown: what the rows of a page are, and the settings of each as a grid of a search space."""
    by = ", ".join(f"{each.metric} ({each.mode})" for each in objectives)
    text = (
        f"**The best around each point of the grid.** A search was made around {plural(len(best), 'point')}, "
        f"{plural(num_trials, 'trial')} in all; the rows are the best of each by {by}. As grids of a search space:"
    )
    blocks = []
    for section in dict.fromkeys(axis.partition(".")[0] for axis in axes if "." in axis):
        lines = dict.fromkeys(json.dumps(_unusual(row, section, axes)) for row in best)
        entries = "\n".join(f"    - {_flow(json.loads(line))}" for line in lines)
        blocks.append(f"{section}:\n  grid:\n{entries}")
    return f"{text}\n\n```yaml\n" + "\n".join(blocks) + "\n```"


def _unusual(row: dict, section: str, axes: Sequence[str]) -> dict:
    """The swept settings of one section of a trial, but for those at their default."""
    usual, found = DEFAULTS.model_dump(mode="json"), {}
    for axis in axes:
        value = value_at(row["config"], axis)
        at_default = axis not in ALWAYS and value == value_at(usual, axis)
        if axis.startswith(f"{section}.") and not at_default:
            found[axis.partition(".")[2]] = value
    return found


def _flow(value: object) -> str:
    """A value as YAML in one line: words without quotes, which JSON would put."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_flow(each)}" for key, each in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_flow, value)) + "]"
    return value if isinstance(value, str) and value.isidentifier() else json.dumps(value)
