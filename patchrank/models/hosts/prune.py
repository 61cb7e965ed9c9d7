"""One door for models that somebody else made."""

from __future__ import annotations

import warnings
from pathlib import Path

from timm.layers import to_2tuple
from torch import nn

from patchrank.models.hosts import of_timm, of_transformers
from patchrank.models.hosts.runner import Output, RunLayers
from patchrank.models.hosts.tower import HostedTower
from patchrank.models.pruned_vit import PrunedVisionTransformer
from patchrank.models.pruning_cfg import OFF
from patchrank.models.recipe_files import Recipe, read_recipe
from patchrank.utils.errors import UserError, near

TAKES = "a model of timm, transformers or open_clip"
OUTPUTS = ("grid", "kept")


def prune(
    model: nn.Module,
    folder: str | Path | None = None,
    *,
    predictor: nn.Module | None = None,
    output: Output | None = None,
    img_size: int | None = None,
    **pruning,
) -> nn.Module:
    """Makes patch tokens leave on their way through a model that somebody else made, in place.

    It takes timm's vision transformers (pooled by class token, average or attention), CLIP, SigLIP, DINOv2 and ViT
    models of transformers, models of open_clip, and towers of ours. Weights are shared, and keep their names in state
    dicts; outputs keep their types and names. `unprune` undoes it, `find_tower` gives the tower that runs inside.

    Args:
        model: is changed.
        folder: of a recipe (`python -m patchrank.recipe`), with settings, predictor and repair for this model. It takes
            the place of all settings before it; those given beside it win.
        predictor: a fitted predictor to rank by, instead of a file.
        output: what features of all tokens are (`last_hidden_state`, `forward_features`): on the full "grid", with what
            patches merged into, and zeros where they left, or of the "kept" tokens alone. A model that averages its
            patches has the mean of the others where they left. "grid" if left out, or what it was; of open_clip's
            models and ours it is always "grid".
        img_size: side of the images that a model of transformers will see, where it is not its config's; that of the
            recipe if left out.
        **pruning: fields of `patchrank.models.pruning_cfg.Pruning`; without any, nothing leaves yet. Called again, it
            changes the settings.

    Returns:
        The model that was given.

    Raises:
        UserError: a model that cannot be reproduced exactly, by name, or impossible settings; a folder without a
            recipe, or with a predictor or repair of another model, or for images of another size. The model is then
            as it was.
    """
    recipe = None if folder is None else _recipe(folder)
    if recipe is not None:
        pruning = recipe.settings(pruning, predictor is not None)
        img_size = _side(model, recipe, img_size)
    _prune(model, predictor, output, img_size, pruning)
    if recipe is not None:
        _note_other_model(find_tower(model), recipe)
    return model


def _prune(
    model: nn.Module, predictor: nn.Module | None, output: Output | None, img_size: int | None, pruning: dict
) -> None:
    """As `prune`, with all settings of it."""
    if output not in (None, *OUTPUTS):
        raise UserError(f"output {output!r} does not exist; {near(output, OUTPUTS)}")
    if (tower := held_tower(model)) is not None:
        set_hosted(tower, predictor, output, img_size, pruning)
        return
    door = door_of(model)
    if door is None:
        prune_others(model, predictor, output, img_size, pruning)
        return
    tower = door.attach(model, img_size)
    try:
        set_hosted(tower, predictor, output, img_size, pruning)
    except BaseException:
        door.detach(model)
        raise


def _recipe(folder: object) -> Recipe:
    """The recipe in a folder. Raises `UserError` for a predictor or a number in its place, too."""
    if isinstance(folder, str | Path):
        return read_recipe(folder)
    cure = "predictor=..." if isinstance(folder, nn.Module) else "keep_rate=..., or another setting by its name"
    raise UserError(
        f"prune takes the folder of a recipe after the model, but got a {type(folder).__name__}; try {cure}"
    )


def _side(model: nn.Module, recipe: Recipe, given: int | None) -> int | None:
    """The `img_size` to prune a model with, which a recipe may say.

    Raises:
        UserError: another one is given, or the model takes images of another size.
    """
    if (size := recipe.img_size) is None:
        return given
    height, width = size
    says = f"{recipe.source} is for images of {height} x {width} pixels"
    if given not in (None, height) or (given is not None and height != width):
        raise UserError(f"img_size {given}: {says}; try it without img_size")
    if of_transformers.is_transformers(model) and held_tower(model) is None and height == width:
        return height
    own = _size_of(model)
    if own not in (None, size):
        cure = f"timm.create_model(NAME, img_size={height if height == width else size})"
        if hasattr(model, "visual"):
            cure = f"open_clip.create_model(NAME, force_image_size={height if height == width else size})"
        elif door_of(model) is of_transformers:
            cure = "patchrank.unprune(model) first"
        raise UserError(f"{says}, but this {type(model).__name__} takes {own[0]} x {own[1]}; try {cure}")
    return None


