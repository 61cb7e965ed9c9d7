"""What a recipe says before it begins: how much there is to do, and about how long it takes."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence

import torch

from patchrank.benchmark import WARM_UP
from patchrank.golden.make_shards import report_faults
from patchrank.recipe.budget import GUESSES, REPEATS
from patchrank.recipe.candidates import NEIGHBOURS, PROTECTIONS, first_round
from patchrank.recipe.measured import REPEATS as REPEATS_OF_CARD
from patchrank.recipe.tries import FINALISTS, REPAIRED, Tries
from patchrank.trial.forecast import Work, count_shards, count_trial, time_batch
from patchrank.trial.requirements import ResolvedTrial, TrialContext
from patchrank.utils.errors import UserError

LATER = FINALISTS * (len(NEIGHBOURS) + len(PROTECTIONS)) + REPAIRED  # settings that are tried after the first ones
PARTS = ("fitting", "choices", "the card")


def print_forecast(tries: Tries, images: Mapping[str, int]) -> None:
    """Counts what is missing, times one batch, and prints one line. Writes nothing.

    Raises:
        UserError: no method comes down to the budget.
    """
    tower = tries.inputs.clip.visual
    trials = tries.trials_of(map(tries.settler.rough, first_round(tower)))
    if not trials:
        raise UserError(f"--budget {tries.settler.budget}: no method comes down to it on this model; try a larger one")
    contexts = [TrialContext(ResolvedTrial(trial), tries.inputs, tries.shards) for trial in trials]
    scoring, trying = _count(contexts)
    device, threads = tries.inputs.clip.logit_scale.device.type, torch.get_num_threads()
    per_mac, per_image = time_batch(contexts[0], device, threads)
    count = len(trials) + LATER
    macs = scoring.macs + trying.macs * count / len(trials) + _timing_macs(tries, count)
    minutes = (macs * per_mac + (scoring.images_read + trying.images_read) * per_image) / 60
    parts = ", ".join(f"{number:,} for {what}" for number, what in zip(images.values(), PARTS))
    print(
        f"recipe: images: {parts}; {scoring.forwards:,} windows to score, at most {count} settings to try: about "
        f"{max(1, round(minutes))} min here if none was tried before, an estimate from one batch that was timed. "
        "Stop it whenever you like: run again, it goes on",
        file=sys.stderr,
        flush=True,
    )


def _count(contexts: Sequence[TrialContext]) -> tuple[Work, Work]:
    """The work of scoring patches, of which only what is missing counts, and of trying settings."""
    scoring, trying, seen = Work(), Work(), set()
    for context in contexts:
        for _, folder in context.needed_shards.values():
            if folder.key not in seen and (faults := folder.faults()):
                report_faults(folder, faults)
                count_shards(folder, faults, context, scoring)
            seen.add(folder.key)
        count_trial(context, 0, trying)
    return scoring, trying


def _timing_macs(tries: Tries, count: int) -> int:
    """MACs of all measurements of milliseconds, each in turns with the whole tower."""
    budget = tries.settler.budget
    turns = REPEATS_OF_CARD + WARM_UP
    turns += 0 if budget.milliseconds is None else count * GUESSES * (REPEATS + WARM_UP)
    return 2 * turns * budget.batch_size * tries.inputs.clip.visual.macs_unpruned().image
