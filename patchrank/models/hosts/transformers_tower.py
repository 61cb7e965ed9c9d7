"""A tower of timm's shape made of the modules of an image tower of transformers."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from timm.layers import AttentionPoolLatent
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from patchrank.layers.macs import check_costs
from patchrank.models.hosts.tower import HostedTower, SharedTower
from patchrank.models.pruning_cfg import Pruning
from patchrank.utils.errors import UserError
from patchrank.utils.private_names import has_others_hooks

# Parts of a layer by timm's names, and what they are called in the releases of transformers; "" for one that may not
# be there. In ViT and DINOv2, 4.57 has an attention inside `attention`, and an `output` behind it.
PARTS = {
    "norm1": ("layer_norm1", "norm1", "layernorm_before"),
    "attn.proj": ("self_attn.out_proj", "attention.o_proj", "attention.output.dense"),
    "attn.proj_drop": ("attention.output.dropout", ""),
    "ls1": ("layer_scale1", ""),
    "drop_path1": ("drop_path", "dropout", ""),
    "norm2": ("layer_norm2", "norm2", "layernorm_after"),
    "mlp": ("mlp", ""),
    "ls2": ("layer_scale2", ""),
    "drop_path2": ("drop_path", "dropout", ""),
}
ATTENTION = ("self_attn", "attention")
Tower = TypeVar("Tower", bound=SharedTower)
INPUTS = (("q_proj", "attention.query"), ("k_proj", "attention.key"), ("v_proj", "attention.value"))
DROPOUT = ("attention_dropout", "dropout", "attention.dropout_prob")  # of attention, a rate
WHOLE = (ATTENTION, ("attention.attention", ""), ("attention.output", ""), ("output", ""))  # run part by part here


class Joined(nn.Module):
    """Queries, keys and values (B, L, 3 D) of tokens (B, L, D), by the three projections that an attention has now."""

    def __init__(self, attention: nn.Module):
        super().__init__()
        self.attention = attention  # its projections may be replaced (LoRA), so they are looked up at each call

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([find(self.attention, names)(x) for names in INPUTS], dim=-1)


class Halves(nn.Module):
    """The MLP of a ViT of transformers 4.57, whose second half adds what comes from before the norm by itself."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.intermediate, self.output = layer.intermediate, layer.output

    def forward(self, x: Tensor) -> Tensor:
        return self.output.dropout(self.output.dense(self.intermediate(x)))

    def is_of(self, layer: nn.Module) -> bool:
        """Whether these are the halves that a layer has now."""
        return self.intermediate is layer.intermediate and self.output is layer.output


class Rows(nn.Module):
    """A linear layer of some rows of the weight that `nn.MultiheadAttention` has for all three."""

    def __init__(self, attention: nn.MultiheadAttention, rows: slice):
        super().__init__()
        self.attention, self.rows = attention, rows
        self.in_features = attention.embed_dim
        self.out_features = len(range(*rows.indices(3 * attention.embed_dim)))

    def forward(self, x: Tensor) -> Tensor:
        attention, rows = self.attention, self.rows
        return F.linear(x, attention.in_proj_weight[rows], attention.in_proj_bias[rows])


class OfTransformers:
    """Part of a tower of the parts that a model of transformers has, whose first tokens that model makes."""

    def _first_tokens(self, images: Tensor) -> Tensor:
        (core,) = self.original
        resized = self.patch_embed.img_size[0] != core.config.image_size
        takes = "interpolate_pos_encoding" in inspect.signature(core.embeddings.forward).parameters
        how = {"interpolate_pos_encoding": True} if resized and takes else {}  # DINOv2 does it unasked
        return core.embeddings(images, **how)

    def _keeps_all(self) -> bool:
        return False  # timm's own way makes first tokens of other parts


class StandaloneTower(OfTransformers, SharedTower):
    """Our tower of the parts that a model of transformers has, for whoever runs the tower and not that model."""


class TransformersTower(OfTransformers, HostedTower):
    """Our tower of the parts that a model of transformers has. What is replaced there (LoRA) is replaced here."""

    def asked(self, options: dict) -> dict:
        (core,) = self.original
        usual = {name: getattr(core.config, name, None) for name in ("output_hidden_states", "output_attentions")}
        return usual | {name: value for name, value in options.items() if value is not None}

    def first_averaged(self) -> int | None:
        return None

    def host_layers(self) -> list[nn.Module]:
        (core,) = self.original
        return list(layers_of(core))

    def check_steps(self) -> None:
        self.check_host()  # ViT runs its layers one by one, and what it keeps is the last one's alone

    def host_checkpoints(self) -> bool:
        return False  # `_layers` takes checkpointing over

    def _layers(self, prompts: nn.Module | None) -> Sequence[Callable]:
        layers = self.host_layers()
        for block, layer in zip(self.blocks, layers):
            check_unhooked(layer)
            place_parts(block, layer)
        self.grad_checkpointing = any(getattr(layer, "gradient_checkpointing", False) for layer in layers)
        return self.blocks


