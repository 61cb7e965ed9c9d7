"""Pruning settings of a tower, and the reducer that they ask for."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from pydantic import model_validator
from torch import Tensor, nn

from patchrank.config import DEFAULTS, PruningConfig, Seed
from patchrank.config.canonical import canonical
from patchrank.layers.class_token import can_skip_rows
from patchrank.layers.macs import Macs, vision_macs
from patchrank.layers.predictors import (
    UNFILLED,
    awaits_weights,
    check_location,
    create_awaiting,
    create_predictor,
    load_predictor,
)
from patchrank.layers.prunable import check_prunable
from patchrank.layers.pruning_block import PruningBlock
from patchrank.layers.reducers import REDUCERS, Reducer, create_reducer
from patchrank.layers.schedule import aligned, budget_schedule, check_locations, clipped, drop_schedule, tapered
from patchrank.utils.errors import UserError, near
from patchrank.utils.plain import plain

LEFTOVERS = ("drop", "merge")
MERGING = ("metric", "protection", "drop_share")  # settings that some reducers read, and others only to merge leftovers
OFF = {"keep_rate": 1.0, "budget": None, "drop_counts": None}  # settings by which nothing leaves
RECORD = ("name", "kwargs", "grid", "embed_dim", "location")  # of a predictor whose weights come with a checkpoint


class Pruning(PruningConfig):
    """Pruning settings; the keyword arguments of every entrypoint and of `set_pruning`.

    keep_rate: share of patch tokens left after the last location; 1 is the plain tower, bit for bit.
    locations: layers, counted from 1, just before which tokens leave.
    drop_counts: how many leave at each location; wins over `budget` and `keep_rate`.
    reducer: who decides, by registered name.
    leftovers: what becomes of the others: `drop`, which is usual, or `merge`, each into its most similar one that
        stays. Reducers that merge by a rule of their own refuse either.
    budget: share of the unpruned tower's MACs to stay within, ranking and matching included; wins over `keep_rate`.
    taper: what leaves at a location as a share of what left at the one before; 1 for equal counts.
    align: the sequence behind each location, class, register and prompt tokens included, is a multiple of this long, as
        hardware likes; the nearest one of the keep rate's, or within the budget. `drop_counts` go without.
    metric: what tokens are compared by to merge: normed `features`, or `keys` averaged over heads.
    protection: weight of importance in the matching of `guided_merge`, `rank_merge` and `attention_merge`; None for the
        reducer's own.
    drop_share: of tokens that leave, the share that is dropped where the others merge (`leftovers`, `diffrate`).
    cls_only_last: last block for the class token alone: "auto" (when anything is pruned), True or False.
    predictor_path: safetensors file of a fitted predictor or position prior. It must be there even where nothing ranks
        by it yet; whether it fits the tower is looked at once it ranks.
    predictor_init: what ranks where there is no file. "random" is an untrained predictor (for speed benchmarks). A
        record (`name`, `kwargs`, `grid`, `embed_dim`, `location`; of a file's also `metric` and `model`) describes a
        predictor whose weights come with the tower's checkpoint. `save_pretrained` writes such records.
    repair_path: safetensors file of a repair (`python -m patchrank.repair`), which takes the place of the tower's head,
        or stands before it where it was solved for the same tower without one. It belongs to one tower, schedule and
        ranking, and is refused with others. Where nothing leaves it must be there, but is not used.
    seed: of the reducers `random` and `avit_channel`.
    """

    cls_only_last: bool | Literal["auto"] = "auto"
    predictor_path: str | Path | None = None
    predictor_init: Literal["random"] | Mapping | None = None
    repair_path: str | Path | None = None
    seed: Seed = DEFAULTS.seed

    @model_validator(mode="after")
    def _names_exist(self) -> Pruning:
        if self.reducer not in REDUCERS:
            raise UserError(f"reducer {self.reducer!r} is not registered; {near(self.reducer, REDUCERS)}")
        if self.leftovers is None:
            return self
        if self.leftovers not in LEFTOVERS:
            raise UserError(f"leftovers {self.leftovers!r} does not exist; {near(self.leftovers, LEFTOVERS)}")
        if REDUCERS[self.reducer].merges:
            raise UserError(
                f"reducer {self.reducer!r} merges by a rule of its own, so leftovers {self.leftovers!r} says nothing "
                "here; try it without `leftovers`"
            )
        return self


def canonical_pruning(settings: PruningConfig) -> dict:
    """The canonical form of what a trial's pruning section would say, for ids, files and result rows.

    Fields of `Pruning` that no section has are left out. A ranker's `leftovers` that nothing was said of are `drop`,
    since these are the same settings.
    """
    section = PruningConfig(**{name: getattr(settings, name) for name in PruningConfig.model_fields})
    ranks = not getattr(REDUCERS.get(section.reducer), "merges", False)
    usual = "drop" if ranks and section.leftovers is None else section.leftovers
    return canonical(section, "pruning") | {"leftovers": usual}


def check_merging(settings: Mapping, reducers: Sequence[str], leftovers: str | None) -> None:
    """Refuses a setting of `MERGING` that is not at its default, and that none of some reducers would read.

    Flags say all at once, so this is for them: on a live tower a setting may wait for the reducer that reads it.

    Raises:
        UserError: names the setting, and who reads it.
    """
    known = [name for name in reducers if name in REDUCERS]
    read = set().union(*(_merging_read(name, leftovers) for name in known))
    for name in MERGING if known else ():
        value = settings.get(name, usual := getattr(DEFAULTS.pruning, name))
        if value != usual and name not in read:
            others = ", ".join(other for other in sorted(REDUCERS) if name in _merging_read(other, None))
            cure = "" if name == "protection" else ", or a ranking with leftovers 'merge'"
            raise UserError(
                f"{name} {value!r} says nothing to {', '.join(known)}; try it without, or a reducer that reads it: "
                f"{others}{cure}"
            )


def _merging_read(reducer: str, leftovers: str | None) -> set[str]:
    """Which of the settings `MERGING` a reducer reads; its leftovers are merged only if it has no rule of its own."""
    read = set(inspect.signature(REDUCERS[reducer]).parameters) & set(MERGING)
    merged = leftovers == "merge" and not REDUCERS[reducer].merges
    return read | {"metric", "drop_share"} if merged else read


def with_predictor(settings: Pruning, changes: dict, predictor: nn.Module) -> dict:
    """The changes to settings where a predictor is handed over as a module: it ranks, and any file is forgotten.

    Raises:
        UserError: it is no module, or a reducer is asked for that ranks by itself.
    """
    if not isinstance(predictor, nn.Module):
        instead = f"keep_rate={predictor}" if isinstance(plain(predictor), int | float) else "predictor_path=FILE"
        raise UserError(f"predictor must be a module (nn.Module) or None, but is {predictor!r:.80}; try {instead}")
    own = {name for name, kind in REDUCERS.items() if not kind.fitted}
    if changes.get("reducer") in own:
        fitted = " or ".join(sorted(set(REDUCERS) - own))
        raise UserError(f"reducer {changes['reducer']!r} takes no predictor; one that is handed over needs {fitted}")
    reducer = "predictor" if settings.reducer in own else settings.reducer
    return {"predictor_path": None, "predictor_init": None, "reducer": reducer, **changes}


def create_ranker(
    settings: Pruning, embed_dim: int, grid_size: tuple[int, int], predictor: nn.Module | None = None
) -> Reducer:
    """The reducer that some settings ask for; `predictor` takes the place of a file.

    Raises:
        UserError: an unknown reducer, a predictor file that does not fit, or a predictor without weights.
    """
    offers: dict = {"seed": settings.seed, "grid_size": grid_size, "predictor": predictor}
    offers |= {"metric": settings.metric, "protection": settings.protection, "drop_share": settings.drop_share}
    offers["embed_dim"] = embed_dim
    kind, about = REDUCERS[settings.reducer], {}
    if kind.fitted and predictor is None:
        offers["predictor"], about = _weights(settings, embed_dim, grid_size)
    takes = inspect.signature(kind).parameters
    reducer = create_reducer(settings.reducer, **{key: value for key, value in offers.items() if key in takes})
    if kind.fitted:
        reducer.about = about
    return reducer


def lets_leave(settings: PruningConfig) -> bool:
    """Whether settings ask for any token to leave."""
    if settings.drop_counts is not None:
        return any(settings.drop_counts)
    return settings.keep_rate < 1 if settings.budget is None else settings.budget < 1


def usual_locations(depth: int, settings: Mapping) -> dict[str, tuple[int, ...]]:
    """`locations` for a tower that has too few layers for the usual ones; {} where they fit, or tokens leave.

    Args:
        settings: what is asked for, as `set_pruning` takes it.
    """
    usual = DEFAULTS.pruning.locations
    leaves = settings.get("keep_rate", 1) != 1 or any(settings.get("drop_counts") or ())
    if leaves or depth >= max(usual) or tuple(settings.get("locations", usual)) != usual:
        return {}
    return {"locations": tuple(layer for layer in usual if layer <= depth) or (depth,)}


def create_pruner(
    settings: Pruning, reducer: Reducer, drops: Sequence[int], has_class_token: bool = True
) -> PruningBlock:
    """The pruning block of some settings, from whose locations `drops` tokens leave."""
    merging = {"merge": settings.leftovers == "merge", "metric": settings.metric, "drop_share": settings.drop_share}
    return PruningBlock(
        reducer, settings.locations, drops, name=settings.reducer, has_class_token=has_class_token, **merging
    )


def check_schedule(tower: nn.Module, settings: Pruning) -> None:
    """Raises `UserError` for locations or counts that a tower does not have, before anything is made for them."""
    locations = check_locations(settings.locations, len(tower.blocks))
    drop_schedule(tower.num_patches, settings.keep_rate, locations, settings.drop_counts)


def find_drops(tower: nn.Module, settings: Pruning, reducer: Reducer) -> tuple[int, ...]:
    """How many tokens leave at each location of a tower. Raises `UserError` for what is not possible."""
    total, locations = tower.num_patches, settings.locations
    if settings.budget is None or settings.drop_counts is not None:
        counts = drop_schedule(total, settings.keep_rate, locations, settings.drop_counts, settings.taper, reducer.most)
        return aligned(total, counts, settings.align, tower.num_leading_tokens, reducer.most)

    def schedule(leaving: int) -> tuple[int, ...]:
        counts = clipped(total, tapered(leaving, len(locations), settings.taper), reducer.most)
        return aligned(total, counts, settings.align, tower.num_leading_tokens, reducer.most)

    largest = total * len(locations)
    if any(drops := schedule(largest)):
        check_prunable(tower, create_pruner(settings, reducer, drops))  # what cannot run has no cost

    def cost(drops: Sequence[int]) -> int:
        pruner = create_pruner(settings, reducer, drops) if any(drops) else None
        return count_macs(tower, pruner, skips_rows(tower, settings, pruner is not None)).image

    return budget_schedule(settings.budget, tower.macs_unpruned().image, schedule, cost, largest, settings.align)


def skips_rows(tower: nn.Module, settings: Pruning, prunes: bool) -> bool:
    """Whether the last block computes the class token alone; never where something hangs on that block."""
    wanted = prunes if settings.cls_only_last == "auto" else settings.cls_only_last
    return wanted and can_skip_rows(tower)


def count_macs(tower: nn.Module, pruner: PruningBlock | None, cls_only: bool) -> Macs:
    """What one image costs a tower with a pruning block, or with none."""
    if pruner is None:
        return Macs(vision_macs(tower, cls_only_last=cls_only))
    drops = tuple(pruner.drops), tuple(pruner.drops.values())
    vision = vision_macs(tower, *drops, cls_only, mid=pruner.mid)
    if pruner.repair is not None and pruner.repair.headless:  # one projection more
        vision += pruner.repair.weight.numel()
    return Macs(vision, pruner.num_macs(tower, cls_only), pruner.matching_macs(tower, cls_only))


def check_owner(
    tower: nn.Module,
    weights: Mapping[str, Tensor] | None = None,
    in_use: tuple[Reducer, ...] = (),
    advise: bool = False,
) -> None:
    """Refuses a predictor that was fitted to another tower, as its file says, or that has no weights itself.

    Args:
        weights: what the tower is about to load, in place of the weights that it has.
        in_use: the reducer that ranked before, which needs no proof where weights have none.
        advise: say how `set_pruning` takes the predictor all the same.

    Raises:
        UserError: names both towers.
    """
    if weights is None and awaits_weights(tower):
        raise UserError(UNFILLED)
    reducer = getattr(tower.pruner, "reducer", None)
    fitted_to = getattr(reducer, "about", {}).get("model")
    if not fitted_to:
        return
    path = tower.pruning.predictor_path or ""
    kept = any(reducer.predictor is other.predictor for other in in_use if other.fitted)
    theirs = f"{fitted_to['name']} with weights {fitted_to['sha256'][:12]}"
    says, cure = f"predictor {path} was fitted to {theirs}, but this tower's weights", _on_purpose("" if kept else path)
    if not tower.has_fingerprint():
        if not kept:
            why = "are quantised, or otherwise no plain tensors, so that nobody can tell whose they are"
            raise UserError(f"{says} {why}; prune the tower before that, or {cure}")
    elif fitted_to["sha256"] not in (known := tower.known_as(weights)):
        hint = f"; if it shall rank all the same, {cure}" if advise else ""
        raise UserError(f"{says} are {known[0][:12]}{tower.precision_note()}{hint}")


def _on_purpose(path: str | Path) -> str:
    """How to hand over a predictor that belongs to other weights: from its file, or the one in use."""
    if not path:
        return "try set_pruning(predictor=model.predictor, ...)"
    return f"try set_pruning(predictor=patchrank.layers.predictors.load_predictor({str(path)!r})[0], ...)"


def _weights(settings: Pruning, embed_dim: int, grid_size: tuple[int, int]) -> tuple[nn.Module, dict]:
    """What a fitted reducer ranks by, and what its file says of it."""
    name = settings.reducer
    if settings.predictor_path is not None:
        predictor, about = load_predictor(settings.predictor_path)
        _check_fits(settings, about, embed_dim, grid_size)
        return predictor, about
    if isinstance(settings.predictor_init, Mapping):
        about = dict(settings.predictor_init)
        lacking = [key for key in RECORD if key not in about]
        if lacking:
            needed = ", ".join(RECORD)
            raise UserError(f"predictor_init: a record of a predictor needs {needed}, but lacks {lacking[0]!r}")
        _check_fits(settings, about, embed_dim, grid_size)
        return create_awaiting(about), about if about.get("model") else {}  # {} if it never came from a file
    if settings.predictor_init == "random":
        return create_predictor(REDUCERS[name].untrained, embed_dim, grid_size), {}
    others = ", ".join(sorted(other for other, kind in REDUCERS.items() if not kind.fitted))
    raise UserError(
        f"pruning by reducer {name!r} has no weights to rank by: give predictor_path (--predictor FILE), choose "
        f"another of {others}, or say predictor_init='random' if that is meant"
    )


def _check_fits(settings: Pruning, about: dict, embed_dim: int, grid_size: tuple[int, int]) -> None:
    what = f"predictor {settings.predictor_path or 'of predictor_init'}"
    pairs = (
        ("grid", list(about["grid"]), list(grid_size)),
        ("embed_dim", about["embed_dim"], embed_dim),
        ("location", about["location"], settings.locations[0]),
    )
    for which, theirs, ours in pairs:
        if theirs != ours:
            cure = "try a predictor that was fitted for it, or another reducer"
            if which == "location":
                cure = f"try locations that begin at {theirs}, or a predictor that was fitted for {ours}"
            raise UserError(f"{what} was fitted for {which} {theirs}, but this tower has {ours}; {cure}")
    check_location(about["name"], settings.locations[0])
    if settings.reducer == "prior" and about["name"] != "prior":
        raise UserError(
            f"{what} is a fitted {about['name']!r}, but reducer 'prior' ranks by a "
            "'prior'; reducer 'predictor' takes any"
        )
