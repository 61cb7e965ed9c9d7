"""What a tower makes of its last tokens, where some of the patches have left or merged.

Three ways are known: the class token; the mean of the patches; attention of a learned query over them (SigLIP). In the
latter two a token counts as often as it has patches. Of a full grid, patches that left are rows of zeros, and count 0.
"""

from __future__ import annotations

from timm.layers import AttentionPoolLatent
from torch import Tensor, nn

from patchrank.utils.errors import UserError

POOLS = ("token", "", "avg", "map")  # timm's names of those that pruning goes together with


def check_pool(tower: nn.Module) -> None:
    """Raises `UserError` for a way of pooling that pruning does not know."""
    kind = type(tower.attn_pool).__name__
    if tower.global_pool not in POOLS or (tower.global_pool == "map" and kind != AttentionPoolLatent.__name__):
        raise UserError(
            f"pruning needs pooling by class token, average or attention, but global_pool is {tower.global_pool!r}"
            f"{'' if tower.attn_pool is None else f' ({kind})'}; try global_pool='token' or 'avg'"
        )


def reads_patches(tower: nn.Module) -> bool:
    """Whether the embedding is made of the patch tokens, and not of the class token alone."""
    return tower.global_pool not in ("token", "")


def summary(x: Tensor, num_leading: int, has_class_token: bool) -> Tensor:
    """What predictors see beside the patches of x (B, P + K, D): its class token, or else its mean patch, (B, D)."""
    return x[:, 0] if has_class_token else x[:, num_leading:].mean(1)


def live_rows(x: Tensor) -> Tensor:
    """1 for each row of x (B, L, D), and 0 for those that are all zeros, (B, L)."""
    return (x != 0).any(-1).to(x.dtype)


def pooled(tower: nn.Module, x: Tensor, sizes: Tensor) -> Tensor:
    """The mean, or what attention pools, (B, D), of tokens that count several times.

    Args:
        tower: of timm's kind, for which `reads_patches`.
        x: (B, P + K, D), normed, with P prefix tokens.
        sizes: (B, K), how many patches each token stands for; 0 for one that left.
    """
    first = tower.num_prefix_tokens
    if tower.pool_include_prefix:
        sizes = nn.functional.pad(sizes, (first, 0), value=1.0)
    else:
        x = x[:, first:]
    if tower.attn_pool is not None:  # log sizes, since softmax then gives a token the weight of that many alike
        return tower.attn_pool(x, attn_mask=sizes.log().to(x.dtype)[:, None, None])
    weights = (sizes / sizes.sum(1, keepdim=True)).unsqueeze(1)
    return (weights @ x.to(weights.dtype)).squeeze(1).to(x.dtype)


def pool_macs(tower: nn.Module, num_tokens: int) -> int:
    """MACs of attention pooling over so many patch tokens; a mean is not counted."""
    pool = tower.attn_pool
    if pool is None:
        return 0
    length = num_tokens + (tower.num_prefix_tokens if tower.pool_include_prefix else 0)
    linear = [pool.q, pool.proj, *(() if pool.mlp is None else (pool.mlp.fc1, pool.mlp.fc2))]
    own = sum(layer.in_features * layer.out_features for layer in linear if hasattr(layer, "in_features"))
    width = pool.num_heads * pool.head_dim
    return pool.latent_len * (own + 2 * length * width) + length * pool.kv.in_features * pool.kv.out_features