def create_tower(
    core: nn.Module,
    norm: str,
    projection: nn.Module | None,
    img_size: int | None,
    kind: type[Tower] = TransformersTower,
) -> Tower:
    """A tower around an image tower of transformers.

    Args:
        core: the module that has `embeddings`, layers and a last norm.
        norm: name of that norm.
        projection: what follows the pooled embedding, if anything does.
        img_size: side of the images in pixels; of the config if left out.
        kind: of the tower.

    Raises:
        UserError: a part that ours does not reproduce.
    """
    config, layers = core.config, list(layers_of(core))
    if img_size is not None and (type(img_size) is not int or img_size < config.patch_size):
        raise UserError(
            f"img_size must be a side of at least {config.patch_size} pixels, one patch, but is {img_size!r}"
        )
    names = [name for name, _ in core.embeddings.named_parameters()]
    has_class_token = any(part in name for part in ("cls_token", "class_embedding") for name in names)
    if not has_class_token and not getattr(core, "use_head", False):
        raise UserError(f"{type(core).__name__} without a pooling head gives no embedding; try vision_use_head=True")
    tower = kind(
        img_size=img_size or config.image_size,
        patch_size=config.patch_size,
        in_chans=config.num_channels,
        embed_dim=config.hidden_size,
        depth=len(layers),
        num_heads=config.num_attention_heads,
        num_classes=0,
        class_token=has_class_token,
        reg_tokens=getattr(config, "num_register_tokens", 0),
        no_embed_class=True,
        global_pool="token" if has_class_token else "map",
        weight_init="skip",
        device="meta",
        locations=(1,),
        cls_only_last=False,
    )
    tower.pruning = Pruning(cls_only_last=False) if kind is TransformersTower else Pruning()
    tower.original = (core,)
    tower.cls_token = tower.reg_token = None
    blocks = [adapted(layer, config.hidden_size, config.num_attention_heads) for layer in layers]
    tower.blocks = nn.Sequential(*blocks)
    check_costs(tower.blocks)
    for layer in layers:
        check_unhooked(layer)
    fill(tower, core, norm, projection)
    return tower


def fill(tower: TransformersTower, core: nn.Module, norm: str, projection: nn.Module | None) -> None:
    """Gives a tower what a model has now beside its layers; arguments as of `create_tower`."""
    (tower.pos_embed,) = [value for name, value in core.embeddings.named_parameters() if "position" in name]
    tower.patch_embed.proj = next(module for module in core.embeddings.modules() if isinstance(module, nn.Conv2d))
    tower.embeddings, tower.norm = core.embeddings, getattr(core, norm)
    tower.norm_pre = getattr(core, "pre_layrnorm", tower.norm_pre)
    if tower.global_pool == "map":
        tower.attn_pool = adapted_pool(core.head)
    if projection is not None:
        tower.head, tower.num_classes = projection, projection.out_features
    tower.training = core.training


def layers_of(core: nn.Module) -> nn.Module:
    """The layers of an image tower, whichever module has them."""
    holder = getattr(core, "encoder", core)
    found = getattr(holder, "layers", None)
    found = getattr(holder, "layer", None) if found is None else found
    return found.children()


def adapted(layer: nn.Module, dim: int, num_heads: int) -> Block:
    """A block of timm's with the parts of a layer. Raises `UserError` for one that lacks a part."""
    block = Block(dim, num_heads, device="meta")
    attention = find(layer, ATTENTION)
    block.attn.qkv = Joined(attention)
    block.attn.attn_drop.p = float(find(attention, (*DROPOUT, "")) or 0.0)
    place_parts(block, layer)
    return block


def check_unhooked(layer: nn.Module) -> None:
    """Raises `UserError` where something hangs on a layer or its attention, whose parts run one by one here."""
    for module in filter(None, (layer, *(find(layer, names) for names in WHOLE))):
        if is_changed(module):
            raise UserError(
                f"hooks or a forward of its own on {type(module).__name__} would not run in a pruned model; try to "
                "hang them on its norms, projections or mlp"
            )


def is_changed(module: nn.Module) -> bool:
    """Whether a module has hooks of a user's, or another forward than its class.

    transformers 4.57 leaves the class's own forward on a module that it looked into for `output_hidden_states`.
    """
    own = vars(module).get("forward")  # compared by parts, since torch.compile cannot follow a method being made
    is_its_class = getattr(own, "__func__", None) is type(module).forward and own.__self__ is module
    return not (own is None or is_its_class) or has_others_hooks(module, known="transformers.")


def place_parts(block: Block, layer: nn.Module) -> None:
    """Gives a block the parts and the mode that a layer has now."""
    for own in (block, block.attn, block.attn.attn_drop):
        own.training = find(layer, ATTENTION).training
    for name, theirs in PARTS.items():
        owner, _, leaf = name.rpartition(".")
        owner, part = block.get_submodule(owner), find(layer, theirs)
        if part is not None and getattr(owner, leaf) is not part:
            setattr(owner, leaf, part)
    if not hasattr(layer, "mlp") and not (isinstance(block.mlp, Halves) and block.mlp.is_of(layer)):
        block.mlp = Halves(layer)


def find(layer: nn.Module, names: Sequence[str]) -> Any:
    """The first part of a layer that there is by one of some dotted names; None where "" is among them."""
    for name in names:
        part: Any = layer
        for leaf in name.split(".") if name else ():
            part = getattr(part, leaf, None)
        if not name or part is not None:
            return part if name else None
    raise UserError(
        f"{type(layer).__name__} has none of {', '.join(names)}, so ours cannot run it; try another version"
    )


def adapted_pool(head: nn.Module) -> AttentionPoolLatent:
    """timm's attention pooling with the parts of SigLIP's head."""
    attention, dim = head.attention, head.attention.embed_dim
    pool = AttentionPoolLatent(dim, num_heads=attention.num_heads, norm_layer=nn.LayerNorm, device="meta")
    pool.latent = head.probe
    pool.q, pool.kv = Rows(attention, slice(0, dim)), Rows(attention, slice(dim, 3 * dim))
    pool.proj, pool.norm, pool.mlp = attention.out_proj, head.layernorm, head.mlp
    return pool
