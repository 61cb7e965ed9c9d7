"""The Pareto front of a sweep as a part of its page: a sentence, a table and a picture."""

from __future__ import annotations

from collections.abc import Sequence

from patchrank.config import Constraint, Objective
from patchrank.report.labels import swept
from patchrank.report.markdown import table
from patchrank.report.pareto import Front, pareto_front, said
from patchrank.report.plots.front import COLUMNS, draw_front, unpruned_figure
from patchrank.report.results import Setting

ALWAYS = ("val_accuracy", "val_cosine", "gmacs", "ms", "speedup")  # columns, where any row has them


def front_section(
    rows: Sequence[dict],
    objectives: Sequence[Objective],
    constraints: Sequence[Constraint],
    axes: Sequence[str],
    name: str = "front",
) -> tuple[str, dict[str, bytes]]:
    """The front of a sweep as Markdown with a table, and the PNG that it shows, if there is any, as `<name>.png`.

    Args:
        rows: result rows; `metrics` may have `ms`, `ms_unpruned` and `speedup`, and `speed` the record that they are
            from (`patchrank.benchmark.measure_trial`).
        axes: dotted paths of the swept settings.
    """
    front = pareto_front(rows, objectives, constraints)
    sentence = _sentence(front, len(rows))
    if not front.best:
        return sentence, {}
    content, caption = draw_front(front)
    parts = [sentence, front_table(front, axes), _timed(rows), f"{caption}\n\n![Pareto front]({name}.png)"]
    return "\n\n".join(filter(None, parts)), {f"{name}.png": content}


def front_table(front: Front, axes: Sequence[str]) -> str:
    """Markdown: the unpruned tower, and the front by cost, numbered as the picture numbers it."""
    names = swept([Setting([row], [{}]) for row in front.best], axes)
    metrics = dict.fromkeys([*ALWAYS, *(each.metric for each in front.objectives)])
    metrics = [each for each in metrics if any(each in row["metrics"] for row in front.best)]
    unpruned = {metric: unpruned_figure(front.best, metric) for metric in metrics}
    lines = [["", "nothing pruned", *[""] * (len(names) - 1)]]
    lines += [[str(n + 1), *(texts[n] for texts in names.values())] for n in range(len(front.best))]
    for line, found in zip(lines, [unpruned, *(row["metrics"] for row in front.best)]):
        for metric in metrics:
            known = found.get(metric) is not None
            line.append(format(found[metric], COLUMNS[metric].layout) if known else "")
    return table(["#", *names, *(COLUMNS[metric].head for metric in metrics)], lines, texts=1 + len(names))


def _sentence(front: Front, count: int) -> str:
    """What the front is of, and what became of all other trials."""
    by = ", ".join(f"{each.metric} ({each.mode})" for each in front.objectives)
    bounds = said(front.constraints)
    kept = f" among those that keep {bounds}" if bounds else ""
    what = "no other is better in one of these and no worse in the rest"
    text = f"**Pareto front** of {by}{kept}: {len(front.best)} of {count} trials; {what}."
    rest = {
        f"breaking {bounds}": front.infeasible,
        "lacking a figure and left out": front.incomplete,
        "with exactly the figures of one in it and not repeated": front.equal,
    }
    others = "; ".join(f"{what}: {len(rows)}" for what, rows in rest.items() if rows)
    return f"{text} Of the others, {others}." if others else text


def _timed(rows: Sequence[dict]) -> str:
    """On what milliseconds were measured, and how."""
    machines = []
    for speed in [row["speed"] for row in rows if "speed" in row]:
        where, how = speed["hardware"], speed["benchmark"]
        device = where["gpu"] or f"{where['cpu']} (threads: {where['threads']})"
        runs = f"{how['repeats']} runs of {how['batch_size']} images"
        machines.append(f"{runs} on {device}, {where['system']}, torch {where['torch']}")
    if not machines:
        return ""
    how = "ms: of one image, median; each trial in turns with the unpruned tower, which gives the speed-up"
    return f"{how}; {' or '.join(dict.fromkeys(machines))}."
