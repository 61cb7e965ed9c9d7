"""Weights of CLIP's image towers, whoever wrote them, as ours."""

from __future__ import annotations

from timm.models.vision_transformer import checkpoint_filter_fn as vit_checkpoint_filter_fn
from torch import Tensor, nn


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Our own pairs (`visual.*` beside `text.*`) and whatever timm's filter knows; the pruning block keeps its own."""
    if any(key.startswith("text.") for key in state_dict):
        state_dict = {k.removeprefix("visual."): v for k, v in state_dict.items() if k.startswith("visual.")}
    else:
        state_dict = vit_checkpoint_filter_fn(state_dict, model)
    own = {key: value for key, value in model.state_dict().items() if key.startswith("pruner.")}
    return own | state_dict
