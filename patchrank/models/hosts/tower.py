"""Our tower around the modules of somebody's model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy

from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from patchrank.layers.pooling import reads_patches
from patchrank.layers.repair import check_head
from patchrank.layers.token_state import TokenState
from patchrank.models.hosts.repaired import End
from patchrank.models.hosts.runner import Output
from patchrank.models.pruned_vit import PrunedVisionTransformer
from patchrank.models.pruning_cfg import Pruning
from patchrank.utils.errors import UserError
from patchrank.utils.private_names import share_weights


class SharedTower(PrunedVisionTransformer):
    """A pruned tower of the very modules and parameters of another.

    Modifications: its predictor has a file of its own and is no part of the model's state dict.
    """

    @classmethod
    def around(cls, trunk: VisionTransformer) -> SharedTower:
        """A tower of the very modules and parameters of `trunk`, which stays as it is."""
        self = cls.__new__(cls)
        vars(self).update({key: copy(x) if isinstance(x, (dict, set)) else x for key, x in vars(trunk).items()})
        self.original = (trunk,)  # in a tuple, so that it is no part of this module
        if not isinstance(trunk, PrunedVisionTransformer):
            self.pruning, self.pruner = Pruning(), None
        return self

    def state_dict(self, *, destination=None, prefix: str = "", keep_vars: bool = False):
        state = super().state_dict(destination=destination, prefix=prefix, keep_vars=keep_vars)
        for key in [key for key in state if key.startswith(f"{prefix}pruner.")]:
            del state[key]
        return state

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args) -> None:
        if self.pruner is not None:
            state_dict.update(self.pruner.state_dict(prefix=f"{prefix}pruner."))
        super()._load_from_state_dict(state_dict, prefix, *args)


class HostedTower(SharedTower):
    """The tower that runs the layers of a model which goes on running the rest itself.

    Modifications: reducers see tokens instead of pixels, since layers of a host see no pixels; so `random` draws by the
    bits of the first tokens, which may differ in the last place between batches of other sizes. The last block computes
    all tokens, since the host may read any.
    """

    output: Output = "grid"
    hooked: tuple[tuple[nn.Module, str, nn.Module], ...] = ()  # who has what hooks hang on, and by which name
    grid: tuple[int, int] | None = None  # that pruning was set for
    end: End | None = None  # where the host's own call meets a repair; None where it gives no embedding

    @classmethod
    def around(cls, trunk: VisionTransformer) -> HostedTower:
        """As of every shared tower."""
        self = super().around(trunk)
        share_weights(self, trunk)
        self.pruning = Pruning(cls_only_last=False)
        return self

    def set_prompts(self, prompts: nn.Module | None) -> None:
        """Refused, since the model itself makes its first tokens. Raises `UserError`."""
        raise UserError("prompts do not go into a model that was pruned in place; try an entry of timm.create_model")

    def asked(self, options: dict) -> dict:
        """What a host asks its layers for, beside tokens."""
        return options

    def first_averaged(self) -> int | None:
        """The place of the first token that the host averages; None where it averages none."""
        (host,) = self.original
        if host.global_pool != "avg":
            return None
        return 0 if host.pool_include_prefix else host.num_prefix_tokens

    def host_layers(self) -> list[nn.Module]:
        """The layers that the host has now."""
        (host,) = self.original
        return list(host.blocks.children())

    def check_host(self) -> None:
        """Raises `UserError` where the host is no longer the model that was pruned."""
        replaced = [name for owner, name, module in self.hooked if getattr(owner, name) is not module]
        if len(self.host_layers()) != len(self.blocks):
            replaced.append("list of layers")
        if self.grid != self.patch_embed.grid_size:
            replaced.append("image size")
        if self.repair is not None and self.end.is_replaced():
            replaced.append(self.end.name)
        if replaced:
            raise UserError(f"the model's {replaced[0]} was changed; try patchrank.unprune before that, and prune anew")
        if self.host_checkpoints():
            raise UserError(
                "gradient checkpointing of the model does not go together with pruning; try "
                "set_grad_checkpointing(False), and patchrank.find_tower(model).set_grad_checkpointing(True) instead"
            )

    def check_steps(self) -> None:
        """Raises `UserError` where layers cannot be run one by one, since what they give is no grid."""
        if self.output == "kept":
            raise UserError("output 'kept' gives no features between layers; try patchrank.prune(model, output='grid')")
        self.check_host()

    def host_checkpoints(self) -> bool:
        """Whether the host itself would run its layers a second time for gradients, which steps cannot."""
        (host,) = self.original
        return host.grad_checkpointing

    def _layers(self, prompts: nn.Module | None) -> Sequence[Callable]:
        return self.host_layers()

    def _prune(self, changes: dict, predictor: nn.Module | None = None) -> None:
        before = self.pruning, self.pruner, self._ranker
        super()._prune(changes, predictor)
        try:
            self._check_hosted()
        except UserError:
            self.pruning, self.pruner, self._ranker = before
            raise
        self.grid = self.patch_embed.grid_size
        if self.repair is not None:
            self.end.hang()

    def _check_hosted(self) -> None:
        if self.pruning.cls_only_last:
            raise UserError("cls_only_last: a model that was pruned in place may read any token; try it without")
        if self.pruning.repair_path is not None and self.end is None:
            (host,) = self.original
            raise UserError(
                f"repair_path: this {type(host).__name__} has no pooler, and its embedding is one of all tokens, which "
                "stay as they are; try a model with a pooler or a classifier"
            )
        if self.pruner is None:
            return
        if "pixels" in self.pruner.reducer.needs:
            name = self.pruning.reducer
            raise UserError(f"reducer {name!r} reads pixels, which the layers of this model do not see; try center")
        if self.output == "kept" and reads_patches(self) and self.pruner.merges:
            lost = "how many patches a token stands for, by which this model pools"
            raise UserError(f"output 'kept' does not tell {lost}; try output='grid', or a reducer that drops")

    def _project(self, x: Tensor) -> Tensor:
        """The head by itself: hooks on it that bring the repair are for the host's own call."""
        if self.repair is None:
            return self.head(x)
        check_head(self.head)
        return self.head.forward(x)

    def _begin(self, images: Tensor, x: Tensor, mapped: bool) -> TokenState:
        return super()._begin(x, x, mapped)
