"""Plain sentences on how a report was made, what was measured, and what its table's columns mean."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from patchrank.config import value_at
from patchrank.report.labels import KEEP_RATE, LOCATIONS, layers, plain, say, usual_values
from patchrank.report.markdown import listed
from patchrank.report.results import Setting, all_tasks, change, subset

FIXED = {  # what is said of a setting that the sweep does not vary
    KEEP_RATE: "{} of patch tokens kept",
    LOCATIONS: "tokens leave before {}",
    "pruning.leftovers": "leftovers: {}",
    "golden.metric": "ranking by {}",
    "predictor.name": "predictor {}",
}
UNSEEN = "**No trial looked at test: all figures here are of validation images, by which choices are made.**"
ORACLES = (
    "Oracles (golden) are ranked by scores of the very {which} images and could not be deployed; they saw the first "
    "{count} images of each task."
)


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
    what = "Accuracy" if any("n_prompt_images" in setting.metrics for setting in settings) else "Zero-shot accuracy"
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
    controls = any(setting.has(control) for setting in settings for control in ("random", "reversed"))
    shown_if = {
        "Change: against the unpruned tower on the same images, in points, with its 95 % interval (paired bootstrap "
        f"over {units}), bold where that excludes 0.": True,
        "±: standard deviation over seeds.": seeds,
        f"°, and the column of the oracles' {few}: on the first {few} images of each task alone.": few,
        "Agreement and cosine: with the unpruned answer and embedding.": True,
        "Matching: how much of the golden ranking's top 51 % is found, beside the position prior and chance, in "
        "percent, on val, where learning rates were chosen by it.": "matching, prior, chance" in columns,
        "Seen: images, and their labels, that a task's ranking and prompts learned from.": "images seen" in columns,
        "GMACs: one image, its ranking included.": True,
        "Speed-up: against the unpruned tower, measured in turns with it.": "ms" in columns,
        "Controls drop as many tokens, at random or the most important first.": controls,
        _control_seeds(settings): True,
        "Val: accuracy on validation images, by which choices are made.": "val" in columns,
    }
    return " ".join(text for text, is_shown in shown_if.items() if text and is_shown)


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
            seeds = setting.seeds_with(control)
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
        values = {plain(value_at(setting.config, path), path) for setting in settings}
        values = set(map(layers, values)) if path == LOCATIONS else values
        if len(values) == 1 and not {path, path.split(".")[0]} & set(axes):
            parts.append(words.format(*values))
    return f"Everywhere: {'; '.join(parts)}." if parts else ""


def _defaults(settings: Sequence[Setting], axes: Sequence[str]) -> list[str]:
    """What "default" means where a whole section is swept: the usual values of the settings that vary in it."""
    said = []
    for axis in axes:
        sections = [value_at(setting.config, axis) for setting in settings]
        if isinstance(sections[0], dict):
            usual = usual_values(sections)
            varied = [say(key, usual[key]) for key in usual if any(section[key] != usual[key] for section in sections)]
            said.append(f"Default {axis}: {', '.join(varied)}." if varied else "")
    return said


def _alternatives(values: Iterable) -> str:
    return " or ".join(dict.fromkeys(map(str, values)))
