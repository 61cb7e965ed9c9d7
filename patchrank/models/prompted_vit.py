"""What an image tower needs to carry visual prompts."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

from timm.models import get_model_args
from torch import Tensor, nn
from torch.fx import Proxy

from patchrank.layers.module_hooks import is_hooked
from patchrank.layers.norm_gains import check_gains, gained_blocks, scaled_norm
from patchrank.layers.prompts import count_visual, insert, remove
from patchrank.layers.prunable import check_grid
from patchrank.models.prompt_files import check_tower
from patchrank.utils.errors import UserError
from patchrank.utils.private_names import update_model_args


class PromptedTower:
    """Part of a tower of timm's shape: learned tokens between its prefix and its patches.

    Sequence order is `[CLS, registers, visual prompts, patches]`; `num_prefix_tokens` keeps timm's meaning. Each
    forward is told which prompts to use and changes nothing, so that several threads may run forwards of one tower.
    """

    num_prompt_tokens = 0
    _prompts: tuple[nn.Module, ...] = ()  # in a tuple, so that they are no part of the tower's weights

    @property
    def prompts(self) -> nn.Module | None:
        """The learned tokens in use."""
        return self._prompts[0] if self._prompts else None

    @property
    def num_leading_tokens(self) -> int:
        """Where patches begin in a sequence: after class and register tokens and visual prompts."""
        return self.num_prefix_tokens + self.num_prompt_tokens

    def set_prompts(self, prompts: nn.Module | None) -> None:
        """Inserts learned tokens into every sequence from now on; None takes them out again.

        They stay a module of their own, which gradients reach: the tower's weights, fingerprints and files do not
        change. Nothing changes if anything is wrong.

        Args:
            prompts: with `visual()`, (b, D), and perhaps `norm_gains`; see `patchrank.layers.prompts.Prompts`.

        Raises:
            UserError: they are no prompts, of another width, have no visual part, or come from a file for another
                tower; or this one changes its number of patches.
        """
        if not isinstance(prompts, nn.Module | None) or (prompts is not None and not hasattr(prompts, "visual")):
            what = f"but got a {type(prompts).__name__}; try load_visual(FILE), from patchrank.models.prompt_files"
            raise UserError(f"set_prompts takes a layer of prompts or None, {what}")
        if prompts is not None:
            check_tower(self, prompts)
        self._hold(prompts)
        if "prompts_path" in get_model_args(self):
            update_model_args(self, prompts_path=None)

    def check_prompts(self) -> None:
        """Refuses prompts from a file that were tuned with other weights than this tower's."""
        if self.prompts is not None:
            check_tower(self, self.prompts)

    def _hold(self, prompts: nn.Module | None) -> None:
        """As `set_prompts`, but does not ask which weights they were tuned with: a tower that is built has none yet."""
        count = 0
        if prompts is not None:
            check_grid(self, "a visual prompt")
            count = count_visual(prompts, self.embed_dim)
            if (gains := _gains_of(prompts)) is not None:
                check_gains(self, gains)
        before = self._prompts, self.num_prompt_tokens
        self._prompts, self.num_prompt_tokens = () if prompts is None else (prompts,), count
        try:
            if self.pruning.align > 1:  # prompts count in the length of sequences, which its schedule rounds
                self._prune({})
        except BaseException:
            self._prompts, self.num_prompt_tokens = before
            raise

    def _embed(self, images: Tensor, prompts: nn.Module | None) -> Tensor:
        """Images (B, 3, H, W) to the tokens (B, P + N, D) that enter layer 1; prompts have no position."""
        x = self._first_tokens(images)
        if prompts is None:
            return self.norm_pre(x)
        if isinstance(x, Proxy):
            raise UserError(
                "torch.fx cannot follow learned prompts, which are no part of the tower: try hooks or "
                "`forward_intermediates`, or take the prompts out with set_prompts(None)"
            )
        x = insert(x, prompts.visual(), self.num_prefix_tokens)
        return scaled_norm(self.norm_pre, x, _gains_of(prompts), 0)

    def _first_tokens(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) to class token, registers and patches (B, P + N, D), with their positions."""
        return self.patch_drop(self._pos_embed(self.patch_embed(images)))

    def _layers(self, prompts: nn.Module | None) -> Sequence[Callable]:
        """The blocks, as they run with the gains that come with the prompts."""
        if is_hooked(self.blocks):
            warnings.warn(
                "hooks on `blocks` as a whole do not run here, since layers run one by one: try hooks on single blocks",
                stacklevel=4,
            )
        gains = _gains_of(prompts)
        return self.blocks if gains is None else gained_blocks(self, gains)

    def _last_norm(self, x: Tensor, prompts: nn.Module | None) -> Tensor:
        return scaled_norm(self.norm, x, _gains_of(prompts), -1)

    def _embedding(
        self,
        x: Tensor,
        prompts: nn.Module | None,
        repaired: bool,
        sizes: Tensor | None = None,
        pre_logits: bool = False,
    ) -> Tensor:
        """What the head, or a repair, makes of the last sequence, or of its class row alone; no prompt is pooled."""
        if prompts is not None:
            x = remove(x, self.num_prefix_tokens, self.num_prompt_tokens)
        x = self._last_norm(x, prompts)
        return self._head_of(x, sizes, pre_logits, repaired)


def _gains_of(prompts: nn.Module | None) -> Tensor | None:
    return getattr(prompts, "norm_gains", None)
