"""The main table: a row for the unpruned tower, for every setting, and for the controls that a setting ran."""

from __future__ import annotations

from collections.abc import Sequence

from patchrank.report.compare import all_tasks, change, mean, subset
from patchrank.report.labels import RANKED_BY, swept
from patchrank.report.markdown import table
from patchrank.report.paper import papers_figure
from patchrank.report.results import Setting
from patchrank.utils.stats import Interval, spread

CONTROLS = {"random": "at random (control)", "reversed": "reversed (control)"}
MATCHING = ("matching_rate", "matching_prior", "matching_chance")
PAPER, RANKING, DRIFT = "paper (see below)", "ranking MMACs", "1000 (1 - cosine)"
SEEN = ("images seen", "labels seen")
FOUND = ("agreement", "cosine", DRIFT, "matching, prior, chance", "Kendall", "NDCG")
SPEED = ("ms", "speed-up")
MEASURED = (*FOUND, *SEEN, "GMACs", RANKING, *SPEED, "val", PAPER)
ON_SUBSET = "°"  # marks figures that were measured on the oracles' subset alone


def main_table(settings: Sequence[Setting], axes: Sequence[str], paper: dict | None = None) -> str:
    """One row for each setting, its seeds merged; columns that would tell nothing are left out.

    Args:
        axes: dotted paths of the swept settings, which name the rows.
        paper: a table of the paper; where it has the average of the same setting, that stands in the last column.
    """
    names, few = swept(settings, axes), subset(settings)
    rows: list[dict[str, str]] = []
    learned = any("n_seen_images" in setting.metrics for setting in settings)
    for n, setting in enumerate(settings):
        name = {column: texts[n] for column, texts in names.items()}
        beside = (_seen(setting) if learned else {}) | {PAPER: papers_figure(paper, setting.config)}
        rows.append(name | _row(setting, few) | beside)
        rows += [name | _control(setting, control, few) for control in CONTROLS if setting.has(control)]
    titles = [column for column in names if _tells(column, rows)] or [RANKED_BY]
    rows = [{titles[0]: "nothing pruned"} | _unpruned(tower, few) for tower in towers(settings)] + rows
    columns = [*titles, *all_tasks(settings), "mean", "change", _on(few), *MEASURED]
    columns = [column for column in columns if any(row.get(column) for row in rows)]
    if len({row[RANKING] for row in rows if row.get(RANKING)}) == 1:
        columns.remove(RANKING)
    mean_of = "mean" if len(all_tasks(settings)) > 1 else "accuracy"
    head = f"{mean_of}, val" if settings[0].on_val else mean_of
    heads = [head if column == "mean" else column for column in columns]
    return table(heads, [[row.get(column, "") for column in columns] for row in rows], texts=len(titles))


def signed(interval: Interval, bold: bool = True) -> str:
    """A change with its 95 % interval, where there is one; in Markdown bold where the interval excludes 0."""
    estimate, low, high = (f"{round(value, 2) + 0.0:+.2f}" for value in interval[:3])  # no "-0.00"
    shown = f"**{estimate}**" if bold and interval.excludes_zero else estimate
    return f"{shown} [{low}, {high}]" if interval.is_known else shown


def _row(setting: Setting, few: int | None) -> dict[str, str]:
    m = setting.metrics
    agreement, cosine = (m[setting.shown(name)] for name in ("agreement", "cosine"))
    own = _accuracies(setting, "accuracy") | {"agreement": f"{agreement:.1f}", "cosine": f"{cosine:.4f}"}
    row = _marked(own, setting, few) | _on_subset(setting, "accuracy", few)
    if "V" not in (setting.config["prompt"] or {"mode": "none"})["mode"]:  # those change what a predictor sees
        row |= {"matching, prior, chance": ", ".join(f"{m[key]:.1f}" for key in MATCHING if key in m)}
        row |= {name: f"{m[name.lower()]:.2f}" for name in ("Kendall", "NDCG") if name.lower() in m}
    ranking = 1000 * m.get("gmacs_predictor", 0)
    row |= {"GMACs": f"{m['gmacs']:.4f}", RANKING: f"{ranking:.2f}" * bool(ranking)}
    row |= {"ms": f"{m['ms']:.3f}", "speed-up": f"{m['speedup']:.2f}"} if "ms" in m else {}
    return row | _val(setting, "val_accuracy")


