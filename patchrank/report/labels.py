"""What the settings of a sweep are called: short texts for the values of the swept axes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from patchrank.config import value_at
from patchrank.report.markdown import listed, plural
from patchrank.report.results import Setting, Values

RANKED_BY, PROMPTS = "ranked by", "prompts"
KEEP_RATE, LOCATIONS, BUDGET = "pruning.keep_rate", "pruning.locations", "pruning.budget"
LEFTOVERS = "pruning.leftovers"
MODES = {"T": "text", "V": "visual", "TV": "text + visual"}
RANKINGS = {
    "prior": "position prior",
    "center": "image centre",
    "random": "at random",
    "cls_attention": "CLS attention",
    "golden": "golden (oracle)",
    "tome": "ToMe",
    "feature_merge": "feature merging",
    "guided_merge": "guided merging",
    "rank_merge": "ranked matching",
    "attention_merge": "ranked matching, free",
    "evit": "EViT",
    "evit_norm": "EViT, weights normalised",
    "evit_drop": "EViT without fusion",
    "diffrate": "DiffRate",
    "avit": "A-ViT, rank form",
    "avit_flipped": "A-ViT, sign flipped",
    "avit_channel": "A-ViT, random channel",
    "pixel_variance": "pixel variance",
    "mlp_shift": "representation shift",
}
LEARNING = ("predictor", "prior", "guided_merge", "rank_merge", "golden")  # of those above, and by their own name
COMPARING = ("guided_merge", "rank_merge", "attention_merge")  # which read `metric` and `protection`


def counted(found: Values) -> str:
    """What figures are of, as "1077 images of 359 digits"; "1077 images" where each stands for itself."""
    parts = []
    for unit in dict.fromkeys(found.units.tolist()):
        clusters = found.clusters[found.units == unit]
        images = plural(len(clusters), "image")
        parts.append(images if unit == "image" else f"{images} of {plural(len(np.unique(clusters)), unit)}")
    return listed(parts)


def swept(settings: Sequence[Setting], axes: Sequence[str]) -> dict[str, list[str]]:
    """Column name -> a text for every setting. Each swept axis has a column, and so has the ranking, swept or not.

    Seeds and controls have none, since a setting merges them. A setting whose reducer does not read an axis
    (`golden.metric` of a random ranking) has an empty text there.
    """
    columns: dict[str, list[str]] = {}
    rankings = [ranking(setting) for setting in settings]
    for axis in _single(settings, axes):
        if axis == "pruning.reducer":
            columns[RANKED_BY] = rankings
        elif axis in ("prompt", "prompt.mode", "prompt.loss", "prompt.norm_gains"):
            columns[PROMPTS] = [prompts(setting) for setting in settings]
        elif axis == "repair":
            columns[axis] = [repair(setting) for setting in settings]
        elif axis not in ("seed", "controls"):
            columns[_short(axis, columns)] = _texts(settings, axis)
    return columns if RANKED_BY in columns else columns | {RANKED_BY: rankings}


def _single(settings: Sequence[Setting], axes: Sequence[str]) -> list[str]:
    """The axes, and in place of the whole section `pruning`, where it is swept, each of its settings that varies."""
    found = []
    for axis in axes:
        sections = [setting.config[axis] for setting in settings] if axis == "pruning" else []
        keys = [key for key in dict.fromkeys(key for each in sections for key in each)]
        varied = [key for key in keys if any(each.get(key) != sections[0].get(key) for each in sections)]
        found += [f"{axis}.{key}" for key in varied] if sections else [axis]
    return list(dict.fromkeys(found))


def labels(settings: Sequence[Setting], axes: Sequence[str], without: Sequence[str] = ()) -> list[str]:
    """A name for every setting, its ranking first: "predictor; layers 4, 6, 8, 10; 60 % kept".

    Args:
        without: swept axes that are left out.
    """
    columns = swept(settings, [axis for axis in axes if axis not in without])
    rankings = columns.pop(RANKED_BY)
    spoken = [[_spoken(column, text) for text in texts] for column, texts in columns.items()]
    if len(set(rankings)) > 1 or not spoken:
        spoken = [[text.replace("no prompts", "") for text in texts] for texts in spoken]
        spoken.insert(0, rankings)
    return ["; ".join(filter(None, texts)) for texts in zip(*spoken)]


def ranking(setting: Setting) -> str:
    """What ranks the tokens, in words."""
    reducer = setting.config["pruning"]["reducer"]
    return RANKINGS.get(reducer, reducer)


def prompts(setting: Setting) -> str:
    """What a setting learned beside its ranking: "none", "text + visual", "visual + gains, distilled"."""
    config = setting.config["prompt"] or {"mode": "none"}
    if config["mode"] == "none":
        return "none"
    gains = " + gains" if config["norm_gains"] else ""
    distilled = ", distilled" if config["loss"] == "distill" else ""
    return f"{MODES.get(config['mode'], config['mode'])}{gains}{distilled}"


def repair(setting: Setting) -> str:
    """Whether the projection was solved anew: "none", "from 1024 images"."""
    config = setting.config.get("repair")  # which records leave out where it is null
    if config is None:
        return "none"
    ridge = "" if config["ridge"] is None else f", ridge {config['ridge']:g}"
    return f"from {config['images']} images{ridge}"


def plain(value: object, axis: str = "") -> str:
    """A setting's value as people write it: `[4, 6]` as "4, 6", a keep rate of 0.6 as "60 %"."""
    if axis in (KEEP_RATE, BUDGET) and value is not None:
        return f"{100 * value:g} %"
    if axis.endswith(".fit_on"):
        said = {"own": "its own task", "others": "the other tasks"}
        return said[value] if isinstance(value, str) else " + ".join(value)
    if isinstance(value, (list, tuple)):
        in_a_row = axis == LOCATIONS and len(value) > 5 and list(value) == list(range(value[0], value[-1] + 1))
        return f"{value[0]} to {value[-1]}" if in_a_row else ", ".join(map(str, value))
    if value is None:
        return "none"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _spoken(column: str, text: str) -> str:
    """A value that can stand without its column's head: "60 % kept", "window 3"."""
    if not text:
        return ""
    if column == "locations":
        return layers(text)
    if column == "kept":
        return f"{text} kept"
    if column == "budget" and text != "none":
        return f"{text} of MACs"
    if column == PROMPTS and text == "none":
        return "no prompts"
    if column == PROMPTS:
        mode = text.removesuffix(", distilled").removesuffix(" + gains")
        return f"{mode} prompts{text.removeprefix(mode)}"
    needs_head = column == "fitted on" or text == "none" or text[0] in "-.0123456789"
    return f"{column} {text}" if needs_head else text


