"""The main table: a row for the unpruned tower, for every setting, and for the controls that a setting ran."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from patchrank.config import value_at
from patchrank.report.labels import BUDGET, RANKED_BY, labels, swept
from patchrank.report.markdown import signed, table
from patchrank.report.measures import STAND_INS
from patchrank.report.paper import papers_figure
from patchrank.report.results import Setting, all_tasks, change, mean, subset, worth_of
from patchrank.utils.stats import Interval, spread

CONTROLS = {"random": "at random (control)", "reversed": "reversed (control)"}
MATCHING = ("matching_rate", "matching_prior", "matching_chance")
PAPER, RANKING, DRIFT, SUBSET = "paper (see below)", "ranking MMACs", "1000 (1 - cosine)", "on the oracles'"
SHARE, PARTS = "share of MACs", "MMACs: image tower, ranking, matching, one caption"
MEASURED = (
    "tokens left", "agreement", "cosine", DRIFT, "matching, prior, chance", "Kendall", "NDCG",
    "images seen", "labels seen", "GMACs", SHARE, PARTS, RANKING, "ms", "speed-up", "val", PAPER,
)  # fmt: skip
WIDTH = 100  # characters of a line in a terminal
ON_SUBSET = "°"  # marks figures that were measured on the oracles' subset alone


def main_table(
    settings: Sequence[Setting], axes: Sequence[str], paper: dict | None = None, further: Sequence[str] = ()
) -> str:
    """One row for each setting, its seeds merged. Columns that would tell nothing are left out.

    Args:
        axes: dotted paths of the swept settings, which name the rows.
        paper: a table of the paper; where it has the average of the same setting, that stands in the last column.
        further: columns that are asked for, as `config.ReportConfig.columns` names them.
    """
    names, few = swept(settings, axes), subset(settings)
    rows: list[dict[str, str]] = []
    learned = "seen" in further or any("n_seen_images" in setting.metrics for setting in settings)
    by_task = "by_task" in further
    for n, setting in enumerate(settings):
        name = {column: texts[n] for column, texts in names.items()}
        seen = _seen(setting) if learned else {}
        costs = _costs(setting, further)
        rows.append(name | _row(setting, few, by_task) | seen | costs | {PAPER: papers_figure(paper, setting.config)})
        for control, words in CONTROLS.items():
            if setting.has(setting.shown(control)):
                rows.append(name | {RANKED_BY: words} | _accuracies(setting, control, few, by_task))
    titles = [column for column in names if len({row.get(column, "") for row in rows}) > 1] or [RANKED_BY]
    rows = [{titles[0]: "nothing pruned"} | _unpruned(tower, few) for tower in towers(settings)] + rows
    columns = [*titles, *all_tasks(settings), "mean", "change", SUBSET, *MEASURED]
    columns = [column for column in columns if any(row.get(column) for row in rows)]
    if len({row[RANKING] for row in rows if row.get(RANKING)}) == 1:
        columns.remove(RANKING)
    mean_of = "mean" if len(all_tasks(settings)) > 1 else worth_of(settings)
    head = f"{mean_of}, val" if settings[0].on_val else mean_of
    heads = {"mean": head, SUBSET: f"{SUBSET} {few}"}
    lines = [[row.get(column, "") for column in columns] for row in rows]
    return table([heads.get(column, column) for column in columns], lines, texts=len(titles))


def brief_table(settings: Sequence[Setting], axes: Sequence[str]) -> str:
    """One line for the unpruned tower and one for each setting, no wider than a terminal: plain text, not Markdown.

    A name that is too long loses its middle, which an ellipsis marks. Where two would then read alike, each ends in
    its line's number.
    """
    few, found = subset(settings), towers(settings)
    head = worth_of(settings) + (", val" if settings[0].on_val else "")
    lines = [["setting", head, "change, 95 % interval", "GMACs", "val"]]
    for tower in found:
        which = f" ({tower.config['model']['name']}; {', '.join(tower.tasks)})" if len(found) > 1 else ""
        row = _unpruned(tower, None)
        lines.append([f"nothing pruned{which}", row["mean"], "", row["GMACs"], row["val"]])
    for setting, name in zip(settings, labels(settings, axes)):
        accuracy = mean_text(setting) + (ON_SUBSET if few and setting.is_oracle else "")
        gmacs, val = f"{setting.metrics['gmacs']:.4f}", _val(setting)
        lines.append([name, accuracy, change_text(change(setting), bold=False), gmacs, val])
    if not any(line[-1] for line in lines[1:]):
        lines = [line[:-1] for line in lines]
    texts = _aligned(lines)
    return "\n".join([*texts, f"{ON_SUBSET} on the first {few} images of each task alone"] if few else texts)


def _aligned(lines: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a name and figures as text, names shortened so far that no line is wider than a terminal."""
    names, *columns = zip(*lines)
    widths = [max(map(len, column)) for column in columns]
    width = min(max(map(len, names)), WIDTH - sum(widths) - 2 * len(widths))
    texts = [_without_middle(name, width) for name in names]
    counts = Counter(texts)
    for n, (name, text) in enumerate(zip(names, texts)):
        if text != name and counts[text] > 1:
            texts[n] = f"{_without_middle(name, width - len(f' #{n}'))} #{n}"
    padded = [[text.ljust(width) for text in texts]]
    padded += [[cell.rjust(width) for cell in column] for column, width in zip(columns, widths)]
    return ["  ".join(cells).rstrip() for cells in zip(*padded)]


def _without_middle(name: str, width: int) -> str:
    if len(name) <= width:
        return name
    behind = (width - 1) // 2
    return f"{name[: width - 1 - behind]}…{name[len(name) - behind :]}"


