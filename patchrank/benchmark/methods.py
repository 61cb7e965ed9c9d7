"""The towers of a table: each library's own, and ours with every way to reduce tokens. They share weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from patchrank.benchmark.mode import Mode
from patchrank.benchmark.schedules import MERGE, Asked, common_budget, pruned_copies, shared_copy
from patchrank.layers.reducers import REDUCERS, Reducer
from patchrank.layers.schedule import check_locations
from patchrank.models.clip import create_tower
from patchrank.models.hosts.of_transformers import OwnForward, is_transformers
from patchrank.models.model_name import OPEN_CLIP, is_open_clip
from patchrank.models.pretrained import find_weights, is_clip_entry
from patchrank.utils.errors import UserError, near

WHOLE = ("timm", "timm_cls", "open_clip")  # methods that drop nothing
ORACLE = "golden"  # ranks by scores that nobody could have in time


@dataclass(frozen=True)
class Method:
    """One line of a table.

    name: as `--methods` says it.
    tower: images (B, 3, H, W) to embeddings (B, E).
    macs, macs_unpruned: of one image.
    keep_rate: share of patch tokens that is left at the end.
    keep_rate_asked: the share that was asked for; None where MACs or counts were. Whole tokens leave, and `align` may
        let fewer of them leave, so that more is left.
    drop_counts, locations: how many tokens leave, and at which layers; () where none does.
    reducer: who decides; None where nothing leaves.
    """

    name: str
    tower: Callable[[Tensor], Tensor]
    macs: int
    macs_unpruned: int
    keep_rate: float = 1.0
    keep_rate_asked: float | None = None
    drop_counts: tuple[int, ...] = ()
    locations: tuple[int, ...] = ()
    reducer: Reducer | None = None

    @property
    def label(self) -> str:
        """Tells methods of one table apart that have one name."""
        rate = self.keep_rate if self.keep_rate_asked is None else self.keep_rate_asked
        return f"{self.name}, {rate:g} kept"


def read_methods(text: str) -> list[str]:
    """The methods that a flag names, by commas; `timm` is always the first, since all others are compared with it.

    Of a tower of transformers' modules it stands for that library's own forward.

    Raises:
        UserError: a name that does not exist or stands there twice, an oracle, or `+merge` after a method that is no
            ranking.
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        _check_name(name)
        if names.count(name) > 1:
            raise UserError(f"--methods: {name!r} stands there {names.count(name)} times; try it once")
    return ["timm", *(name for name in names if name != "timm")]


def _check_name(name: str) -> None:
    reducer = name.removesuffix(MERGE)
    if reducer == ORACLE:
        raise UserError(f"method {name!r} ranks by scores from outside, so it has no time of its own; try prior")
    known = [*WHOLE, *(other for other in REDUCERS if other != ORACLE)]
    if reducer not in known:
        raise UserError(f"method {name!r} does not exist; {near(reducer, known)}, and RANKING{MERGE}")
    if name.endswith(MERGE) and (reducer in WHOLE or REDUCERS[reducer].merges):
        what = "drops nothing" if reducer in WHOLE else "merges by a rule of its own"
        raise UserError(f"method {name!r}: {reducer} {what}, and {MERGE} is for rankings; try {reducer}")


def create_base(model: str, img_size: int | None, mode: Mode, seed: int) -> nn.Module:
    """The tower that all methods of ours share their weights with: unpruned, with random weights.

    Raises:
        UserError: an unknown model.
    """
    torch.manual_seed(seed)
    return mode.place(create_tower(model, img_size=img_size, seed=seed))


def create_methods(names: Sequence[str], base: nn.Module, model: str, asked: Asked, mode: Mode) -> list[Method]:
    """All lines of a table, in the order of `names`, those of one name from the highest keep rate asked for.

    Args:
        model: what `base` was made from, by whose name open_clip's twin is found.

    Raises:
        UserError: a schedule that a method cannot have, or a tower without a twin in open_clip.
    """
    if asked.locations is not None:
        check_locations(asked.locations, len(base.blocks))
    found, budget = [], common_budget(base, asked)
    for name in names:
        if name in WHOLE:
            found.append(_whole(name, base, model, mode))
        else:
            copies = pruned_copies(base, name, asked, budget)
            found += [_method(name, tower, rate) for rate, tower in copies]
    return found


def _whole(name: str, base: nn.Module, model: str, mode: Mode) -> Method:
    """A method that drops nothing."""
    if name == "timm_cls":
        tower = shared_copy(base)
        tower.set_pruning(cls_only_last=True)
        return _method(name, tower)
    macs = base.macs_unpruned().image
    if name == "timm" and is_transformers(_original(base)):
        return Method("transformers", OwnForward(base), macs, macs)
    if name == "timm":
        return Method(name, timm_twin(base), macs, macs)
    return Method(name, mode.place(_open_clip_twin(model, base)), macs, macs)


def _method(name: str, tower: nn.Module, keep_rate_asked: float | None = None) -> Method:
    """A line for a tower of ours."""
    left = round(1 - sum(tower.drop_counts) / tower.num_patches, 4)
    costs = tower.macs().image, tower.macs_unpruned().image
    locations, reducer = ((), None) if tower.pruner is None else (tuple(tower.pruner.drops), tower.pruner.reducer)
    return Method(name, tower, *costs, left, keep_rate_asked, tower.drop_counts, locations, reducer)


def timm_twin(base: nn.Module) -> VisionTransformer:
    """timm's own class with the very layers of a tower of ours: nothing of ours runs in its forward."""
    if type(original := _original(base)) is VisionTransformer:
        return original
    twin = VisionTransformer.__new__(VisionTransformer)
    vars(twin).update({name: copy(value) if isinstance(value, dict) else value for name, value in vars(base).items()})
    return twin.eval()


def _original(base: nn.Module) -> nn.Module | None:
    """The model of another library that a tower of ours shares its modules with, if there is one."""
    (original,) = getattr(base, "original", (None,))
    return original


def _open_clip_twin(model: str, base: nn.Module) -> nn.Module:
    """open_clip's own tower of a model's shape, with random weights.

    Raises:
        UserError: open_clip is not installed, or has no such tower of its own.
    """
    try:
        from patchrank.models.open_clip.by_name import create_model, find_config
    except ImportError as error:
        raise UserError(
            f"method 'open_clip' needs the package open_clip ({error}); try pip install open_clip_torch, or without"
        ) from error
    name = model
    if not is_open_clip(model):
        known = find_weights(model).open_clip if is_clip_entry(model) else None
        if known is None:
            raise UserError(f"method 'open_clip': open_clip has no tower like {model}; try patchrank_clip_b16")
        name = f"{OPEN_CLIP}{known[0]}"
    twin = create_model(find_config(name), f"model {name}").visual
    if not hasattr(twin, "transformer") or tuple(twin.image_size) != tuple(base.patch_embed.img_size):
        why = "its tower there is timm's" if hasattr(twin, "trunk") else f"that one sees images of {twin.image_size}"
        raise UserError(f"method 'open_clip': open_clip has no tower of its own like this {model}: {why}")
    return twin
