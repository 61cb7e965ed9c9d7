"""Small models of other libraries with random weights, and what their own modules give where patches are masked."""

from collections.abc import Callable

import timm
import torch
from torch import Tensor, nn

SIDE, PATCH, DIM, DEPTH, HEADS = 32, 8, 32, 4, 4
NUM_PATCHES = (SIDE // PATCH) ** 2
TIMM = dict(img_size=SIDE, patch_size=PATCH, embed_dim=DIM, depth=DEPTH, num_heads=HEADS)
OF_TIMM = {
    "timm vit": ("vit_base_patch16_224", dict(num_classes=5)),
    "timm average": ("vit_base_patch16_224", dict(num_classes=5, global_pool="avg")),
    "timm average without class token": (
        "vit_base_patch16_224",
        dict(num_classes=5, global_pool="avg", class_token=False, reg_tokens=2, fc_norm=False),
    ),
    "timm siglip": ("vit_base_patch16_siglip_224", dict(num_classes=0)),
    "timm clip": ("vit_base_patch16_clip_224", dict(num_classes=24)),
    "timm dinov2": ("vit_small_patch14_reg4_dinov2", dict(num_classes=0, init_values=0.5)),
    "timm deit": ("deit_small_patch16_224", dict(num_classes=5)),
}
HF = dict(hidden_size=DIM, num_hidden_layers=DEPTH, num_attention_heads=HEADS, image_size=SIDE, patch_size=PATCH)
OF_TRANSFORMERS = {
    "CLIPVisionModel": ("CLIPVisionConfig", dict(intermediate_size=2 * DIM)),
    "CLIPVisionModelWithProjection": ("CLIPVisionConfig", dict(intermediate_size=2 * DIM, projection_dim=24)),
    "SiglipVisionModel": ("SiglipVisionConfig", dict(intermediate_size=2 * DIM)),
    "Dinov2Model": ("Dinov2Config", dict(mlp_ratio=2, layerscale_value=0.5)),
    "Dinov2WithRegistersModel": (
        "Dinov2WithRegistersConfig",
        dict(mlp_ratio=2, layerscale_value=0.5, num_register_tokens=3),
    ),
    "ViTModel": ("ViTConfig", dict(intermediate_size=2 * DIM)),
}
HOSTS = [*OF_TIMM, *OF_TRANSFORMERS]
WITHOUT_CLASS_TOKEN = ("timm average without class token", "timm siglip", "SiglipVisionModel")


def create(name: str, noise: float = 0.05, **changes) -> nn.Module:
    """A small model by its name in `HOSTS`, in evaluation mode, with weights large enough to tell patches apart."""
    torch.manual_seed(0)
    if name in OF_TIMM:
        entry, settings = OF_TIMM[name]
        model = timm.create_model(entry, **TIMM | settings | changes)
    else:
        import transformers

        config, settings = OF_TRANSFORMERS[name]
        model = getattr(transformers, name)(getattr(transformers, config)(**HF | settings | changes))
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(noise * torch.randn_like(weight))
    return model.eval()


def images(count: int = 3, side: int = SIDE) -> Tensor:
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(1))


def embedding(model: nn.Module, x: Tensor) -> Tensor:
    """What a model's own call gives as its embedding or logits."""
    return embedding_of(model(x), model)


def embedding_of(out: object, model: nn.Module) -> Tensor:
    """The embedding or logits in what a model gave."""
    if isinstance(out, Tensor):
        return out
    if type(model).__name__ == "ViTModel":  # its pooler adds a layer of its own
        return out.last_hidden_state[:, 0]
    return out.image_embeds if "image_embeds" in out else out.pooler_output


def masked(model: nn.Module, x: Tensor, kept: Tensor, layer: int, num_patches: int = NUM_PATCHES) -> Tensor:
    """The embedding by the model's own modules, with all patches but those `kept` (B, K) masked from a layer on."""
    live = torch.zeros(len(x), num_patches).scatter(1, kept, 1.0)
    way = _masked_timm if isinstance(model, timm.models.VisionTransformer) else _masked_hf
    return way(model, x, live, layer)


def _bias(live: Tensor, length: int) -> Tensor:
    """(B, 1, 1, L), what is added to logits of attention, with zeros for the tokens before the patches."""
    return nn.functional.pad(live, (length - live.shape[1], 0), value=1.0).log()[:, None, None]


def _layers(layers: Callable, x: Tensor, live: Tensor, layer: int, call: Callable) -> Tensor:
    for place, block in enumerate(layers, 1):
        x = call(block, x, None if place < layer else _bias(live, x.shape[1]))
    return x


def _masked_timm(model: nn.Module, x: Tensor, live: Tensor, layer: int) -> Tensor:
    x = model.norm_pre(model._pos_embed(model.patch_embed(x)))
    x = model.norm(_layers(model.blocks, x, live, layer, lambda block, x, mask: block(x, attn_mask=mask)))
    first = model.num_prefix_tokens
    if model.attn_pool is not None:
        pooled = model.attn_pool(x[:, first:], attn_mask=live.log()[:, None, None])
    elif model.global_pool == "avg":
        pooled = (x[:, first:] * live[..., None]).sum(1) / live.sum(1, keepdim=True)
    else:
        pooled = x[:, 0]
    return model.head(model.fc_norm(pooled))


def core_of(model: nn.Module) -> nn.Module:
    """The module of a model of transformers that has its layers; in 4.57 it is one inside, in later releases itself."""
    return getattr(model, "vision_model", model)


def _masked_hf(model: nn.Module, x: Tensor, live: Tensor, layer: int) -> Tensor:
    core = core_of(model)
    x = core.embeddings(x)
    x = core.pre_layrnorm(x) if hasattr(core, "pre_layrnorm") else x
    holder = getattr(core, "encoder", core)
    layers = holder.layers if hasattr(holder, "layers") else holder.layer
    x = _layers(layers, x, live, layer, _call_hf)
    x = (core.post_layernorm if hasattr(core, "post_layernorm") else core.layernorm)(x)
    if hasattr(core, "head"):
        return _siglip_head(core.head, x, live)
    return model.visual_projection(x[:, 0]) if hasattr(model, "visual_projection") else x[:, 0]


def _call_hf(block: nn.Module, x: Tensor, mask: Tensor | None) -> Tensor:
    causal = {"causal_attention_mask": None} if type(block).__name__.startswith("CLIP") else {}  # 4.57 asks for it
    out = block(x, mask, **causal)
    return out[0] if isinstance(out, tuple) else out


def _siglip_head(head: nn.Module, x: Tensor, live: Tensor) -> Tensor:
    probe = head.probe.repeat(len(x), 1, 1)
    pooled = head.attention(probe, x, x, key_padding_mask=live == 0)[0]
    return (pooled + head.mlp(head.layernorm(pooled)))[:, 0]


def pooled(output: object) -> Tensor:
    """The embedding in what features of an image or a text are: before transformers 5 they are it themselves."""
    return getattr(output, "pooler_output", output)