def change_text(interval: Interval, bold: bool = True) -> str:
    """A change with its 95 % interval, where there is one; in Markdown bold where the interval excludes 0."""
    estimate, low, high = map(signed, interval[:3])
    shown = f"**{estimate}**" if bold and interval.excludes_zero else estimate
    return f"{shown} [{low}, {high}]" if interval.is_known else shown


def mean_text(setting: Setting, measure: str = "accuracy") -> str:
    """A mean over all images, and how far seeds lie apart where there are several."""
    seeds = setting.seeds(setting.shown(measure))
    apart = f" ± {spread(seeds):.1f}" if len(seeds) > 1 else ""
    return f"{mean(setting, measure):.1f}{apart}"


def _row(setting: Setting, few: int | None, by_task: bool = False) -> dict[str, str]:
    m = setting.metrics
    row = _accuracies(setting, "accuracy", few, by_task)
    mark = ON_SUBSET if few and setting.is_oracle else ""
    row |= {"agreement": f"{m[setting.shown('agreement')]:.1f}{mark}"} if setting.worth != "100 cosine" else {}
    row["cosine"] = f"{m[setting.shown('cosine')]:.4f}{mark}"
    if "V" not in (setting.config["prompt"] or {"mode": "none"})["mode"]:  # those change what a predictor sees
        row["matching, prior, chance"] = ", ".join(f"{m[key]:.1f}" for key in MATCHING if key in m)
        row |= {name: f"{m[name.lower()]:.2f}" for name in ("Kendall", "NDCG") if name.lower() in m}
    row["GMACs"] = f"{m['gmacs']:.4f}"
    if value_at(setting.config, BUDGET) is not None:
        row["tokens left"] = f"{m['n_kept']:g} of {m['n_tokens']:g}"
    if m.get("gmacs_predictor"):
        row[RANKING] = f"{1000 * m['gmacs_predictor']:.2f}"
    if "ms" in m:
        row |= {"ms": f"{m['ms']:.3f}", "speed-up": f"{m['speedup']:.2f}"}
    return row | {"val": _val(setting)}


def _seen(setting: Setting) -> dict[str, str]:
    """What a ranking and prompts learned from, of each task, and how far the embedding is from the one it had."""
    pruning = setting.config["pruning"]
    pruned = pruning["keep_rate"] < 1 or pruning["drop_counts"] or value_at(setting.config, BUDGET) is not None
    images = setting.metrics["n_train"] if setting.is_fitted and pruned else 0
    named = images if setting.config["golden"]["metric"] == "label" else 0
    images, named = setting.metrics.get("n_seen_images", images), setting.metrics.get("n_seen_labels", named)
    return {"images seen": f"{images:g}", "labels seen": f"{named:g}", DRIFT: f"{mean(setting, 'drift'):.2f}"}


def _unpruned(setting: Setting, few: int | None) -> dict[str, str]:
    """Without a change and, since no seed moves it, without a spread."""
    row = {task: f"{mean(setting, 'unpruned', task):.1f}" for task in setting.tasks if len(setting.tasks) > 1}
    row |= {"mean": f"{mean(setting, 'unpruned'):.1f}", "GMACs": f"{setting.metrics['gmacs_unpruned']:.4f}"}
    if few:
        row[SUBSET] = f"{mean(setting, 'unpruned', limit=few):.1f}"
    return row | {"val": _val(setting, "_unpruned")}


def _costs(setting: Setting, further: Sequence[str]) -> dict[str, str]:
    """Further columns of what an image costs; a caption is in none of the other figures."""
    m, costs = setting.metrics, {}
    if "share" in further:
        costs[SHARE] = f"{100 * m['gmacs'] / m['gmacs_unpruned']:.1f} %"
    if "parts" in further:
        ranking, matching = m["gmacs_predictor"], m.get("gmacs_matching", 0)
        parts = [m["gmacs"] - ranking - matching, ranking, matching]
        parts += [m["gmacs_text"]] if "gmacs_text" in m else []
        costs[PARTS] = ", ".join(f"{1000 * part:.2f}" for part in parts)
    return costs


def _accuracies(setting: Setting, measure: str, few: int | None, by_task: bool = False) -> dict[str, str]:
    """Of each task and over all images, with the change against the unpruned tower; on the oracles' subset as well.

    An oracle's figures are of the subset: they are marked, and its mean stands in the subset's column alone.
    """
    mark = ON_SUBSET if few and setting.is_oracle else ""
    row = {task: f"{mean(setting, measure, task):.1f}{mark}" for task in setting.tasks if len(setting.tasks) > 1}
    if by_task:
        row = {task: f"{text}, {change_text(change(setting, task, measure=measure))}" for task, text in row.items()}
    if not mark:
        row |= {"mean": mean_text(setting, measure), "change": change_text(change(setting, measure=measure))}
    if few:
        changed = change_text(change(setting, None, few, measure))
        row[SUBSET] = f"{mean(setting, measure, limit=few):.1f}, {changed}"
    return row


def _val(setting: Setting, end: str = "") -> str:
    """The accuracy, or what stands for it, of validation images, to stand beside figures of test images."""
    key = f"val_{STAND_INS[setting.worth].get('accuracy', 'accuracy')}{end}"
    return f"{setting.metrics[key]:.1f}" if key in setting.metrics and not setting.on_val else ""


def towers(settings: Sequence[Setting]) -> list[Setting]:
    """One setting of every model and set of tasks, the one with most images: its unpruned answers stand for all."""
    found: dict[str, Setting] = {}
    for setting in sorted(settings, key=lambda setting: setting.is_oracle):
        found.setdefault(str([setting.config["model"], setting.tasks]), setting)
    return list(found.values())
