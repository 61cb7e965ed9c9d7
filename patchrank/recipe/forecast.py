"""What a recipe says before it begins: how much there is to do, and about how long it takes."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence

import torch

from patchrank.config import TrialConfig
from patchrank.golden.make_shards import report_faults
from patchrank.recipe.candidates import NEIGHBOURS, PROTECTIONS
from patchrank.recipe.tries import FINALISTS, REPAIRED, Tries
from patchrank.trial.forecast import Work, count_shards, count_trial, time_batch
from patchrank.trial.requirements import ResolvedTrial, TrialContext

LATER = FINALISTS * (len(NEIGHBOURS) + len(PROTECTIONS)) + REPAIRED  # settings that are tried after the first ones


def print_forecast(tries: Tries, trials: Sequence[TrialConfig], images: Mapping[str, int]) -> None:
    """Counts what is missing, times one batch, and prints one line. Writes nothing."""
    work, seen = Work(), set()
    contexts = [TrialContext(ResolvedTrial(trial), tries.inputs, tries.shards) for trial in trials]
    for context in contexts:
        for _, folder in context.needed_shards.values():
            if folder.key not in seen and (faults := folder.faults()):
                report_faults(folder, faults)
                count_shards(folder, faults, context, work)
            seen.add(folder.key)
    windows = work.forwards
    for context in contexts:
        count_trial(context, 0, work)
    device, threads = tries.inputs.clip.logit_scale.device.type, torch.get_num_threads()
    per_mac, per_image = time_batch(contexts[0], device, threads)
    minutes = (work.macs * per_mac + work.images_read * per_image) / 60
    for_what = ("fitting", "choices", "the card")
    parts = ", ".join(f"{count:,} for {name}" for name, count in zip(for_what, images.values()))
    print(
        f"recipe: images: {parts}; {windows:,} windows to score, about {len(trials) + LATER} settings to try: "
        f"about {max(1, round(minutes))} min here, an estimate from one batch that was timed. Stop it whenever you "
        "like: run again, it goes on",
        file=sys.stderr,
        flush=True,
    )
