"""How much an image may cost: a share of the tower's multiply-accumulates, or milliseconds on this machine."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import torch
from torch import nn

from patchrank import benchmark
from patchrank.config import BenchmarkConfig, PruningConfig
from patchrank.io import content_id, join, read_json, write_json
from patchrank.models.clip import Clip
from patchrank.recipe.candidates import runs
from patchrank.utils.device import hardware
from patchrank.utils.errors import UserError

REPEATS = 7  # runs of each tower that count, in one measurement
GUESSES = 4  # shares of the MACs that are timed for one setting
SPARE = 0.02  # of the time, left free since machines are noisy
VERSION = 1  # of the search for a share; bump it when it would find another


@dataclass(frozen=True)
class Budget:
    """One of the two is set: share of the MACs, or milliseconds of an image in batches of `batch_size`."""

    share: float | None = None
    milliseconds: float | None = None
    batch_size: int = BenchmarkConfig().batch_size

    def __str__(self) -> str:
        return f"{100 * self.share:g} % of the MACs" if self.share is not None else f"{self.milliseconds:g} ms an image"

    def is_kept_by(self, milliseconds: float) -> bool:
        """Whether a measured time is within the budget; a share of the MACs says nothing of it."""
        return self.milliseconds is None or milliseconds <= self.milliseconds


def read_budget(text: str) -> Budget:
    """`0.6`, `60%` or `12ms`, for argparse. Raises its error for what is none of these, or cannot be kept to."""
    number, kind = text.strip().lower(), ""
    for end in ("ms", "%"):
        if number.endswith(end):
            number, kind = number.removesuffix(end).strip(), end
    try:
        value = float(number)
    except ValueError:
        value = float("nan")
    share = value / 100 if kind == "%" else value
    if kind == "ms" and 0 < value < float("inf"):
        return Budget(milliseconds=value)
    if kind != "ms" and 0 < share < 1:
        return Budget(share=share)
    what = "should be a share of the MACs between 0 and 1, such as 0.6, or milliseconds of an image, such as 12ms"
    raise argparse.ArgumentTypeError(f"{what}, but is {text!r}")


class Settler:
    """Gives settings the budget that they are to keep to, and leaves out those that cannot.

    Args:
        clip: the pair or tower, unpruned.
        work: folder or URL; what was timed is kept there, so that a second run tries the same settings.
    """

    def __init__(self, clip: Clip, budget: Budget, work: str):
        self.clip, self.budget, self.work = clip, budget, join(work, "budgets")
        self.known: dict[PruningConfig, PruningConfig | None] = {}
        self.unpruned = 0.0 if budget.share is not None else self._unpruned()

    def settle(self, pruning: PruningConfig) -> PruningConfig | None:
        """The settings with their budget; None where this tower cannot run them within it."""
        key = pruning.model_copy(update={"budget": None})
        if key not in self.known:
            share = self.budget.share if self.budget.share is not None else self._timed(key)
            found = None if share is None else key.model_copy(update={"budget": share})
            self.known[key] = found if found is not None and runs(self.clip.visual, found) else None
        return self.known[key]

    def rough(self, pruning: PruningConfig) -> PruningConfig | None:
        """The settings with about their budget, as if time went with the MACs; None where they cannot run."""
        share = self.budget.share
        share = round(self.budget.milliseconds / self.unpruned, 3) if share is None else share
        found = pruning.model_copy(update={"budget": share})
        return found if runs(self.clip.visual, found) else None

    def _unpruned(self) -> float:
        """Milliseconds of the whole tower. Raises `UserError` where it keeps to the budget as it is."""
        record = self._kept({"of": "unpruned"}, lambda: benchmark.measure(self.clip, self.budget.batch_size)["ms"])
        if record <= self.budget.milliseconds:
            raise UserError(
                f"--budget {self.budget.milliseconds:g}ms: the whole tower takes {record:.1f} ms here, in batches of "
                f"{self.budget.batch_size}, so nothing has to leave; try a smaller one"
            )
        return record

    def _timed(self, pruning: PruningConfig) -> float | None:
        """The largest share of the MACs found with which settings are fast enough; None where there is none."""
        return self._kept({"of": pruning.model_dump()}, lambda: self._search(pruning))

    def _search(self, pruning: PruningConfig) -> float | None:
        wanted = self.unpruned / (self.budget.milliseconds * (1 - SPARE))  # as a speed-up, which noise changes less
        share, best = 1 / wanted, None
        for _ in range(GUESSES):
            share = round(min(share, 0.99), 3)
            found = pruning.model_copy(update={"budget": share})
            if share <= 0 or not runs(self.clip.visual, found):
                return best
            speedup = self._speedup(found)
            best = max(best or 0.0, share) if speedup >= wanted else best
            share *= min(1.0, speedup / wanted) - SPARE if speedup < wanted else speedup / wanted
        return best

    @torch.inference_mode()
    def _speedup(self, pruning: PruningConfig) -> float:
        """How many times as fast as the whole tower; predictors need no weights for that."""
        tower: nn.Module = self.clip.visual
        with tower.restoring():
            tower.set_pruning(predictor_path=None, predictor_init="random", **pruning.model_dump())
            return benchmark.measure(tower, self.budget.batch_size, REPEATS)["speedup"]

    def _kept(self, about: dict, measure) -> float | None:
        """A figure by all that it depends on, measured where nobody has yet."""
        device = str(self.clip.logit_scale.device)
        about |= {"version": VERSION, "model": self.clip.name, "hardware": hardware(device), **vars(self.budget)}
        about |= {"grid": self.clip.visual.patch_embed.grid_size, "dtype": str(self.clip.logit_scale.dtype)}
        path = join(self.work, f"{content_id(about)[:16]}.json")
        record = read_json(path)
        if record is None or "value" not in record:
            record = {"value": measure(), "about": about}
            write_json(path, record)
        return record["value"]
