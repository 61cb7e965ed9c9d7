"""Content ids of trials: each names a result by all that it depends on, and by nothing else.

Two more ids belong to stages that also run without trials: a folder of shards is named by
`golden.shards.ShardFolder.key`, a file of prompts by `prompt.tuning.run_id`.
"""

from __future__ import annotations

from collections.abc import Sequence

from patchrank import benchmark, evaluate, fit
from patchrank.config import BenchmarkConfig
from patchrank.config.canonical import FIRST, canonical
from patchrank.golden import scores
from patchrank.io import content_id
from patchrank.models.pruning_cfg import canonical_pruning
from patchrank.prompt import tuning
from patchrank.trial.inputs import PARTS
from patchrank.trial.requirements import ResolvedTrial, TrialContext

SCHEMA = 1  # of records, of trials and of speeds
VERSIONS = {"golden": scores.VERSION, "fit": fit.VERSION, "evaluate": evaluate.VERSION}
PLACES = (("model", "checkpoint"), ("data", "root"), ("data", "vocabulary"))  # what lies there is fingerprinted instead


def trial_id(context: TrialContext) -> str:
    """Names a trial, and its record."""
    settings = canonical(context.trial.config)
    settings["pruning"] = canonical_pruning(context.trial.config.pruning)
    for section, key in PLACES:
        del settings[section][key]
    settings["prompt"] = None  # the fingerprint has what is left of it once a preset has filled it in
    versions = VERSIONS | ({"prompt": tuning.VERSION} if context.trial.learns else {})
    return content_id({"schema": SCHEMA, "trial": settings, **fingerprint(context), "versions": versions})


def fingerprint(context: TrialContext) -> dict[str, str]:
    """Of all weights and images that a trial reads; computed once for all trials of the same inputs."""
    trial, known = context.trial, context.inputs.fingerprints
    key = trial.all_tasks, (trial.config.prompt, trial.config.seed) if trial.learns else None
    if key not in known:
        # of the images of all tasks; where trials do not look at test, neither does this
        parts = [part for part, count in PARTS.items() if getattr(context.inputs.data, count) != 0]
        splits = [context.inputs.split(task, part) for task in trial.all_tasks for part in parts]
        about = [[split.ids_sha256(), split.labels, split.classes, split.templates] for split in splits]
        # groups that files tell are data; those of scenes stand in their ids, and other images have none
        about += [[split.groups] for split in splits if split.unit == "group"]
        known[key] = {"model": context.inputs.sha256, "data": content_id(about)}
        if trial.learns:  # the images that prompts are tuned on, and how, what a preset fills in among it
            splits = [context.lessons(task) for task in trial.tasks]
            images = [[split.ids_sha256(), split.labels, split.classes] for split in splits]
            recipes = [tuning.recipe(recipe) for recipe in context.recipes.values()]
            known[key]["lessons"] = content_id([images, recipes])
    return known[key]


def ranker_id(trial: ResolvedTrial, shards: Sequence[str]) -> str:
    """Names what a trial fits to some folders of shards, which are given by their keys."""
    settings = {"name": "prior"}
    if trial.ranker.name != "prior":
        settings = canonical(trial.config.predictor, "predictor") | {"seed": trial.config.seed}
        del settings["fit_on"]  # the shards say it
    return content_id([list(shards), trial.config.golden.metric, trial.location, settings, fit.VERSION])[:16]


def speed_settings(trial: ResolvedTrial) -> dict:
    """What of a trial decides how long an image takes, and nothing else: no weights, data, seed or way of fitting."""
    pruning, predictor, prompts = None, None, None
    if trial.prunes:
        pruning = canonical_pruning(trial.config.pruning)
        pruning.pop("protection", None)  # a weight takes no time
        if pruning["drop_counts"] is not None or "budget" in pruning:
            del pruning["keep_rate"]  # which they win over
        if trial.ranks_by_predictor:
            predictor = {"name": trial.predictor.name, **trial.predictor.shape}
    if trial.learns_visual:  # text is embedded once, whatever prompts it has
        prompt = canonical(trial.config.prompt, "prompt")
        counted = ("mode", "loss", "preset", "words") if prompt["num_tokens"] is None else ("num_tokens",)
        without_effect = FIRST["prompt"] - {*counted, "norm_gains"}
        prompts = {key: value for key, value in prompt.items() if key not in without_effect}
    size = {} if (side := trial.config.model.img_size) is None else {"img_size": side}
    settings = {"model": trial.config.model.name, "pruning": pruning, "predictor": predictor, "prompts": prompts}
    return settings | size


def speed_id(trial: ResolvedTrial, hardware: dict, settings: BenchmarkConfig) -> str:
    """Names a measurement of milliseconds; trials that differ in what changes no time share it."""
    what = {"settings": speed_settings(trial), "hardware": hardware, "benchmark": settings.model_dump()}
    return content_id(what | {"schema": SCHEMA, "version": benchmark.VERSION})
