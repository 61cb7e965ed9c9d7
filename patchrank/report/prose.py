"""Plain sentences: what a sweep found, how it was made, what was measured, and what its table's columns mean."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from textwrap import shorten
from typing import NamedTuple

from patchrank.config import value_at
from patchrank.report.judgement import Judgement
from patchrank.report.labels import (
    BUDGET,
    KEEP_RATE,
    LEFTOVERS,
    LOCATIONS,
    counted,
    layers,
    plain,
    ranking,
    say,
    usual_values,
)
from patchrank.report.markdown import listed, plural, signed
from patchrank.report.results import Setting, all_tasks, change, subset, worth_of
from patchrank.utils.stats import Interval

FIXED = {  # what is said of a setting that the sweep does not vary
    KEEP_RATE: "{} of patch tokens kept",
    BUDGET: "at most {} of the tower's MACs",
    LOCATIONS: "tokens leave before {}",
    LEFTOVERS: "leftovers: {}",
    "golden.metric": "ranking by {}",
    "predictor.name": "predictor {}",
}
UNUSUAL = ("taper", "align", "metric", "protection", "drop_share")  # of pruning, said where they are not usual
UNSEEN = "**No trial looked at test: all figures here are of validation images, by which choices are made.**"
ORACLES = (
    "Oracles (golden) are ranked by scores of the very {which} images and could not be deployed; they saw the first "
    "{count} images of each task."
)
MEASURED = {  # what stands for accuracy, where there is none
    "k-NN accuracy": "Accuracy of the 20 nearest training images",
    "agreement": "Agreement with the unpruned answers",
    "100 cosine": "Cosine to the unpruned embedding",
}
NO_RESULT = "No trial has a result."
WORDS = {  # verdict -> what is said of one claim, and of several
    "true": ("holds", "hold"),
    "refuted": ("is refuted", "are refuted"),
    "open": ("is not told apart", "are not told apart"),
    "not measured": ("could not be measured", "could not be measured"),
}


class Change(NamedTuple):
    """How accuracy, or what stands for it, changed in one setting, and what that setting is called."""

    found: Interval
    name: str
    setting: Setting

    def __str__(self) -> str:
        """As "accuracy changes by +0.17 points (95 % interval +0.02 to +0.30)"."""
        what = self.setting.worth + (" on val" if self.setting.on_val else "")
        estimate, low, high = map(signed, self.found[:3])
        interval = f" (95 % interval {low} to {high})" if self.found.is_known else ""
        return f"{what} changes by {estimate} points{interval}"


def question(asked: str | None, axes: Sequence[str], worth: str = "accuracy") -> str:
    """What a sweep asks; where its file does not say it, what it sweeps."""
    swept = [axis.replace(".", " ").replace("_", " ") for axis in axes if axis not in ("seed", "controls")]
    return asked or f"How does {worth} change with {listed(swept or ['pruning'])}?"


def changes_of(settings: Sequence[Setting], names: Iterable[str]) -> list[Change]:
    """The change of each setting that is no oracle, the worst first; of the oracles where there is nothing else.

    Args:
        names: what the settings are called, one for each.
    """
    changes = [Change(change(setting), name, setting) for setting, name in zip(settings, names)]
    changes = [each for each in changes if not each.setting.is_oracle] or changes
    return sorted(changes, key=lambda each: each.found.estimate)


def best_and_worst(changes: Sequence[Change]) -> str:
    """Two sentences: which setting changed accuracy most for the better and for the worse; one, of one setting.

    The images are said again where those of the worst are others.
    """
    worst, best = changes[0], changes[-1]
    images, others = (counted(each.setting.values(each.setting.shown("accuracy"))) for each in (best, worst))
    found = f"{best} against nothing pruned, on {images}."
    if len(changes) == 1:
        return _capital(found)
    others = f", on {others}" if others != images else ""
    return f"Best is {best.name}: {found} Worst is {worst.name}: {worst}{others}."


def moved(changes: Sequence[Change]) -> str:
    """In how many settings accuracy moved, of those that have an interval."""
    known = [each.found for each in changes if each.found.is_known]
    if len(changes) == 1 or not known:
        return ""
    fall, rise = sum(found.high < 0 for found in known), sum(found.low > 0 for found in known)
    what = _capital(worth_of([each.setting for each in changes]))
    text = f"{what} falls in {fall} and rises in {rise} of {len(known)} settings (95 % interval excludes 0)."
    if rest := len(changes) - len(known):
        text += f" {rest} more {'has' if rest == 1 else 'have'} no interval."
    return text


def verdicts(judgements: Sequence[Judgement]) -> str:
    """How many claims hold."""
    if not judgements:
        return "Nothing was claimed beforehand."
    counts = Counter(judgement.verdict for judgement in judgements)
    if len(judgements) == 1:
        return f"Its one claim {WORDS[judgements[0].verdict][0]}."
    said = []
    for verdict, (one, many) in WORDS.items():
        if count := counts[verdict]:
            said.append(f"{count} {one if count == 1 else many}")
    return f"Of {len(judgements)} claims, {listed(said)}."


def answer(changes: Sequence[Change], judgements: Sequence[Judgement], pictures: Sequence[str]) -> dict[str, str]:
    """The answer to a sweep's question and its figure, as an index shows them.

    They are those of the claim marked `answers`, or else of the first claim. Without claims the best and the worst
    setting answer, in less than 120 characters.

    Args:
        pictures: file names; the first is to be looked at where nothing was claimed.
    """
    if judgements:
        marked = [judgement for judgement in judgements if judgement.claim.answers]
        said, figure = (marked or judgements)[0].headline
        return {"answer": said, "figure": figure}
    figure = f"[picture]({pictures[0]})" if pictures else ""
    if not changes:
        return {"answer": NO_RESULT, "figure": figure}
    what = worth_of([each.setting for each in changes])
    what = f"Val {what}" if changes[0].setting.on_val else _capital(what)
    points = [f"{each.found.estimate:+.2f} points" for each in changes]
    if len(changes) == 1:
        return {"answer": f"{what} changes by {points[0]}", "figure": figure}
    worst, best = (f"{points[n]} ({shorten(changes[n].name, 28, placeholder=' …')})" for n in (0, -1))
    return {"answer": f"{what}: best {best}, worst {worst}", "figure": figure}


def how_made(rows: Sequence[dict], command: str) -> str:
    """The command, and when and with what its trials ran."""
    days = sorted({row["date"] for row in rows})
    when = days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"
    env = {key: _alternatives(row["env"][key] for row in rows) for key in ("patchrank", "torch", "device", "threads")}
    return (
        f"Made by `python -m patchrank.tune {command}`; trials run: {len(rows)}, on {when} (patchrank "
        f"{env['patchrank']}, torch {env['torch']}, {env['device']}, threads a trial: {env['threads']})."
    )


def what_was_measured(settings: Sequence[Setting], axes: Sequence[str]) -> str:
    """Model, images, seeds, oracles, and what was the same everywhere."""
    tasks, models = all_tasks(settings), _alternatives(f"`{setting.config['model']['name']}`" for setting in settings)
    others = [setting for setting in settings if not setting.is_oracle] or settings
    counts = _alternatives(setting.count(task) for setting in others for task in setting.tasks)
    which, each = "validation" if settings[0].on_val else "test", " each" if len(tasks) > 1 else ""
    images = f"{counts} {which} images{each} of {listed(f'`{task}`' for task in tasks)}"
    is_zero_shot = not any({"n_prompt_images", "val_knn_accuracy"} & each.metrics.keys() for each in settings)
    what = MEASURED.get(worth_of(settings), "Zero-shot accuracy" if is_zero_shot else "Accuracy")
    sentences = [f"{what} in percent of {models} on {images}.", UNSEEN if settings[0].on_val else ""]
    sentences += [_fitted(settings), _learned(settings), _seeds(settings)]
    if seen := [setting.count(task) for setting in settings if setting.is_oracle for task in setting.tasks]:
        sentences.append(ORACLES.format(which=which, count=min(seen)))
    return " ".join(filter(None, [*sentences, _fixed(settings, axes), *_defaults(settings, axes)]))


def legend(settings: Sequence[Setting], table: str) -> str:
    """What the columns of the main table mean."""
    columns = [cell.strip() for cell in table.splitlines()[0].strip("|").split("|")]
    units = listed(dict.fromkeys(f"{setting.unit(task)}s" for setting in settings for task in setting.tasks))
    few, seeds = subset(settings), any(len(setting.rows) > 1 for setting in settings)
    controls = any(each.has(each.shown(control)) for each in settings for control in ("random", "reversed"))
    merges = any(setting.merges for setting in settings)
    shown_if = {
        "Change: against the unpruned tower on the same images, in points, with its 95 % interval (paired bootstrap "
        f"over {units}), bold where that excludes 0.": True,
        "±: standard deviation over seeds.": seeds,
        f"°, and the column of the oracles' {few}: on the first {few} images of each task alone.": few,
        "k-NN: by a vote of the 20 nearest training images.": worth_of(settings) == "k-NN accuracy",
        "Agreement and cosine: with the unpruned answer and embedding.": True,
        "Matching: how much of the golden ranking's top 51 % is found, beside the position prior and chance, in "
        "percent, on val, where learning rates were chosen by it.": "matching, prior, chance" in columns,
        "Seen: images, and their labels, that a task's ranking and prompts learned from.": "images seen" in columns,
        f"GMACs: one image, its ranking {'and matching ' if merges else ''}included.": True,
        "Speed-up: against the unpruned tower, measured in turns with it.": "ms" in columns,
        "Controls drop as many tokens, at random or the most important first.": controls,
        _control_seeds(settings): True,
        "Val: accuracy on validation images, by which choices are made.": "val" in columns,
    }
    return " ".join(text for text, is_shown in shown_if.items() if text and is_shown)


def budgets(settings: Sequence[Setting]) -> str:
    """Whether settings with a budget come as near to it as whole tokens allow; "" where none has one."""
    having = [setting for setting in settings if value_at(setting.config, BUDGET) is not None]
    if not having:
        return ""
    far = []
    for setting in having:
        budget, m = value_at(setting.config, BUDGET), setting.metrics
        share = m["gmacs"] / m["gmacs_unpruned"]
        if share > budget or budget - share > max(0.01, 1 / (m["n_tokens"] + 1)):
            far.append(f"{ranking(setting)} at {100 * budget:g} % has {100 * share:.1f} %")
    rule = "below it by at most max(1 %, one token of the unpruned tower's MACs)"
    if not far:
        return f"Budgets: {plural(len(having), 'setting')} with one, each {rule}, so rows of one budget cost the same."
    return f"**Budgets**: of {plural(len(having), 'setting')} with one, not all are {rule}: {'; '.join(far)}."


def without_interval(settings: Sequence[Setting]) -> str:
    """Why some changes stand without an interval; "" where none does."""
    pairs = [(setting, task) for setting in settings for task in setting.tasks]
    units = {task: setting.unit(task) for setting, task in pairs if not change(setting, task).is_known}
    said = []
    for task, unit in units.items():
        if unit == "image":
            cause, cure = f"`{task}` has one image alone", "several images"
        else:
            cause, cure = f"All images of `{task}` belong to one {unit}", f"images of several {unit}s"
        said.append(f"{cause}, so nothing tells how others would differ; try {cure}.")
    return " ".join(["**Without an interval.**", *said]) if said else ""


def _control_seeds(settings: Sequence[Setting]) -> str:
    """Of which seeds the controls are, where fewer ran them than a setting has; "" where none does."""
    said = []
    for setting in settings:
        for control in ("random", "reversed"):
            seeds = setting.seeds_with(setting.shown(control))
            if 0 < len(seeds) < len(setting.rows):
                said.append(f"{'seed' if len(seeds) == 1 else 'seeds'} {listed(map(str, seeds))} alone")
    return f"Controls: of {_alternatives(said)}." if said else ""


def _fitted(settings: Sequence[Setting]) -> str:
    val = _alternatives(len(setting.arrays[0][f"{task}.val_ids"]) for setting in settings for task in setting.tasks)
    train = _alternatives(int(setting.metrics["n_train"]) for setting in settings if setting.is_fitted)
    if not train:
        return f"Validation: {val} images of each task."
    return f"Rankings were fitted on {train} other images; validation: {val} images of each task."


def _learned(settings: Sequence[Setting]) -> str:
    """What prompts were tuned on."""
    said, learning = [], [setting for setting in settings if "n_prompt_images" in setting.metrics]
    for loss, how in (("cross_entropy", "with their labels"), ("distill", "without labels, by distillation")):
        having = [setting for setting in learning if setting.config["prompt"]["loss"] == loss]
        if counts := _alternatives(int(setting.metrics["n_prompt_images"]) for setting in having):
            said.append(f"{counts} images of each task {how}")
    return f"Prompts were tuned on {' or '.join(said)}; the unpruned tower has none." if said else ""


def _seeds(settings: Sequence[Setting]) -> str:
    most = max((setting.rows for setting in settings), key=len)
    seeds = ", ".join(str(row["config"]["seed"]) for row in most)
    if len(most) == 1:
        return f"Seed {seeds}."
    several = sum(len(setting.rows) > 1 for setting in settings)
    some = f" in {several} of {len(settings)} settings" if several < len(settings) else ""
    return f"Seeds {seeds} are averaged{some}."


def _fixed(settings: Sequence[Setting], axes: Sequence[str]) -> str:
    """What no axis varies and all settings share."""
    parts = []
    for path, words in FIXED.items():
        values = {_said(setting, path) for setting in settings}
        if len(values) == 1 and values != {""} and not {path, path.split(".")[0]} & set(axes):
            parts.append(words.format(*values))
    for key in UNUSUAL:
        path, values = f"pruning.{key}", {value_at(setting.config, f"pruning.{key}") for setting in settings}
        if len(values) == 1 and values != {value_at({"pruning": {}}, path)} and not {path, "pruning"} & set(axes):
            parts.append(say(key.replace("_", " "), *values))
    text = f"Everywhere: {'; '.join(parts)}." if parts else ""
    # reducers that merge by a rule of their own act inside of a layer
    return text if all(setting.leftovers for setting in settings) else text.replace("leave before", "leave at")


def _said(setting: Setting, path: str) -> str:
    """A setting's value as it is said where all share it; "" where there is nothing to say."""
    value, pruning = value_at(setting.config, path), setting.config["pruning"]
    if path == LEFTOVERS:
        return setting.leftovers
    if path == LOCATIONS:
        return layers(plain(value))
    counted_otherwise = pruning["drop_counts"] is not None or value_at(setting.config, BUDGET) is not None
    if (path == KEEP_RATE and counted_otherwise) or (path == BUDGET and value is None):
        return ""
    return plain(value, path)


def _defaults(settings: Sequence[Setting], axes: Sequence[str]) -> list[str]:
    """What "default" means where a whole section is swept: the usual values of the settings that vary in it."""
    said = []
    for axis in axes:
        sections = [value_at(setting.config, axis) for setting in settings]
        if isinstance(sections[0], dict) and axis != "pruning":  # whose settings have columns of their own
            usual = usual_values(sections)
            varied = [say(key, usual[key]) for key in usual if any(section[key] != usual[key] for section in sections)]
            said.append(f"Default {axis}: {', '.join(varied)}." if varied else "")
    return said


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _alternatives(values: Iterable) -> str:
    return " or ".join(dict.fromkeys(map(str, values)))
