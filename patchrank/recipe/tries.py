"""Trials of settings, and the choice among them by drift on images that nothing was fitted to."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from torch import nn

from patchrank.config import MIN_REPAIR_IMAGES, PruningConfig, RepairConfig, TrialConfig
from patchrank.io import join, read_json
from patchrank.recipe.budget import Settler
from patchrank.recipe.candidates import first_round, other_schedules, other_weights, what_runs
from patchrank.trial.identity import trial_id
from patchrank.trial.inputs import Inputs
from patchrank.trial.requirements import ResolvedTrial, TrialContext
from patchrank.trial.run import run_trial
from patchrank.utils.errors import UserError
from patchrank.utils.progress import progress, write_line

SWEEP = "recipe"  # the name that records carry
FINALISTS = 2  # methods whose settings are tried further
REPAIRED = 3  # settings that a repair is solved for

Variants = Callable[[nn.Module, PruningConfig], list[PruningConfig]]


@dataclass
class Tries:
    """What was tried, and how far each setting drifts.

    base: a trial that all others differ from in pruning and repair alone.
    inputs: model and data of all of them; test images are not among these.
    settler: knows what each setting must keep to.
    work: folder or URL of records, golden shards, predictors and repairs.
    drift: 1 - cosine to the unpruned embedding, mean over the images that choices are made on.
    """

    base: TrialConfig
    inputs: Inputs
    settler: Settler
    work: str
    quiet: bool = False
    drift: dict[TrialConfig, float] = field(default_factory=dict)

    @property
    def shards(self) -> str:
        return join(self.work, "shards")

    def run(self, trials: Iterable[TrialConfig], what: str) -> None:
        """Runs those that nothing was tried of yet which does the same."""
        tower = self.inputs.clip.visual
        known = {(what_runs(tower, trial.pruning), trial.repair) for trial in self.drift}
        new = [trial for trial in trials if (what_runs(tower, trial.pruning), trial.repair) not in known]
        for trial in progress(new, desc=f"recipe: {what}", unit="setting", delay=0, disable=self.quiet):
            self.drift[trial] = 1 - self._record(trial)["metrics"]["val_cosine"]

    def trials(self, settings: Iterable[PruningConfig]) -> list[TrialConfig]:
        """Trials of the settings that this tower can run within the budget."""
        untimed = self.quiet or self.settler.budget.share is not None
        settings = progress(list(settings), desc="recipe: milliseconds", unit="setting", delay=0, disable=untimed)
        return self.trials_of(map(self.settler.settle, settings))

    def trials_of(self, settings: Iterable[PruningConfig | None]) -> list[TrialConfig]:
        """Trials of settings that are not None, one of those that do the same."""
        tower, found = self.inputs.clip.visual, {}
        for each in settings:
            if each is not None:
                found.setdefault(what_runs(tower, each), each)
        return [self.base.model_copy(update={"pruning": each}) for each in found.values()]

    def best(self, trials: Iterable[TrialConfig]) -> TrialConfig:
        return min(trials, key=self.drift.__getitem__)

    def best_of_methods(self) -> list[TrialConfig]:
        """The best setting of each method, the best method first."""
        found: dict[tuple, TrialConfig] = {}
        for trial in sorted(self.drift, key=self.drift.__getitem__):
            found.setdefault(method_of(trial), trial)
        return list(found.values())

    def refine(self, method: tuple, variants: Variants, what: str) -> None:
        """Tries variants of the best setting of a method."""
        best = self.best(trial for trial in self.drift if method_of(trial) == method and trial.repair is None)
        self.run(self.trials(variants(self.inputs.clip.visual, best.pruning)), what)

    def repair(self) -> None:
        """Tries repairs of the best settings, where there are images enough to solve one."""
        images = len(self.inputs.split(self.base.data.tasks[0], "train"))
        if images < MIN_REPAIR_IMAGES:
            write_line(
                f"recipe: repairs are left out: they need {MIN_REPAIR_IMAGES} training images, there are {images}"
            )
            return
        few = sorted(self.drift, key=self.drift.__getitem__)[:REPAIRED]
        self.run([each.model_copy(update={"repair": RepairConfig(images=images)}) for each in few], "repairs")

    def _record(self, trial: TrialConfig) -> dict:
        resolved = ResolvedTrial(trial)
        identity = trial_id(TrialContext(resolved, self.inputs))
        known = read_json(join(self.work, "trials", f"{identity}.json"))
        if known is not None and known.get("id") == identity:
            return known
        return run_trial(resolved, self.inputs, self.work, self.shards, SWEEP, quiet=True)


def choose(tries: Tries) -> TrialConfig:
    """The setting that drifts least: of all methods first, then of the best methods' variants, then with repairs.

    Raises:
        UserError: no method keeps to the budget.
    """
    tries.run(tries.trials(first_round(tries.inputs.clip.visual)), "methods")
    if not tries.drift:
        raise UserError(f"--budget {tries.settler.budget}: no method is fast enough here; try a larger one")
    for method in [method_of(trial) for trial in tries.best_of_methods()[:FINALISTS]]:
        tries.refine(method, other_schedules, "layers")
        tries.refine(method, other_weights, "weights")
    tries.repair()
    return tries.best(tries.drift)


def method_of(trial: TrialConfig) -> tuple:
    """What tells methods apart: who ranks, and what becomes of the others."""
    return trial.pruning.reducer, trial.pruning.leftovers
