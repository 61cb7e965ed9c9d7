"""The position prior: one ranking for all images, the control that a predictor must beat."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor, nn

from patchrank.layers.predictors.base import register_predictor
from patchrank.utils.errors import UserError


@register_predictor("prior")
class Prior(nn.Module):
    """The same scores for every image; it reads neither tokens nor class token.

    `create_predictor` makes one whose scores are 0, to load a file's into; `from_scores` makes a fitted one.
    """

    def __init__(self, embed_dim: int, grid_size: tuple[int, int]):
        super().__init__()
        self.register_buffer("scores", torch.zeros(math.prod(grid_size)))

    @classmethod
    def from_scores(cls, scores: np.ndarray | Tensor, embed_dim: int, grid_size: tuple[int, int]) -> Prior:
        """A prior of given scores (N,), high = keep, say the mean golden map of training images.

        Raises:
            UserError: the scores do not fit the grid.
        """
        prior = cls(embed_dim, grid_size)
        scores = torch.as_tensor(scores, dtype=torch.float32)
        if scores.shape != prior.scores.shape:
            shape = tuple(scores.shape)
            raise UserError(f"a prior on a grid of {grid_size} needs {len(prior.scores)} scores, but has shape {shape}")
        prior.scores.copy_(scores)
        return prior.eval()

    def forward(self, cls: Tensor, patches: Tensor) -> Tensor:
        """Scores (B, N), high = keep; patches (B, N, D) say how many images there are, the rest is not used."""
        return self.scores.expand_as(patches[..., 0])

    def num_macs(self) -> int:
        """Nothing is multiplied."""
        return 0
