"""timm's vision transformers, pruned in place."""

from __future__ import annotations

from timm.models.vision_transformer import VisionTransformer
from torch import nn

from patchrank.layers.macs import check_costs
from patchrank.layers.module_hooks import is_hooked
from patchrank.layers.pooling import check_pool
from patchrank.models.hosts.repaired import End, Entering, InPlace
from patchrank.models.hosts.runner import RunLayers
from patchrank.models.hosts.tower import HostedTower
from patchrank.models.hosts.zero_rows import PooledRows, hang
from patchrank.utils.errors import UserError


def is_timm(model: nn.Module) -> bool:
    """Whether a model comes from timm."""
    return type(model).__module__.startswith("timm.")


def check_model(model: nn.Module, source: str) -> None:
    """Raises `UserError`, which begins with `source`, for a model of timm's that ours does not reproduce."""
    if type(model) is not VisionTransformer:
        raise UserError(
            f"{source} takes timm's VisionTransformer, but got timm's {type(model).__name__}, whose positions "
            "or layers ours does not reproduce; try a vit_, deit_ or siglip model"
        )
    check_pool(model)
    check_costs(model.blocks)


def attach(model: nn.Module, img_size: int | None) -> HostedTower:
    """Puts a tower of ours around the layers of one of timm's vision transformers.

    Raises:
        UserError: a model of another class, one that pools in a way that we do not know, or hooks on all its layers.
    """
    check_model(model, "patchrank.prune")
    if img_size is not None:
        raise UserError("img_size belongs to models of transformers; try timm.create_model(NAME, img_size=...)")
    if is_hooked(model.blocks):
        raise UserError("hooks on blocks as a whole would not run in a pruned model; try to hang them on single blocks")
    tower = HostedTower.around(model)
    model.blocks = RunLayers(tower, model.blocks)
    pooled = PooledRows(tower, "attn_mask", 0, inverted=False)
    tower.handles = hang(tower, model.norm, model.attn_pool, pooled)
    tower.hooked = tuple((model, name, getattr(model, name)) for name in ("norm", "attn_pool"))
    tower.end = End(model, "head", before=[Entering(tower)], after=[InPlace(tower)])
    return tower


def follow(tower: HostedTower, model: VisionTransformer) -> None:
    """Brings a tower to what the model is now, whose head or other modules may have been replaced."""
    for name, child in model.named_children():
        if name != "blocks":
            setattr(tower, name, child)
    for name, layer in model.blocks.named_children():
        setattr(tower.blocks, name, layer)
    for name in ("training", "num_classes", "global_pool"):
        setattr(tower, name, getattr(model, name))


def detach(model: VisionTransformer) -> None:
    """Gives the model its own list of layers again, with the layers that it has now."""
    tower, layers = model.blocks.held
    for name, layer in model.blocks.named_children():
        setattr(layers, name, layer)
    layers.training = model.blocks.training
    model.blocks = layers
    for handle in tower.handles:
        handle.remove()
    tower.end.remove()
