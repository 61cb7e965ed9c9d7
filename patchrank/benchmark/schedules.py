"""How many tokens each method of a table drops, and where, so that methods can be compared."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from patchrank.layers.reducers import REDUCERS
from patchrank.layers.schedule import tapered
from patchrank.utils.errors import UserError

PAPER_COUNT, PAPER_PATCHES = 80, 196  # tokens that leave CLIP B/16: 20 at each of four locations (tables 4 and 5)
PAPER_RATE = 0.6  # what the paper calls the share that is left, taken for towers of another number of patches
MERGE = "+merge"  # end of the name of a ranking whose leftovers merge
# EViT's authors keep the same share at each of three layers (sweeps/methods.yaml): at the MACs of the paper's schedule
# 0.85 times as many tokens leave at each of them as at the one before.
EVIT = {"locations": (4, 7, 10), "taper": 0.85}


@dataclass(frozen=True)
class Asked:
    """What a table's flags say of schedules; None for what they do not say.

    keep_rates: of every method, one after the other.
    drop_counts: of rankings that drop; all other methods run at the same MACs.
    budget: share of the unpruned tower's MACs that every method keeps to.
    locations: of every method.
    align: of what sequences are a multiple, in every method.
    """

    keep_rates: tuple[float, ...] | None = None
    drop_counts: tuple[int, ...] | None = None
    budget: float | None = None
    locations: tuple[int, ...] | None = None
    align: int = 1

    def __post_init__(self):
        named = [name for name in ("keep_rates", "drop_counts", "budget") if getattr(self, name) is not None]
        if len(named) > 1:
            flags = " and ".join(f"--{name.replace('_', '-')}" for name in named)
            raise UserError(f"{flags} exclude each other in a table of methods; try one of them")

    @property
    def title(self) -> str:
        """What a table of such schedules is called."""
        where = ""
        if self.locations is not None:
            where = f" at layer{'s' * (len(self.locations) > 1)} {', '.join(map(str, self.locations))}"
        if self.align > 1:
            where += f", sequences a multiple of {self.align} long (align)"
        if self.keep_rates is not None:
            return f"Methods at keep rates {', '.join(f'{rate:g}' for rate in self.keep_rates)}{where}"
        if self.budget is not None:
            return f"Methods at {100 * self.budget:g} % of the MACs{where}"
        if self.drop_counts is not None:
            return f"Methods at the MACs of {', '.join(map(str, self.drop_counts))} tokens dropped{where}"
        return f"Methods at the MACs of the paper's schedule{where}"


def shared_copy(tower: nn.Module) -> nn.Module:
    """A tower with pruning of its own, whose layers and weights are those of `tower`, not copies."""
    parts = *tower.children(), *tower.parameters(), *tower.buffers()
    return copy.deepcopy(tower, {id(part): part for part in parts})  # what the memo knows is taken as it is


def pruned_copies(
    base: nn.Module, name: str, asked: Asked, budget: float | None
) -> Iterator[tuple[float | None, nn.Module]]:
    """For each schedule that a method is to have: the keep rate, if one was asked for, and a tower that shares weights.

    Args:
        base: an unpruned tower of ours.
        name: a reducer, perhaps with `MERGE` at its end.
        budget: what `common_budget` says.

    Raises:
        UserError: a schedule that the tower or the method does not allow.
    """
    reducer = name.removesuffix(MERGE)
    settings = {"reducer": reducer, "leftovers": "merge" if name.endswith(MERGE) else None}
    settings |= {"align": asked.align}
    if asked.keep_rates is not None:
        for rate in asked.keep_rates:
            yield rate, _pruned(base, settings | {"keep_rate": rate}, asked.locations)
    elif asked.budget is None and _drops_before_layers(name):
        yield None, _pruned(base, settings | _reference(base, asked), asked.locations)
    else:
        own = _of_authors(reducer, len(base.blocks)) if asked.locations is None else {}
        places = own.pop("locations", asked.locations)
        yield None, _pruned(base, settings | own | {"budget": budget}, places)


def common_budget(base: nn.Module, asked: Asked) -> float | None:
    """The share of the unpruned tower's MACs that all methods keep to; None where keep rates were asked for.

    It is what ranking by a predictor costs at the reference schedule, where flags say nothing else.
    """
    if asked.keep_rates is not None or asked.budget is not None:
        return asked.budget
    settings = {"reducer": "predictor", "align": asked.align}
    tower = _pruned(base, settings | _reference(base, asked), asked.locations)
    return tower.macs().image / tower.macs_unpruned().image


def _drops_before_layers(name: str) -> bool:
    """Whether a method is of the paper's kind: it ranks before a layer, and drops what it does not keep."""
    kind = REDUCERS[name.removesuffix(MERGE)]
    return not kind.merges and kind.site == "before" and not name.endswith(MERGE)


def _reference(base: nn.Module, asked: Asked) -> dict:
    """The schedule of rankings that drop: as flags say, or the paper's."""
    if asked.drop_counts is not None:
        return {"drop_counts": asked.drop_counts}
    places = asked.locations or base.pruning.locations
    if base.num_patches == PAPER_PATCHES and asked.align == 1:  # counts say themselves what leaves
        return {"drop_counts": tapered(PAPER_COUNT, len(places))}
    return {"keep_rate": PAPER_RATE}


def _of_authors(reducer: str, depth: int) -> dict:
    """Locations and taper as the authors of a method choose them; {} where they choose none."""
    if reducer == "tome":  # every layer; after the last one nothing reads patches
        return {"locations": tuple(range(1, depth))}
    if reducer in ("evit", "evit_norm", "evit_drop") and depth > EVIT["locations"][-1]:
        return dict(EVIT)
    return {}


def _pruned(base: nn.Module, settings: dict, locations: tuple[int, ...] | None) -> nn.Module:
    """A tower that shares its weights with `base`; its predictor's weights are random, which changes no time.

    A reducer that merges in pairs takes half of the tokens at a location at the most. Where it cannot take what is
    asked for, it gets more locations: consecutive layers from the first on, as few as do.

    Raises:
        UserError: no number of locations does.
    """
    places, depth = locations or base.pruning.locations, len(base.blocks)
    choices = [places]
    if REDUCERS[settings["reducer"]].merges and "drop_counts" not in settings:
        choices += [tuple(range(places[0], last + 1)) for last in range(places[0] + 1, depth)]
    for chosen in choices:
        tower = shared_copy(base)
        try:
            tower.set_pruning(predictor_init="random", **settings | {"locations": chosen})
            return tower
        except UserError as error:
            problem = error
    raise problem
