"""The settings that measured best, by name, for a tower of any depth."""

from __future__ import annotations

from torch import nn

from patchrank.utils.errors import UserError, near

PRESETS = {"free": "attention_merge", "ranked": "rank_merge"}
TAPER = 0.6  # of counts, over one twelfth of the depth
PLACES, DEPTH = 5, 12  # so many consecutive layers of twelve


def preset(name: str, tower: nn.Module, budget: float) -> dict[str, object]:
    """Keyword arguments of `set_pruning` for a tower that shall keep to a share of its MACs.

    Tokens merge by ranked matching in five of twelve layers, most of them in the first of these. That is layer 3 of 12
    at 60 % of the MACs or more, and layer 2 below, where little is left for later layers to take.

    Args:
        name: `free` needs no training and ranks by class attention; `ranked` ranks by a predictor, which must have been
            fitted for the first location that is returned.
        tower: an image tower of ours.
        budget: share of the unpruned tower's MACs to stay within.

    Raises:
        UserError: an unknown name, or a tower of fewer than 3 layers.
    """
    if name not in PRESETS:
        raise UserError(f"preset {name!r} does not exist; {near(name, PRESETS)}")
    depth = len(tower.blocks)
    if depth < 3:
        raise UserError(f"presets need a tower of at least 3 layers, but this one has {depth}; try locations=(1,)")
    first = max(2, round(depth / 4 if budget >= 0.6 else depth / 6))
    last = min(depth - 1, first + max(1, round(PLACES * depth / DEPTH)) - 1)
    locations = tuple(range(first, max(first, last) + 1))
    taper = round(TAPER ** (DEPTH / depth), 3)
    usual = {"leftovers": None, "drop_counts": None, "metric": "features", "protection": None, "drop_share": 0.0}
    return {"reducer": PRESETS[name], "locations": locations, "taper": taper, "budget": budget, **usual}
