"""Published weights of CLIP's image towers: where they lie and what they expect of images."""

from __future__ import annotations

from pathlib import Path

WEIGHTS = Path(__file__).parent / "weights"


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
