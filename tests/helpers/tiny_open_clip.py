"""Random open_clip models of toy size."""

import open_clip
import torch
from open_clip import CLIPTextCfg, CLIPVisionCfg

NATIVE = {"layers": 12, "width": 64, "head_width": 32, "patch_size": 4, "image_size": 32}
TIMM = {"timm_model_name": "vit_tiny_patch16_224", "timm_pool": "token", "timm_proj": None, "image_size": 224}
TEXT = {"context_length": 16, "vocab_size": 100, "width": 32, "heads": 2, "layers": 2}


def create(kind="native", quick_gelu=False, model=open_clip.CLIP, cast_dtype=None, seed=0, text=(), **vision):
    """The same weights for the same arguments, in evaluation mode."""
    torch.manual_seed(seed)
    vision, text = CLIPVisionCfg(**({"native": NATIVE, "timm": TIMM}[kind] | vision)), CLIPTextCfg(**TEXT | dict(text))
    return model(32, vision, text, quick_gelu=quick_gelu, cast_dtype=cast_dtype).eval()


def images_of(model):
    return torch.randn(2, 3, *model.visual.image_size, generator=torch.Generator().manual_seed(1))


def tokens():
    return torch.randint(0, 100, (3, 16), generator=torch.Generator().manual_seed(2))
