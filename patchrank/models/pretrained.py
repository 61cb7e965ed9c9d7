"""Weights of CLIP's image towers: where ours lie, how they are read, and what they expect of images."""

from __future__ import annotations

from pathlib import Path

from timm.models.vision_transformer import checkpoint_filter_fn as vit_checkpoint_filter_fn
from torch import Tensor, nn

WEIGHTS = Path(__file__).parent / "weights"


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Our own pairs (`visual.*` beside `text.*`) and whatever timm's filter knows; the pruning block keeps its own."""
    if any(key.startswith("text.") for key in state_dict):
        state_dict = {k.removeprefix("visual."): v for k, v in state_dict.items() if k.startswith("visual.")}
    else:
        state_dict = vit_checkpoint_filter_fn(state_dict, model)
    own = {key: value for key, value in model.state_dict().items() if key.startswith("pruner.")}
    return own | state_dict


def clip_cfg(**kwargs) -> dict:
    """What timm keeps of a pretrained CLIP tower, beside what `kwargs` say."""
    return {
        "url": "",
        "num_classes": 512,
        "input_size": (3, 224, 224),
        "pool_size": None,
        "crop_pct": 1.0,  # timm's own CLIP entries say 0.9, which is not what OpenAI and open_clip evaluate with
        "interpolation": "bicubic",
        "fixed_input_size": True,
        "mean": (0.48145466, 0.4578275, 0.40821073),
        "std": (0.26862954, 0.26130258, 0.27577711),
        "first_conv": "patch_embed.proj",
        "classifier": "head",
        **kwargs,
    }
