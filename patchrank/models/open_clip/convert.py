"""From open_clip's own `VisionTransformer` to a tower of ours of the same shape."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from open_clip import transformer as theirs
from timm.layers import QuickGELU
from torch import nn

from patchrank.io import is_plain_tensor
from patchrank.layers.module_hooks import is_hooked
from patchrank.models.checkpoints.key_maps import timm_name, to_timm
from patchrank.models.open_clip.visual import NativeTrunk, OpenClipVisual, put, with_value
from patchrank.utils.errors import UserError

_NORMS = (nn.LayerNorm, theirs.LayerNorm, theirs.LayerNormFp32)


def create_visual(native: theirs.VisionTransformer, **pruning) -> OpenClipVisual:
    """A tower of the same shape, which shares its weights with `native` until one of the two is moved.

    Args:
        native: open_clip's tower; it does not change.
        **pruning: settings that a tower needs when it is built.

    Raises:
        UserError: weights that our tower does not have.
    """
    trunk = NativeTrunk(**_shape(native), weight_init="skip", device="meta", **pruning)
    if isinstance(native.ln_pre, nn.Identity):
        trunk.norm_pre = nn.Identity()
    names = _names(native, trunk)
    for name, weight in native.named_parameters():
        put(trunk, names[name], with_value(weight, to_timm(name, weight)))
    del trunk.head.bias  # CLIP's projection has none: this one stays 0, and no optimizer sees it
    trunk.head.register_buffer("bias", native.proj.new_zeros(native.proj.shape[1]).detach())
    trunk.set_grad_checkpointing(native.transformer.grad_checkpointing)
    trunk.train(native.training)
    return OpenClipVisual(native, trunk, names)


def strange_features(native: theirs.VisionTransformer) -> Iterator[str]:
    """Names of everything that `native` has and our tower cannot reproduce."""
    for name, module in native.named_modules():
        if is_hooked(module):
            yield f"hooks on {name or 'all of it'} would be lost (try to hang them on visual.trunk afterwards)"
    if not all(getattr(value, "is_meta", False) or is_plain_tensor(value) for value in native.state_dict().values()):
        yield "quantised weights (try to quantise them after prune_open_clip)"
        return
    if native.attn_pool is not None:
        yield "attentional pooling"
    elif native.pool_type != "tok":
        yield f"pool_type {native.pool_type!r}"
    if native.final_ln_after_pool and native.output_tokens:
        yield "output_tokens with final_ln_after_pool"
    if native.proj is None:
        yield "no projection"
    if not isinstance(native.patch_dropout, nn.Identity):
        yield "patch_dropout"
    if type(native.transformer) is not theirs.Transformer:
        yield f"transformer {type(native.transformer).__name__}"
    blocks = native.transformer.resblocks
    for block in blocks:
        yield from _strange_parts(block)
    norms = [native.ln_post, *(norm for block in blocks for norm in (block.ln_1, block.ln_2))]
    norms += [] if isinstance(native.ln_pre, nn.Identity) else [native.ln_pre]
    yield from (f"norm {type(norm).__name__}" for norm in norms if type(norm) not in _NORMS)
    if len({(type(norm), getattr(norm, "eps", None)) for norm in norms}) > 1:
        yield "norms of several kinds"
    acts = [block.mlp.gelu for block in blocks]
    yield from (f"activation {type(act).__name__}" for act in acts if type(act) not in (nn.GELU, theirs.QuickGELU))
    if len({(type(act), getattr(act, "approximate", None)) for act in acts}) > 1:
        yield "activations of several kinds"


def _strange_parts(block: nn.Module) -> Iterator[str]:
    if type(block) not in (theirs.ResidualAttentionBlock, theirs.CustomResidualAttentionBlock):
        yield f"block {type(block).__name__}"
        return
    attn = block.attn
    if type(attn) is theirs.Attention:  # of custom blocks, whose extras are off one by one
        extras = {"qk_norm": attn.ln_q, "scale_attn_inner": attn.ln_inner}
        extras |= {"scale_attn": block.ln_attn, "scale_fc": block.mlp.ln}
        yield from (name for name, layer in extras.items() if not isinstance(layer, nn.Identity))
        scales = {"scaled_cosine_attn": attn.logit_scale, "scale_heads": attn.head_scale}
        yield from (name for name, scale in scales.items() if scale is not None)
    elif type(attn) is not nn.MultiheadAttention:
        yield f"attention {type(attn).__name__}"


def _shape(native: theirs.VisionTransformer) -> dict:
    """timm's arguments for a tower like `native`."""
    block, (width, output_dim) = native.transformer.resblocks[0], native.proj.shape
    act, hidden = block.mlp.gelu, block.mlp.c_fc.out_features
    return {
        "img_size": native.image_size,
        "patch_size": native.patch_size,
        "embed_dim": width,
        "depth": len(native.transformer.resblocks),
        "num_heads": block.attn.num_heads,
        "mlp_ratio": (hidden + 0.5) / width,  # timm rounds down
        "init_values": 1.0 if isinstance(block.ls_1, theirs.LayerScale) else None,
        "num_classes": output_dim,
        "pre_norm": True,
        "norm_layer": partial(type(native.ln_post), eps=native.ln_post.eps),
        "act_layer": partial(nn.GELU, approximate=act.approximate) if type(act) is nn.GELU else QuickGELU,
    }


def _names(native: nn.Module, trunk: NativeTrunk) -> dict[str, str]:
    """Our name for each of open_clip's names. Raises `UserError` where names or sizes do not match one to one."""
    names = {name: timm_name(name) for name in native.state_dict()}
    ours = {name: weight.shape for name, weight in trunk.state_dict().items() if name != "head.bias"}
    given = {names[name]: to_timm(name, weight).shape for name, weight in native.state_dict().items()}
    for name in sorted(set(ours) ^ set(given)) or [name for name in ours if ours[name] != given[name]]:
        raise UserError(
            f"prune_open_clip cannot take this image tower: its weight {name!r} (timm's name) is "
            f"{list(given.get(name, []))}, but a tower of its shape has {list(ours.get(name, []))} ([]: none)"
        )
    return names
