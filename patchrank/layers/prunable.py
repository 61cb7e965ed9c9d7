"""What towers and inputs must be, so that tokens can leave."""

from __future__ import annotations

from torch import Tensor, nn

from patchrank.layers.block_parts import check_attention, check_parts
from patchrank.layers.pooling import check_pool
from patchrank.layers.pruning_block import PruningBlock
from patchrank.utils.errors import UserError


def check_prunable(tower: nn.Module, pruner: PruningBlock) -> None:
    """Refuses a tower from which tokens cannot leave, or not by the reducer of `pruner`.

    Raises:
        UserError: a way of pooling that is not known, a changing image size, patches dropped at random, no class
            attention where it decides, a block that cannot run in parts where a reducer acts inside of it, or more
            tokens that leave at once than can.
    """
    check_pool(tower)
    check_grid(tower, "pruning")
    read = [max(layer, 1) for layer in range(len(tower.blocks) + 1) if pruner.signals(layer)]
    if "cls_row" in pruner.reducer.needs and not tower.has_class_token:
        raise UserError(
            f"reducer {pruner.name!r} ranks by class attention, but this tower has no class token; try center"
        )
    if not tower.has_class_token and getattr(getattr(pruner.reducer, "predictor", None), "reads_cls", False):
        raise UserError("this predictor ranks by the class token alone, which this tower has not; try mix_mlp")
    for layer in read:
        check_attention(tower.blocks[layer - 1], layer)
    for layer in pruner.in_parts():
        check_parts(tower.blocks[layer - 1], layer)
    _check_counts(tower.num_patches, pruner)


def _check_counts(num_patches: int, pruner: PruningBlock) -> None:
    """Refuses counts above what the reducer takes at once, and a first location before what the reducer reads."""
    for layer, (alive, count) in pruner.leaving(num_patches).items():
        if count > (limit := pruner.reducer.most(alive)):
            raise UserError(
                f"drop_counts: at location {layer} {count} of {alive} patch tokens shall leave, but {pruner.name!r} "
                f"merges at most {limit} at once; try more locations, or fewer tokens at this one"
            )
    first = max(pruner.reducer.first_location, 1 + ("shift" in pruner.reducer.needs))
    if min(pruner.drops) < first:
        raise UserError(
            f"locations: reducer {pruner.name!r} ranks by what earlier layers did, so locations begin at {first}, but "
            f"tokens shall leave at {min(pruner.drops)}; try {first} or a later layer"
        )


def check_grid(tower: nn.Module, what: str) -> None:
    """Refuses a tower whose sequences do not always begin with all patches of one grid; `what` needs that."""
    if tower.dynamic_img_size:
        raise UserError(f"{what} needs a fixed image size, but dynamic_img_size is on: give img_size instead")
    if not isinstance(tower.patch_drop, nn.Identity):
        raise UserError(f"{what} needs all patches of the grid, but patch_drop_rate drops some before layer 1")


def without_mask(x: Tensor, attn_mask: Tensor | None, is_causal: bool) -> Tensor:
    """x itself. Raises `UserError` for an attention mask, with which pruning and prompts do not go together."""
    if attn_mask is not None or is_causal:
        raise UserError(
            "attention masks do not go together with pruning or prompts: tokens leave or come, and the mask would not "
            "fit"
        )
    return x
