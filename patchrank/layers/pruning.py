"""What pruning is made of: pure functions on tensors, no modules and no state.

Shapes: B images, N patch tokens of the full grid, K tokens still alive, D width, W windows, r window side.
Scores are "high = keep"; damage is "high = removal hurts" (the complement of the paper's s, eq. 1 to 3).
"""

from __future__ import annotations

import torch
from torch import Tensor

from patchrank.utils.errors import UserError


def rank(scores: Tensor) -> Tensor:
    """Token indices from the highest score to the lowest, (B, K); among ties the lower index comes first."""
    return scores.argsort(dim=-1, descending=True, stable=True)


def take(x: Tensor, index: Tensor) -> Tensor:
    """Picks rows `index` (B, K) of `x` (B, N) or (B, N, D)."""
    if x.ndim == 2:
        return x.gather(1, index)
    # whole rows are copied at once, five times as fast on a CPU as `gather`, which looks an index up for every number
    starts = torch.arange(x.shape[0], device=index.device) * x.shape[1]
    rows = (index + starts[:, None]).flatten()
    return x.flatten(0, 1).index_select(0, rows).unflatten(0, index.shape)


def patches_of(images: Tensor, patch_size: tuple[int, int]) -> Tensor:
    """Pixels of every patch, row by row: images (B, C, H, W) to (B, N, C * P * P)."""
    height, width = patch_size
    patches = images.unfold(2, height, height).unfold(3, width, width)  # (B, C, rows, columns, P, P)
    return patches.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)


def scatter_to_grid(tokens: Tensor, index: Tensor, num_tokens: int) -> Tensor:
    """Puts tokens (B, K, D) back at their places (B, K) in the full grid (B, N, D); zeros where dropped."""
    grid = tokens.new_zeros(tokens.shape[0], num_tokens, tokens.shape[-1])
    return grid.scatter(1, index.unsqueeze(-1).expand_as(tokens), tokens)


def gather_to_grid(tokens: Tensor, homes: Tensor) -> Tensor:
    """Gives each patch of the full grid the token that it lives in: (B, N, D); zeros where it was dropped.

    Args:
        tokens: (B, K, D).
        homes: (B, N), places among them, -1 where a patch was dropped.
    """
    return torch.where(homes.unsqueeze(-1) >= 0, take(tokens, homes.clamp(min=0)), 0.0)


def windows(grid_size: tuple[int, int], window: int, stride: int = 1) -> Tensor:
    """Token indices of every window x window square of the grid, row by row: (W, window * window) (section 3.1).

    Raises:
        UserError: the window is larger than the grid, or the stride leaves tokens that no window covers.
    """
    height, width = grid_size
    if not 1 <= window <= min(grid_size):
        raise UserError(f"window must lie in 1..{min(grid_size)} on a {height} x {width} grid, but is {window}")
    if stride < 1:
        raise UserError(f"stride must be at least 1, but is {stride}")
    squares = torch.arange(height * width).view(height, width).unfold(0, window, stride).unfold(1, window, stride)
    squares = squares.reshape(-1, window * window)
    uncovered = height * width - squares.unique().numel()
    if uncovered:
        raise UserError(
            f"window {window} at stride {stride} leaves {uncovered} tokens of the {height} x {width} grid uncovered; "
            f"stride 1 covers all"
        )
    return squares


def window_mean(damage: Tensor, squares: Tensor, num_tokens: int) -> Tensor:
    """Spreads damage per window (..., W) over tokens (..., N): the mean over the windows that cover a token.

    Eq. 4 divides by |T_i| instead, which would starve border tokens, since fewer windows cover them.
    """
    member = damage.new_zeros(len(squares), num_tokens).scatter_(1, squares.to(damage.device), 1.0)
    return damage @ member / member.sum(0)


def z_scored(x: Tensor) -> Tensor:
    """Numbers of tokens (..., N), less their mean, over their deviation, image by image; zeros where all are alike.

    Of damage this is the golden importance g = -z(s) = z(damage) (section 3.2). The floor is relative to the numbers'
    own size, so that rounding noise on a constant map is not blown up.
    """
    centred = x - x.mean(-1, keepdim=True)
    sigma = centred.square().mean(-1, keepdim=True).sqrt()
    floor = 1e-9 * x.abs().amax(-1, keepdim=True)
    return torch.where(sigma > floor, centred / sigma.clamp(min=torch.finfo(x.dtype).tiny), 0.0)
