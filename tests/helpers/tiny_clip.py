"""open_clip's CLIP at toy size with random weights, our pair of the same shape, and files of such weights."""

from functools import lru_cache, partial

import open_clip
import torch
from open_clip.transformer import QuickGELU, TextTransformer
from safetensors.torch import save_file
from timm.layers import LayerNorm
from timm.models.vision_transformer import checkpoint_filter_fn as timms_filter
from torch import nn

from patchrank.models.clip import Clip
from patchrank.models.pruned_vit import PrunedVisionTransformer

TEXT = dict(context_length=16, vocab_size=100, width=32, heads=2, layers=2)


@lru_cache(maxsize=1)
def create_theirs():
    """open_clip's CLIP with quick GELU, random and small; norms and biases are random too."""
    torch.manual_seed(0)
    vision = open_clip.CLIPVisionCfg(layers=2, width=64, head_width=32, patch_size=8, image_size=32)
    clip = open_clip.CLIP(24, vision, open_clip.CLIPTextCfg(**TEXT), quick_gelu=True).eval()
    with torch.no_grad():
        for parameter in clip.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return clip.requires_grad_(False)


def create_tower(**changes):
    torch.manual_seed(1)
    shape = dict(img_size=32, patch_size=8, embed_dim=64, depth=2, num_heads=2, num_classes=24, pre_norm=True)
    shape |= dict(act_layer="quick_gelu", norm_layer=partial(LayerNorm, eps=1e-5), locations=(2,))
    return PrunedVisionTransformer(**shape | changes).eval()


def create_pair():
    return Clip("tiny", create_tower(), TextTransformer(output_dim=24, act_layer=QuickGELU, **TEXT)).eval()


def hugging_face(state):
    """open_clip's weights by the names that Hugging Face's CLIPModel gives them, written out by hand."""
    named = {
        "logit_scale": state["logit_scale"],
        "vision_model.embeddings.class_embedding": state["visual.class_embedding"],
        "vision_model.embeddings.patch_embedding.weight": state["visual.conv1.weight"],
        "vision_model.embeddings.position_embedding.weight": state["visual.positional_embedding"],
        "vision_model.embeddings.position_ids": torch.arange(17)[None],
        "visual_projection.weight": state["visual.proj"].T.contiguous(),
        "text_model.embeddings.token_embedding.weight": state["token_embedding.weight"],
        "text_model.embeddings.position_embedding.weight": state["positional_embedding"],
        "text_model.embeddings.position_ids": torch.arange(16)[None],
        "text_projection.weight": state["text_projection"].T.contiguous(),
    }
    for kind in ("weight", "bias"):
        named[f"vision_model.pre_layrnorm.{kind}"] = state[f"visual.ln_pre.{kind}"]
        named[f"vision_model.post_layernorm.{kind}"] = state[f"visual.ln_post.{kind}"]
        named[f"text_model.final_layer_norm.{kind}"] = state[f"ln_final.{kind}"]
        for tower, block in (("vision", "visual.transformer.resblocks"), ("text", "transformer.resblocks")):
            for i in range(2):
                layer = f"{tower}_model.encoder.layers.{i}"
                q, k, v = state[f"{block}.{i}.attn.in_proj_{kind}"].chunk(3)
                named[f"{layer}.self_attn.q_proj.{kind}"] = q.clone()
                named[f"{layer}.self_attn.k_proj.{kind}"] = k.clone()
                named[f"{layer}.self_attn.v_proj.{kind}"] = v.clone()
                named[f"{layer}.self_attn.out_proj.{kind}"] = state[f"{block}.{i}.attn.out_proj.{kind}"]
                named[f"{layer}.layer_norm1.{kind}"] = state[f"{block}.{i}.ln_1.{kind}"]
                named[f"{layer}.layer_norm2.{kind}"] = state[f"{block}.{i}.ln_2.{kind}"]
                named[f"{layer}.mlp.fc1.{kind}"] = state[f"{block}.{i}.mlp.c_fc.{kind}"]
                named[f"{layer}.mlp.fc2.{kind}"] = state[f"{block}.{i}.mlp.c_proj.{kind}"]
    return named


def by_timm(state):
    """The image tower by timm's own names."""
    return {key: value.contiguous() for key, value in timms_filter(state, create_tower()).items()}


def ours(state):
    text = {f"text.{key}": value for key, value in state.items() if not key.startswith(("visual.", "logit_scale"))}
    visual = {f"visual.{key}": value for key, value in by_timm(state).items()}
    return visual | text | {"logit_scale": state["logit_scale"]}


def trunk(state):
    """open_clip's CustomTextCLIP around a tower of timm's, with the projection outside of it."""
    layout = {key.replace("visual.", "visual.trunk."): value for key, value in ours(state).items()}
    layout.pop("visual.trunk.head.bias")
    return layout | {"visual.head.proj.weight": layout.pop("visual.trunk.head.weight")}


LAYOUTS = {
    "open_clip": dict,
    "openai": lambda s: s | {key: torch.tensor(1) for key in ("input_resolution", "context_length", "vocab_size")},
    "hugging_face": hugging_face,
    "ours": ours,
    "trunk": trunk,
    "trunk_with_head": lambda s: {k.replace("visual.", "visual.trunk."): v for k, v in ours(s).items()},
    "trunk_beside_flat_text": lambda s: {k.removeprefix("text."): v for k, v in trunk(s).items()},
    "masks": lambda s: ours(s) | {"text.attn_mask": torch.zeros(16, 16), "logit_bias": torch.zeros(())},
    "vector": lambda s: s | {"logit_scale": s["logit_scale"].reshape(1)},
}


FORMATS = {
    "safetensors": lambda s, path: save_file(s, path),
    "zip": lambda s, path: torch.save(s, path),
    "legacy": lambda s, path: torch.save(s, path, _use_new_zipfile_serialization=False),
    "training": lambda s, path: torch.save(
        {"epoch": 3, "name": "run", "optimizer": {"state": {}, "lr": [0.1]}, "state_dict": s}, path
    ),
    "wrapped": lambda s, path: torch.save({"model": {f"module.{k}": nn.Parameter(v) for k, v in s.items()}}, path),
}
