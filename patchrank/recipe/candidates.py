"""Settings that the recipe tries: who ranks, what becomes of the others, and at which layers they leave."""

from __future__ import annotations

from typing import NamedTuple

from torch import nn

from patchrank.config import PruningConfig
from patchrank.utils.errors import UserError

DEPTH = 12  # layers below are of so many, and stand for the same share of a tower of another depth


class Schedule(NamedTuple):
    """Layers at which tokens leave, the first and the last of twelve, the step between two, and the taper of a step."""

    first: int
    last: int
    step: int = 1
    taper: float = 1.0

    def settings(self, depth: int) -> dict[str, object]:
        """The fields of `PruningConfig` in a tower of `depth` layers. Where layers are more, a step's share is less."""
        first, last = (min(depth, max(1, round(place * depth / DEPTH))) for place in (self.first, self.last))
        step = 1 if self.step == 1 else max(1, round(self.step * depth / DEPTH))
        last = max(first, min(last, depth - 1))
        taper = self.taper ** (DEPTH / depth) if self.step == 1 else self.taper
        return {"locations": tuple(range(first, last + 1, step)), "taper": round(taper, 3)}


EARLY, LONG, SPREAD, ONCE = Schedule(3, 7, 1, 0.6), Schedule(2, 11, 1, 0.8), Schedule(4, 10, 2, 0.7), Schedule(4, 4)
# Those that were best for some method at 55 to 75 % of the MACs in search_spaces/methods.yaml.
METHODS: tuple[tuple[dict, tuple[Schedule, ...]], ...] = (
    ({"reducer": "rank_merge"}, (EARLY, LONG)),
    ({"reducer": "guided_merge"}, (EARLY, LONG)),
    ({"reducer": "attention_merge"}, (EARLY, LONG)),
    ({"reducer": "feature_merge"}, (EARLY, LONG)),
    ({"reducer": "predictor", "leftovers": "merge"}, (SPREAD, ONCE)),
    ({"reducer": "predictor", "leftovers": "drop"}, (SPREAD, ONCE)),
    ({"reducer": "tome"}, (SPREAD, LONG)),
    ({"reducer": "diffrate", "drop_share": 0.25}, (ONCE,)),
    ({"reducer": "diffrate", "drop_share": 0.5}, (ONCE,)),
    ({"reducer": "cls_attention", "leftovers": "drop"}, (ONCE,)),
)
NEIGHBOURS = (
    *(Schedule(first, 7, 1, taper) for first in (2, 3, 4) for taper in (0.6, 0.8)),
    *(Schedule(first, 11, 1, taper) for first in (2, 3) for taper in (0.6, 0.8)),
    *(Schedule(4, last, 2, taper) for last in (8, 10) for taper in (0.5, 1.0)),
)
PROTECTIONS = (0.3, 0.5, 0.8, 1.2, 2.0)  # weights of importance in matching
DROP_SHARES = (0.1, 0.25, 0.5)
PROTECTED = ("rank_merge", "guided_merge", "attention_merge")  # methods whose matching has such a weight


def first_round(tower: nn.Module) -> list[PruningConfig]:
    """Every method at its usual schedules."""
    depth = len(tower.blocks)
    return [
        PruningConfig(**method, **schedule.settings(depth)) for method, schedules in METHODS for schedule in schedules
    ]


def other_schedules(tower: nn.Module, best: PruningConfig) -> list[PruningConfig]:
    """The method of a setting at other schedules."""
    depth = len(tower.blocks)
    return [best.model_copy(update=schedule.settings(depth)) for schedule in NEIGHBOURS]


def other_weights(tower: nn.Module, best: PruningConfig) -> list[PruningConfig]:
    """A setting with other weights of importance, or with other shares dropped, where its method has these."""
    if best.reducer in PROTECTED:
        return [best.model_copy(update={"protection": each}) for each in PROTECTIONS]
    if best.reducer == "diffrate" or best.leftovers == "merge":
        return [best.model_copy(update={"drop_share": each}) for each in DROP_SHARES]
    return []


def runs(tower: nn.Module, pruning: PruningConfig) -> bool:
    """Whether settings fit a tower, and let anything leave."""
    with tower.restoring():
        try:
            tower.set_pruning(predictor_path=None, predictor_init="random", **pruning.model_dump())
        except UserError:  # it ranks by a class token that there is none of, or cannot come down to the budget
            return False
        return tower.pruner is not None


def what_runs(tower: nn.Module, pruning: PruningConfig) -> tuple:
    """All that decides on what settings do to a tower: settings of which it is the same do the same."""
    with tower.restoring():
        tower.set_pruning(predictor_path=None, predictor_init="random", **pruning.model_dump())
        reducer = tower.pruner.reducer
        weight = getattr(reducer, "protection", None)
        return (
            pruning.reducer, pruning.leftovers, pruning.metric, pruning.drop_share, weight,
            pruning.locations[0], tuple(tower.pruner.drops.items()),
        )  # fmt: skip