def _size_of(model: nn.Module) -> tuple[int, int] | None:
    """Height and width in pixels of the images that a model takes as it is; None where nobody can tell."""
    visual = getattr(model, "visual", None)
    for part in (held_tower(model), model, getattr(visual, "trunk", None)):
        if (size := getattr(getattr(part, "patch_embed", None), "img_size", None)) is not None:
            return to_2tuple(size)
    size = getattr(visual, "image_size", None)
    return None if size is None else to_2tuple(size)


def _note_other_model(tower: PrunedVisionTransformer, recipe: Recipe) -> None:
    """Warns of a recipe for other weights; reducers without weights run on any, only not as well as was measured."""
    known = tower.known_as() if tower.has_fingerprint() else [recipe.sha256]
    if recipe.sha256 not in known:
        warnings.warn(
            f"{recipe.source} was made for {recipe.name} with weights {recipe.sha256[:12]}, but this model's are "
            f"{known[0][:12]}; its figures need not hold here",
            stacklevel=3,
        )


def unprune(model: nn.Module) -> nn.Module:
    """Undoes `prune`: the model runs its own layers again, with the weights as they are now. Returns the model.

    Raises:
        UserError: it is not pruned, or layers of an open_clip model were replaced meanwhile.
    """
    if isinstance(model, PrunedVisionTransformer):
        model.set_pruning(**OFF)
        return model
    door = door_of(model)
    if door is not None and held_tower(model) is None:
        raise UserError(f"this {type(model).__name__} is not pruned, so there is nothing to undo")
    if door is not None:
        door.detach(model)
        return model
    from patchrank.models.open_clip.prune import check_kind
    from patchrank.models.open_clip.prune import unprune as unprune_open_clip

    check_kind("unprune", model, TAKES)
    return unprune_open_clip(model)


def find_tower(model: nn.Module) -> PrunedVisionTransformer:
    """The tower of ours inside a pruned model: with `forward_pruned`, `set_pruning`, `macs`, for scoring and fitting.

    Raises:
        UserError: the model is not pruned.
    """
    if isinstance(model, PrunedVisionTransformer):
        return model
    if (tower := held_tower(model)) is not None:
        door_of(model).follow(tower, model)
        return tower
    trunk = getattr(getattr(model, "visual", None), "trunk", None)
    if isinstance(trunk, PrunedVisionTransformer):
        return trunk
    raise UserError(f"this {type(model).__name__} is not pruned; try patchrank.prune(model, ...) first")


def held_tower(model: nn.Module) -> HostedTower | None:
    """The tower that `prune` put around a model's layers; None if it has none."""
    if isinstance(blocks := getattr(model, "blocks", None), RunLayers):
        return blocks.held[0]
    for _, _, runner in of_transformers.runners(model):
        return runner.held[0]
    return None


def door_of(model: nn.Module):
    """The module of this package that knows a model's kind; None for open_clip's models and ours."""
    if of_transformers.is_transformers(model):
        return of_transformers
    return of_timm if of_timm.is_timm(model) else None


def set_hosted(
    tower: HostedTower, predictor: nn.Module | None, output: Output | None, img_size: int | None, pruning: dict
) -> None:
    """Changes the settings of a model that has a tower of ours. Raises `UserError` for impossible ones."""
    if img_size not in (None, side := tower.patch_embed.img_size[0]):
        raise UserError(f"img_size {img_size}: the model is pruned for {side} pixels; try patchrank.unprune first")
    before, tower.output = tower.output, output or tower.output
    try:
        tower.set_pruning(predictor=predictor, **pruning)
    except BaseException:
        tower.output = before
        raise


def prune_others(
    model: nn.Module, predictor: nn.Module | None, output: Output | None, img_size: int | None, pruning: dict
) -> None:
    """Towers of ours and models of open_clip, which have a way of their own."""
    kind = type(model)
    if img_size is not None or output == "kept":
        name = "img_size" if img_size is not None else "output 'kept'"
        raise UserError(f"{name} does not go with a {kind.__name__}; try it without")
    if isinstance(model, PrunedVisionTransformer):
        model.set_pruning(predictor, **pruning)
        return
    from patchrank.models.open_clip.prune import check_kind, prune_open_clip

    check_kind("prune", model, TAKES)
    if kind.__module__.startswith("torch."):  # a layer
        raise UserError(f"prune takes {TAKES}, but got {kind.__module__}.{kind.__name__}; try the model that it is of")
    prune_open_clip(model, predictor, **pruning)
