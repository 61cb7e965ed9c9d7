"""CLIP's weights under the names of OpenAI and open_clip, timm and Hugging Face, and from each of them to ours."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from patchrank.utils.errors import UserError

# open_clip's image tower to timm's, parts of names
_VISUAL = {
    "class_embedding": "cls_token",
    "positional_embedding": "pos_embed",
    "conv1.": "patch_embed.proj.",
    "ln_pre.": "norm_pre.",
    "ln_post.": "norm.",
    "transformer.resblocks.": "blocks.",
    ".ln_1.": ".norm1.",
    ".ln_2.": ".norm2.",
    ".attn.in_proj_": ".attn.qkv.",
    ".attn.out_proj.": ".attn.proj.",
    ".mlp.c_fc.": ".mlp.fc1.",
    ".mlp.c_proj.": ".mlp.fc2.",
    ".ls_1.": ".ls1.",
    ".ls_2.": ".ls2.",
}
# Hugging Face's towers to open_clip's
_HUGGING_FACE = {
    "vision_model.embeddings.class_embedding": "visual.class_embedding",
    "vision_model.embeddings.position_embedding.weight": "visual.positional_embedding",
    "vision_model.embeddings.patch_embedding.": "visual.conv1.",
    "vision_model.pre_layrnorm.": "visual.ln_pre.",  # spelt like that
    "vision_model.post_layernorm.": "visual.ln_post.",
    "vision_model.encoder.layers.": "visual.transformer.resblocks.",
    "text_model.embeddings.token_embedding.": "token_embedding.",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.final_layer_norm.": "ln_final.",
    "text_model.encoder.layers.": "transformer.resblocks.",
    ".layer_norm1.": ".ln_1.",
    ".layer_norm2.": ".ln_2.",
    ".self_attn.out_proj.": ".attn.out_proj.",
    ".mlp.fc1.": ".mlp.c_fc.",
    ".mlp.fc2.": ".mlp.c_proj.",
}
_TEXT = ("token_embedding.", "positional_embedding", "transformer.", "ln_final.", "text_projection")
# OpenAI's three integers, SigLIP's bias, buffers that follow from the shape, and torch's count of averaged updates
_IGNORED = ("input_resolution", "context_length", "vocab_size", "logit_bias", "attn_mask", "position_ids", "n_averaged")


class Pair(NamedTuple):
    """Weights of both towers.

    visual: image tower by timm's names, as in `PrunedVisionTransformer`, and all keys that no layout has.
    text: text tower by the names of open_clip's `TextTransformer`; {} where there is none.
    logit_scale: (), or None where there is none.
    """

    visual: dict[str, Tensor]
    text: dict[str, Tensor]
    logit_scale: Tensor | None


def to_pair(tensors: Mapping[str, Tensor], source: str = "weights") -> Pair:
    """CLIP's weights by our names.

    Layouts are our own pairs, OpenAI's and open_clip's towers, open_clip's with an image tower from timm, timm's image
    towers alone, and Hugging Face's `CLIPModel` and `CLIPVisionModelWithProjection`. Weights do not show whether the
    towers were trained with quick GELU or GELU: the entry's tag or `act_layer` decides.

    Args:
        tensors: by their writer's names.
        source: what errors call them.

    Raises:
        UserError: another layout.
    """
    tensors = {key: value for key, value in tensors.items() if key.rsplit(".", 1)[-1] not in _IGNORED}
    if "vision_model.embeddings.class_embedding" in tensors:
        tensors = _from_hugging_face(tensors)
    scale = tensors.pop("logit_scale", None)
    prefixes = "text." if any(key.startswith("text.") for key in tensors) else _TEXT
    text = {key.removeprefix("text."): value for key, value in tensors.items() if key.startswith(prefixes)}
    rest = {key: value for key, value in tensors.items() if not key.startswith(prefixes)}
    if scale is not None and scale.numel() == 1:  # some open_clip models keep it as a vector of one
        scale = scale.reshape(())
    return Pair(_visual(rest, source), text, scale)


def timm_name(name: str) -> str:
    """timm's name of a weight of open_clip's image tower."""
    return "head.weight" if name == "proj" else _renamed(name, _VISUAL)


def to_timm(name: str, weight: Tensor) -> Tensor:
    """A weight of open_clip's image tower, by open_clip's name, in timm's shape; no copy."""
    if name == "proj":
        return weight.transpose(0, -1)
    if name == "class_embedding":
        return weight.reshape(1, 1, -1)
    return weight[None] if name == "positional_embedding" else weight


def _renamed(key: str, parts: Mapping[str, str]) -> str:
    for old, new in parts.items():
        key = key.replace(old, new)
    return key


def _visual(tensors: dict[str, Tensor], source: str) -> dict[str, Tensor]:
    """An image tower by timm's names."""
    if "visual.class_embedding" in tensors:
        named = {key.removeprefix("visual."): value for key, value in tensors.items()}
        return _with_bias({timm_name(key): to_timm(key, value) for key, value in named.items()})
    for prefix in ("visual.trunk.", "visual.", ""):
        if f"{prefix}patch_embed.proj.weight" in tensors:
            named = {key.removeprefix(prefix): value for key, value in tensors.items()}
            if "visual.head.proj.weight" not in named:
                return named
            # what open_clip keeps beside a timm trunk without a head
            return _with_bias({key.replace("visual.head.proj.", "head."): value for key, value in named.items()})
    first = f", but {next(iter(tensors))!r} and so on" if tensors else ""
    raise UserError(
        f"{source}: no image tower of a layout that is known (OpenAI's or open_clip's CLIP with a vision transformer, "
        f"timm's, Hugging Face's CLIPModel, our own){first}"
    )


def _with_bias(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """timm's head has a bias; CLIP's projection has none."""
    if "head.weight" in tensors:
        head = tensors["head.weight"]
        tensors.setdefault("head.bias", head.new_zeros(head.shape[:1]))
    return tensors


def _from_hugging_face(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Hugging Face's names and shapes as open_clip's: three projections become one, matrices are transposed."""
    named: dict[str, Tensor] = {}
    for key, value in tensors.items():
        stem, _, kind = key.partition(".self_attn.q_proj.")
        three = [f"{stem}.self_attn.{part}_proj.{kind}" for part in "qkv"]
        if kind and all(part in tensors for part in three):
            named[f"{_renamed(stem + '.', _HUGGING_FACE)}attn.in_proj_{kind}"] = torch.cat([tensors[p] for p in three])
        elif ".self_attn.k_proj." not in key and ".self_attn.v_proj." not in key:
            named[_renamed(key, _HUGGING_FACE)] = value
    for theirs, ours in (("visual_projection.weight", "visual.proj"), ("text_projection.weight", "text_projection")):
        if theirs in named:
            named[ours] = named.pop(theirs).transpose(0, -1)
    return named