def swept_rates(settings: Sequence[Setting], axes: Sequence[str]) -> list[float]:
    """The swept keep rates, lowest first; none where they are not swept."""
    return sorted({value_at(setting.config, KEEP_RATE) for setting in settings}) if KEEP_RATE in axes else []


def layers(text: str) -> str:
    """Locations in words: "layer 4", "layers 4, 6"."""
    return f"layers {text}" if "," in text or " to " in text else f"layer {text}"


def _short(axis: str, taken: dict) -> str:
    """`pruning.keep_rate` as "kept", `predictor.name` as "predictor"; the whole path where two would be alike."""
    section, _, last = axis.rpartition(".")
    name = {"keep_rate": "kept", "name": section or last, "fit_on": "fitted on"}.get(last, last)
    return axis if name in taken else name.replace("_", " ")


def _texts(settings: Sequence[Setting], axis: str) -> list[str]:
    values = [value_at(setting.config, axis) for setting in settings]
    read = [_reads(setting, axis) for setting in settings]
    if any(isinstance(value, dict) for value in values):
        sections = [value if is_read else {} for value, is_read in zip(values, read)]
        usual = usual_values(sections)
        unusual = [[say(key, each[key]) for key in each if each[key] != usual[key]] for each in sections]
        texts = [", ".join(said) or "default" for said in unusual]
    else:
        texts = [plain(value, axis) for value in values]
    texts = [setting.leftovers for setting in settings] if axis == LEFTOVERS else texts
    if axis in (KEEP_RATE, BUDGET):  # a budget wins over the rate, and says nothing where there is none
        budgets = [value_at(setting.config, BUDGET) for setting in settings]
        texts = [text if (axis == BUDGET) != (budget is None) else "" for text, budget in zip(texts, budgets)]
    return [text if is_read else "" for text, is_read in zip(texts, read)]


def usual_values(sections: Sequence[dict]) -> dict[str, object]:
    """The value that most of the distinct sections have, for each key; the first section's where they are even."""
    distinct = [section for n, section in enumerate(sections) if section and section not in sections[:n]]
    usual = {}
    for key in distinct[0] if distinct else ():
        values = [section[key] for section in distinct]
        usual[key] = max(values, key=values.count)
    return usual


def say(key: str, value: object) -> str:
    """A key with its value, as "window 3"; a `name` stands without its key."""
    return plain(value) if key == "name" else f"{key} {plain(value)}"


def _reads(setting: Setting, axis: str) -> bool:
    """Whether what a setting's reducer does depends on an axis. A reducer of a user's own may read any."""
    reducer, section = setting.config["pruning"]["reducer"], axis.split(".")[0]
    own = reducer not in ("predictor", *RANKINGS)
    if axis in ("pruning.metric", "pruning.drop_share"):
        names = COMPARING if axis == "pruning.metric" else ("diffrate",)
        return setting.leftovers == "merge" or reducer in names or own
    if axis == "pruning.protection":
        return reducer in COMPARING or own
    if reducer in RANKINGS and reducer not in LEARNING:
        return section not in ("golden", "predictor")
    if reducer == "prior":
        return section != "predictor" or axis == "predictor.fit_on"
    return not (reducer == "golden" and section == "predictor")