def _seen(setting: Setting) -> dict[str, str]:
    """What a ranking and prompts learned from, of each task, and how far the embedding is from the one it had."""
    pruned = setting.config["pruning"]["keep_rate"] < 1 or setting.config["pruning"]["drop_counts"]
    ranked = setting.metrics["n_train"] if setting.is_fitted and pruned else 0
    named = ranked if setting.config["golden"]["metric"] == "label" else 0
    counts = [setting.metrics.get(key, alone) for key, alone in (("n_seen_images", ranked), ("n_seen_labels", named))]
    return dict(zip(SEEN, (f"{count:g}" for count in counts))) | {DRIFT: f"{mean(setting, 'drift'):.2f}"}


def _control(setting: Setting, control: str, few: int | None) -> dict[str, str]:
    row = _marked(_accuracies(setting, control), setting, few) | _on_subset(setting, control, few)
    return {RANKED_BY: CONTROLS[control]} | row


def _unpruned(setting: Setting, few: int | None) -> dict[str, str]:
    """Without a change and, since no seed moves it, without a spread."""
    row = {task: f"{mean(setting, 'unpruned', task):.1f}" for task in setting.tasks if len(setting.tasks) > 1}
    row |= {"mean": f"{mean(setting, 'unpruned'):.1f}", "GMACs": f"{setting.metrics['gmacs_unpruned']:.4f}"}
    row |= {_on(few): f"{mean(setting, 'unpruned', limit=few):.1f}"} if few else {}
    return row | _val(setting, "val_accuracy_unpruned")


def _accuracies(setting: Setting, measure: str) -> dict[str, str]:
    """Of each task and over all images: how far seeds lie apart, and the change against the unpruned tower."""
    row = {task: f"{mean(setting, measure, task):.1f}" for task in setting.tasks if len(setting.tasks) > 1}
    seeds = setting.seeds(setting.shown(measure))
    apart = f" ± {spread(seeds):.1f}" if len(seeds) > 1 else ""
    return row | {"mean": f"{mean(setting, measure):.1f}{apart}", "change": signed(change(setting, measure=measure))}


def _on_subset(setting: Setting, measure: str, few: int | None) -> dict[str, str]:
    if not few:
        return {}
    return {_on(few): f"{mean(setting, measure, limit=few):.1f}, {signed(change(setting, None, few, measure))}"}


def _marked(row: dict[str, str], setting: Setting, few: int | None) -> dict[str, str]:
    """An oracle's figures as being of the subset; its mean stands in the subset's column alone."""
    if not (few and setting.is_oracle):
        return row
    return {column: text + ON_SUBSET for column, text in row.items() if column not in ("mean", "change")}


def _on(few: int | None) -> str:
    return f"on the oracles' {few}"


def _val(setting: Setting, key: str) -> dict[str, str]:
    """Beside figures of test images."""
    return {"val": f"{setting.metrics[key]:.1f}"} if key in setting.metrics and not setting.on_val else {}


def _tells(column: str, rows: Sequence[dict[str, str]]) -> bool:
    return len({row.get(column, "") for row in rows}) > 1


def towers(settings: Sequence[Setting]) -> list[Setting]:
    """One setting of every model and set of tasks, the one with most images: its unpruned answers stand for all."""
    found: dict[str, Setting] = {}
    for setting in sorted(settings, key=lambda setting: setting.is_oracle):
        found.setdefault(str([setting.config["model"], setting.tasks]), setting)
    return list(found.values())
