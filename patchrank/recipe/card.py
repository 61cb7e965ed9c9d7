"""The card of a pruned model: what was measured, how, and how to use the folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from patchrank.cli.summary import macs_line
from patchrank.config import TrialConfig
from patchrank.models.recipe_files import NAME
from patchrank.report.labels import RANKINGS
from patchrank.report.markdown import listed, literal, plural, table
from patchrank.utils.veil import MERGED

CARD = "README.md"
PAIRS, TRIES = "what-goes.png", "tries.png"  # pictures beside the card
BEST = 10  # settings that the card's table names
LABELS = {  # of figures in percent
    "image_neighbours@10": "ten nearest images, found again",
    "image_neighbours@10_reindexed": "the same, index built anew",
    "accuracy": "accuracy",
    "accuracy_unpruned": "accuracy, unpruned",
    "knn_accuracy": "accuracy of nearest neighbours",
    "knn_accuracy_unpruned": "accuracy of nearest neighbours, unpruned",
    "agreement": "answers that stay the same",
}


def name_of(trial: TrialConfig) -> str:
    """A method in words: "ranked matching, repaired"."""
    pruning = trial.pruning
    name = RANKINGS.get(pruning.reducer, pruning.reducer)
    end = {"merge": ", the rest merges", "drop": ", the rest is dropped"}.get(pruning.leftovers or "", "")
    return f"{name}{end}" + (", repaired" if trial.repair else "")


def write_card(about: Mapping, drift: Mapping[TrialConfig, float], choice: TrialConfig, merged: bool) -> str:
    """The card as Markdown.

    Args:
        about: what `recipe.json` says.
        drift: of every setting that was tried, on the images that choices were made on.
        choice: the setting that was chosen.
        merged: whether the picture shows merged patches.
    """
    shown = MERGED[0].upper() + MERGED[1:] if merged else "Patches that were dropped are grey"
    parts = [
        f"# {literal(about['model']['name'])}, pruned to {about['budget']}",
        f"Made by `{about['command']}` on {about['date']}, patchrank {about['versions']['patchrank']}.",
        f"![Images above what is left of them]({PAIRS})",
        f"*Above: images as the model sees them. Below: what is left at its end. {shown}.*",
        _figures(about),
        _use(about),
        _how(about, choice),
        f"![Drift of each setting that was tried]({TRIES})",
        _tried(drift),
    ]
    if about["credit"]:
        parts.append(about["credit"])
    return "\n\n".join(parts) + "\n"


def _figures(about: Mapping) -> str:
    found, speed = about["figures"], about["figures"]["hardware"]
    device = speed["gpu"] or f"{speed['cpu']}, {plural(speed['threads'], 'thread')}"
    faster = f"{found['ms']:.2f}, unpruned {found['ms_unpruned']:.2f}: {found['speedup']:.2f} times as fast"
    lines = [
        ["multiply-accumulates of an image", macs_line(found)[1]],
        ["patches left at the end", f"{found['n_kept']} of {found['n_tokens']}"],
        ["milliseconds of an image here", faster + remark(about)],
        ["drift, 1000 (1 - cosine) to the unpruned embedding", f"{1000 * found['drift']:.3g}"],
        ["the same, 95 % of the images are below", f"{1000 * found['drift_p95']:.3g}"],
    ]
    lines += [[label, f"{found[key]:.2f} %"] for key, label in LABELS.items() if key in found]
    note = (
        f"Measured on {found['n_images']:,} images that nothing was fitted to or chosen on. Milliseconds: medians in "
        f"batches of {found['batch_size']}, in turns with the unpruned model, on {literal(device)}, torch "
        f"{about['versions']['torch']}. Nearest images: queries are pruned, the index is not."
    )
    return "## What was measured\n\n" + table(["figure", "value"], lines) + "\n\n" + note


def remark(about: Mapping) -> str:
    """What must be said of a model that is no faster, or misses its budget, where it was measured; else nothing."""
    if not about["within_budget"]:
        return f" (over the budget of {about['budget']}: this machine is noisy, or slower now; try a smaller one)"
    slower = about["figures"]["speedup"] < 1
    return " (slower than unpruned here: try a larger --batch-size, or a budget in milliseconds)" if slower else ""


def _use(about: Mapping) -> str:
    given, name = about["given"], about["given"]["model"].partition(":")[2]
    kind, repair = about["given"]["model"].partition(":")[0], about["repair"]
    made = {
        "timm": ["import timm", f"model = timm.create_model({name!r}, pretrained=True)"],
        "hf": ["import transformers", f"model = transformers.AutoModel.from_pretrained({name!r})"],
        "open_clip": ["import open_clip", 'model = open_clip.create_model("local-dir:FOLDER")  # not pruned yet'],
    }.get(kind, [])
    lines = ["import patchrank", *made, 'patchrank.prune(model, "FOLDER")  # a model of these weights, in place']
    if about["entry"]:
        more = f', repair_path="FOLDER/{repair}"' if repair else ""
        lines += ["", "import timm", f'model = timm.create_model("local-dir:FOLDER", pretrained=True{more})']
    size = " x ".join(map(str, about["img_size"]))
    notes = f"`FOLDER` is where this card lies. Images have {size} pixels."
    if given["checkpoint"]:
        notes += f" The weights are those of {literal(str(given['checkpoint']))}."
    return f"## How to use it\n\n{notes}\n\n```python\n" + "\n".join(lines) + "\n```"


def _how(about: Mapping, choice: TrialConfig) -> str:
    images, pruning = about["images"], about["pruning"]
    counts = [(count, layer) for layer, count in zip(pruning["locations"], pruning["drop_counts"]) if count]
    lines = [
        "## How it was made\n",
        f"Chosen: {name_of(choice)} (`{choice.pruning.reducer}`); of {about['figures']['n_tokens']} patches leave "
        + listed(f"{count} at layer {layer}" for count, layer in counts)
        + ".",
    ]
    if about["predictor"]:
        lines.append(f"Its predictor was fitted to golden scores of {images['train']:,} images.")
    if about["repair"]:
        lines.append(f"Its repair was solved on {images['train']:,} images.")
    lines.append(
        f"The choice among settings was made on {images['val']:,} other images, by drift. No label was read for it."
    )
    return "\n".join([*lines, f"`{NAME}` has all settings and figures."])


def _tried(drift: Mapping[TrialConfig, float]) -> str:
    best = sorted(drift, key=drift.__getitem__)[:BEST]
    lines = [[name_of(each), _layers(each), f"{1000 * drift[each]:.3g}"] for each in best]
    more = f"The best {len(best)} of {len(drift)} settings that were tried, on the images that the choice was made on:"
    return more + "\n\n" + table(["method", "layers", "drift"], lines, texts=2)


def _layers(trial: TrialConfig) -> str:
    pruning: Sequence[int] = trial.pruning.locations
    text = ", ".join(map(str, pruning))
    taper = "" if trial.pruning.taper == 1 else f"; taper {trial.pruning.taper:g}"
    weight = "" if trial.pruning.protection is None else f"; protection {trial.pruning.protection:g}"
    share = "" if not trial.pruning.drop_share else f"; {100 * trial.pruning.drop_share:g} % of them dropped"
    return text + taper + weight + share
