"""What an image tower needs to pool tokens that merged or left."""

from __future__ import annotations

from torch import Tensor

from patchrank.layers.pooling import live_rows, pooled, reads_patches


class PooledTower:
    """Part of a tower of timm's shape: pooling that counts a token as often as it has patches."""

    def pool(self, x: Tensor, pool_type: str | None = None, sizes: Tensor | None = None) -> Tensor:
        """timm's.

        Args:
            x: (B, P + K, D), normed tokens behind P prefix tokens.
            sizes: (B, K), how many patches each token stands for; if left out, all stand for one.
        """
        if sizes is None or not reads_patches(self):
            return super().pool(x, pool_type)
        return pooled(self, x, sizes)

    def live_sizes(self, x: Tensor) -> Tensor | None:
        """1 for each patch of features on the full grid, 0 for those that left; None where all of them count."""
        if self.pruner is None or not reads_patches(self):
            return None
        on_grid = x.shape[1] == self.num_prefix_tokens + self.num_patches
        return live_rows(x[:, self.num_prefix_tokens :]) if on_grid else None
