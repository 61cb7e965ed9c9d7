"""Our image tower inside an open_clip model, under open_clip's own names.

There are two kinds. A `TimmModel` stays, and gets a trunk of ours around the modules that it has. open_clip's own
`VisionTransformer` is replaced by `OpenClipVisual`, whose trunk has its weights. In both `visual.trunk` is the tower,
checkpoints keep open_clip's names, and the predictor is not part of them.
"""

from __future__ import annotations

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from patchrank.models.checkpoints.key_maps import to_timm
from patchrank.models.hosts.tower import SharedTower
from patchrank.utils.errors import UserError
from patchrank.utils.private_names import hold_the_same


def to_open_clip(name: str, weight: Tensor) -> Tensor:
    """Undoes `to_timm`; no copy either, so that a state dict shows the weights in use."""
    if name == "proj":
        return weight.t().contiguous()  # copies nothing, since `to_timm` only transposed it
    if name == "class_embedding":
        return weight.flatten()
    return weight[0] if name == "positional_embedding" else weight


def with_value(parameter: nn.Parameter, value: Tensor) -> nn.Parameter:
    """The parameter itself where its shape stays (optimizers know it), or one like it around `value`."""
    return parameter if value is parameter else nn.Parameter(value.detach(), requires_grad=parameter.requires_grad)


def put(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
    """Sets the parameter of a module that has this dotted name."""
    owner, _, leaf = name.rpartition(".")
    setattr(module.get_submodule(owner), leaf, parameter)


class OpenClipTrunk(SharedTower):
    """The pruned tower inside an open_clip model."""

    def give_back(self) -> VisionTransformer:
        """What `around` was given, with the weights as they are now and the prompts that it had."""
        (trunk,) = self.original
        hold_the_same(trunk, self, without="pruner")
        for name in ("training", "grad_checkpointing", "num_classes", "global_pool"):
            setattr(trunk, name, getattr(self, name))
        if getattr(trunk, "pruner", None) is not None:  # of a tower that was ours before
            trunk.pruner.to(self.blocks[0].mlp.fc1.weight).train(trunk.training)
        return trunk


class NativeTrunk(OpenClipTrunk):
    """The pruned tower with the weights of open_clip's own.

    Modifications: precision `fp16` and `bf16` of open_clip leave class token, positions and norms in float32.
    """

    def _pos_embed(self, x: Tensor) -> Tensor:
        tokens = torch.cat([self.cls_token.to(x.dtype).expand(x.shape[0], -1, -1), x], dim=1)
        return self.pos_drop(tokens + self.pos_embed.to(x.dtype))

    def _prune(self, *args) -> None:
        super()._prune(*args)
        if self.pruner is not None:
            self.pruner.to(self.patch_embed.proj.weight.dtype)


class OpenClipVisual(nn.Module):
    """Takes the place of open_clip's `VisionTransformer`, with the same outputs and names in state dicts.

    Args:
        native: the tower that it replaces, kept for `give_back`.
        trunk: the tower with its weights.
        names: open_clip's name of every weight, and timm's.
    """

    def __init__(self, native: nn.Module, trunk: NativeTrunk, names: dict[str, str]):
        super().__init__()
        self.trunk = trunk
        self.names = names
        self.original = (native,)  # in a tuple, so that it is no part of this module
        self.training = native.training
        vars(self).update(_plain_attributes(native))

    def give_back(self) -> nn.Module:
        """open_clip's own tower again, with the weights as they are now.

        Raises:
            UserError: a weight is no longer there, since somebody replaced the layer that had it.
        """
        (native,) = self.original
        try:
            weights = {name: self.trunk.get_parameter(ours) for name, ours in self.names.items()}
        except AttributeError as error:
            raise UserError(f"unprune finds a layer of the image tower replaced, undo that first ({error})") from error
        for name, weight in weights.items():
            put(native, name, with_value(weight, to_open_clip(name, weight)))
        vars(native).update({k: v for k, v in _plain_attributes(self).items() if k not in ("names", "original")})
        native.set_grad_checkpointing(self.trunk.grad_checkpointing)
        return native.train(self.training)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Embeddings (B, E); with `output_tokens` also the normed patches (B, N, D), as `forward_features` of ours."""
        if not self.output_tokens:
            return self.trunk(x)
        features = self.trunk.forward_features(x)
        return self.trunk.forward_head(features), features[:, self.trunk.num_prefix_tokens :]

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        stop_early: bool = False,
        normalize_intermediates: bool = False,
        intermediates_only: bool = False,
        output_fmt: str = "NCHW",
        output_extra_tokens: bool = False,
    ) -> dict[str, Tensor | list[Tensor]]:
        """open_clip's, with every map on the full grid: what patches merged into, zeros where they were dropped."""
        out = self.trunk.forward_intermediates(
            x, indices, output_extra_tokens, normalize_intermediates, stop_early, output_fmt, intermediates_only, True
        )
        if not intermediates_only:
            out["image_features"] = self.trunk.forward_head(out["image_features"])
        return out

    def lock(self, unlocked_groups: int = 0, freeze_bn_stats: bool = False) -> None:
        """Freezes all but the last groups, which are open_clip's: stem, each block, last block with norm, projection.

        There are no batch norms, so `freeze_bn_stats` changes nothing, as with open_clip's own tower.
        """
        for parameter in self.parameters():
            parameter.requires_grad = False
        tower = self.trunk
        stem = [*tower.patch_embed.parameters(), tower.cls_token, tower.pos_embed, *tower.norm_pre.parameters()]
        blocks = [list(block.parameters()) for block in tower.blocks]
        blocks[-1] += tower.norm.parameters()
        groups = [stem, *blocks, [tower.head.weight]]
        for group in groups[-unlocked_groups:] if unlocked_groups else []:
            for parameter in group:
                parameter.requires_grad = True

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.trunk.set_grad_checkpointing(enable)

    def no_weight_decay(self) -> set[str]:
        return {"trunk.cls_token", "trunk.pos_embed"}

    def state_dict(self, *, destination=None, prefix: str = "", keep_vars: bool = False):
        """Modifications: open_clip's names and shapes."""
        state = super().state_dict(destination=destination, prefix=prefix, keep_vars=keep_vars)
        state.pop(f"{prefix}trunk.head.bias", None)
        for name, ours in self.names.items():
            if (key := f"{prefix}trunk.{ours}") in state:
                state[prefix + name] = to_open_clip(name, state.pop(key))
        return state

    def _load_from_state_dict(self, state_dict: dict, prefix: str, metadata, strict, missing_keys: list, *args) -> None:
        own = self.trunk.state_dict()
        state_dict[f"{prefix}trunk.head.bias"] = own["head.bias"]
        for name, ours in self.names.items():
            if prefix + name in state_dict:
                state_dict[f"{prefix}trunk.{ours}"] = to_timm(name, state_dict.pop(prefix + name))
            elif ours in own:  # reported by open_clip's name, not by ours
                missing_keys.append(prefix + name)
                state_dict[f"{prefix}trunk.{ours}"] = own[ours]
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing_keys, *args)


def _plain_attributes(module: nn.Module) -> dict:
    """A tower's other attributes: image size, preprocessing, `output_tokens`, ..."""
    return {key: value for key, value in vars(module).items() if not key.startswith("_") and key != "training"}
