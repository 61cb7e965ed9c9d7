"""What an image tower needs to carry visual prompts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from timm.models import get_model_args
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from patchrank.layers.norm_gains import Hooked, gain_hooks, hook
from patchrank.layers.prompts import count_visual, insert, remove
from patchrank.layers.pruning_block import check_grid
from patchrank.models.prompt_files import check_tower, load_visual
from patchrank.utils.private_names import update_model_args


class PromptedTower:
    """Part of a tower of timm's shape: learned tokens between its prefix and its patches.

    Sequence order is `[CLS, registers, visual prompts, patches]`; `num_prefix_tokens` keeps timm's meaning.
    """

    num_prompt_tokens = 0
    _prompts: tuple[nn.Module, ...] = ()  # in a tuple, so that they are no part of the tower's weights
    _hooks: tuple[Hooked, ...] = ()  # gains of the prompts, and the norms that they belong to
    _hooked: tuple[RemovableHandle, ...] = ()

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
            UserError: they are of another width, have no visual part, or come from a file for another tower; or this
                one changes its number of patches.
        """
        if prompts is not None:
            check_tower(self, prompts)
        self._hold(prompts)
        if "prompts_path" in get_model_args(self):
            update_model_args(self, prompts_path=None)

    @contextmanager
    def unprompted(self) -> Iterator[None]:
        """The tower without its learned tokens and gains, for the length of a block."""
        before = self._prompts, self._hooks, self.num_prompt_tokens
        self._insert((), (), 0)
        try:
            yield
        finally:
            self._insert(*before)

    def check_prompts(self) -> None:
        """Refuses prompts from a file that were tuned with other weights than this tower's."""
        for prompts in self._prompts:
            check_tower(self, prompts)

    def _read_prompts(self, path: str | Path) -> None:
        """From a file, before the tower has the weights that would tell whether they are for it."""
        self._hold(load_visual(path))

    def _hold(self, prompts: nn.Module | None) -> None:
        if prompts is not None:
            check_grid(self, "a visual prompt")
        count = 0 if prompts is None else count_visual(prompts, self.embed_dim)
        gains = getattr(prompts, "norm_gains", None)
        hooks = () if gains is None else tuple(gain_hooks(self, gains))
        self._insert(() if prompts is None else (prompts,), hooks, count)

    def _insert(self, prompts: tuple[nn.Module, ...], hooks: tuple[Hooked, ...], count: int) -> None:
        """What is known to fit."""
        for handle in self._hooked:
            handle.remove()
        self._prompts, self._hooks, self.num_prompt_tokens = prompts, hooks, count
        self._hooked = hook(hooks)

    def _with_prompts(self, x: Tensor) -> Tensor:
        """Prefix and patches (B, P + N, D) with the prompts in between; they have no position."""
        for prompts in self._prompts:
            x = insert(x, prompts.visual(), self.num_prefix_tokens)
        return x

    def _without_prompts(self, x: Tensor) -> Tensor:
        """A sequence, or its class row alone, as timm knows it."""
        return remove(x, self.num_prefix_tokens, self.num_prompt_tokens)
