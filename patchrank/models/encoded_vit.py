"""The layers of an image tower, one by one, with tokens leaving on the way."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from timm.models import checkpoint
from torch import Tensor

from patchrank.layers.class_token import forward_cls
from patchrank.layers.pruning import gather_to_grid, scatter_to_grid
from patchrank.layers.token_state import TokenState, first_state


class EncodedTower:
    """Part of a tower of timm's shape: runs its layers, and asks the pruning block before and in each of them."""

    def _encode(
        self,
        images: Tensor,
        scores: Tensor | None = None,
        cls_only: bool = False,
        visit: Callable[[int, Tensor, TokenState], None] | None = None,
        tokens: Tensor | None = None,
        mapped: bool = True,
    ) -> tuple[Tensor, TokenState]:
        """All blocks, with tokens leaving on the way: the last sequence (class row alone if `cls_only`) and state."""
        x = self.embed(images) if tokens is None else tokens
        state, blocks = self._begin(images, x, mapped), self._layers(self.prompts)
        for layer in range(1 if tokens is None else self.shared_layer, len(blocks) + 1):
            x, state = self._run_layer(blocks, layer, x, state, scores, cls_only)
            if visit is not None:
                visit(layer, x, state)
        return x, state

    def _begin(self, images: Tensor, x: Tensor, mapped: bool) -> TokenState:
        """The state of a sequence x (B, P + N, D) that no token has left yet; `mapped` as of `forward_pruned`."""
        if self.pruner is None:
            return first_state(x, self.num_leading_tokens, self.has_class_token)
        return self.pruner.begin(images, x, self.num_leading_tokens, self.patch_embed.patch_size, mapped)

    def _run_layer(
        self,
        blocks: Sequence[Callable],
        layer: int,
        x: Tensor,
        state: TokenState,
        scores: Tensor | None = None,
        cls_only: bool = False,
    ) -> tuple[Tensor, TokenState]:
        """A sequence and its state behind one layer, from 1; tokens leave before it or inside of it."""
        block, first, pruner = blocks[layer - 1], self.num_leading_tokens, self.pruner
        if pruner is not None:
            x, state = pruner(x, state, block, layer, first, scores)
        if cls_only and layer == len(blocks):  # of what leaves in the middle of this layer nothing is read
            return forward_cls(block, x, state.bias), state
        if pruner is None:
            return self._run(block, x), state
        return self._run(partial(pruner.run, block, state=state, layer=layer, num_leading=first, scores=scores), x)

    def _run(self, block: Callable, x: Tensor) -> Tensor:
        return checkpoint(block, x) if self.grad_checkpointing and not torch.jit.is_scripting() else block(x)

    def _full_grid(self, x: Tensor, state: TokenState) -> Tensor:
        prefix, patches = x[:, : self.num_prefix_tokens], x[:, self.num_leading_tokens :]
        if state.homes is not None:
            return torch.cat([prefix, gather_to_grid(patches, state.homes)], dim=1)
        return torch.cat([prefix, scatter_to_grid(patches, state.index, self.num_patches)], dim=1)
