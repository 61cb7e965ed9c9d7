"""The repair of a pruned tower: one linear map, solved in closed form, in the place of the tower's own projection.

What pruning does to an embedding is largely linear in what enters the projection. So a projection that is solved for
the pruned tower brings embeddings back towards those of the whole tower. It has the shape of the old one, and costs the
same. It needs unlabelled images and no training. A tower without a projection gets one, from the identity.

Shapes: n images, D width of the tower, E width of embeddings.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from patchrank.config import MIN_REPAIR_IMAGES
from patchrank.utils.errors import UserError
from patchrank.utils.private_names import has_others_hooks

HELD_OUT = 5  # every so many-th image is held out while the ridge is chosen
EXPONENTS = torch.arange(-5, 2.5, 0.5, dtype=torch.float64).tolist()  # of the ridges that are tried
PLAIN = ("torch.nn.modules.", "torch.ao.nn.quantized.")  # heads whose call does nothing but multiply


class Repair(nn.Module):
    """A projection in the place of a tower's own. It has no gradients and is no part of any state dict.

    Args:
        weight: (E, D).
        bias: (E,).
        headless: whether it was solved for a tower without a projection; then it stands before any that a tower has.

    Attributes:
        about: what its file says of it.
        source: how messages name it.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor,
        about: dict | None = None,
        source: str = "repair",
        headless: bool = False,
    ):
        super().__init__()
        self.headless = headless
        self.register_buffer("weight", weight, persistent=False)
        self.register_buffer("bias", bias, persistent=False)
        self.about, self.source = about or {}, source

    def forward(self, x: Tensor) -> Tensor:
        """Embeddings (B, E) of what would enter the tower's own projection (B, D)."""
        return F.linear(x, self.weight, self.bias)


class Solved(NamedTuple):
    """A repair as it was solved.

    weight, bias: (E, D) and (E,), in float64.
    ridge: the one that was chosen.
    drift_before, drift_after: of the held-out fifth, with the tower's own projection and with the repair.
    """

    weight: Tensor
    bias: Tensor
    ridge: float
    drift_before: float
    drift_after: float


def check_head(head: nn.Module) -> None:
    """Refuses a projection whose call does more than multiply, which a repair would leave out.

    Raises:
        UserError: it has hooks or a `forward` of its own, or is no plain linear layer (LoRA, parametrised).
    """
    kind = type(head)
    is_known = isinstance(head, nn.Identity) or hasattr(head, "in_features")
    is_called = "forward" in vars(head) or has_others_hooks(head, known="patchrank.")
    if is_called or not is_known or not kind.__module__.startswith(PLAIN):
        raise UserError(
            f"a repair takes the place of the tower's head, but this head is a {kind.__name__} with a call of its own "
            "(hooks, LoRA, ...), which would not run; try set_pruning(repair_path=None)"
        )


def own_projection(head: nn.Module, embed_dim: int) -> tuple[Tensor, Tensor]:
    """Weight (E, D) and bias (E,) of a head that `check_head` lets pass; of none, the identity: (D, D) and zeros."""
    if isinstance(head, nn.Identity):
        return torch.eye(embed_dim), torch.zeros(embed_dim)
    weight = head.weight.detach().cpu()
    return weight, weight.new_zeros(len(weight)) if head.bias is None else head.bias.detach().cpu()


def solve(x: Tensor, targets: Tensor, weight: Tensor, bias: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    """The projection that brings x nearest to the targets, in float64.

    P' = argmin sum |f - P' [x; 1]|^2 + ridge n |P' - [P; b]|^2, which shrinks towards the tower's own projection.

    Args:
        x: (n, D), what enters the projection of the pruned tower.
        targets: (n, E), the whole tower's embeddings f of the same images, not normalised.
        weight, bias: (E, D) and (E,), the tower's own projection P and b.
        ridge: above 0, in units of squared x.

    Returns:
        weight (E, D) and bias (E,).
    """
    ones = torch.ones(len(x), 1, dtype=torch.float64, device=x.device)
    x, own = torch.cat([x.double(), ones], dim=1), torch.cat([weight.double(), bias.double()[:, None]], dim=1)
    gram = x.T @ x + ridge * len(x) * torch.eye(x.shape[1], dtype=torch.float64, device=x.device)
    found = own + torch.linalg.solve(gram, x.T @ (targets.double() - x @ own.T)).T  # solved for the change alone
    return found[:, :-1].contiguous(), found[:, -1].contiguous()


def fit_projection(x: Tensor, targets: Tensor, weight: Tensor, bias: Tensor, ridge: float | None = None) -> Solved:
    """`solve` with the ridge that repairs a held-out fifth best, then once more on all images.

    Best is by mean 1 - cosine to the targets. The ridges that are tried are powers of ten times the mean square of x.
    Below 50 images the fifth would be less than ten, which choose by luck (docs/method.md has figures).

    Args:
        x, targets, weight, bias: as `solve` takes them.
        ridge: takes the place of the choice.

    Raises:
        UserError: fewer than 50 images, or embeddings that are not finite.
    """
    if len(x) < MIN_REPAIR_IMAGES:
        raise UserError(
            f"a repair needs at least {MIN_REPAIR_IMAGES} images, a fifth of which choose its ridge, but got {len(x)}; "
            "try more images"
        )
    if not (x.isfinite().all() and targets.isfinite().all()):
        raise UserError("a repair cannot be fitted: some embeddings are not finite; try float32 instead of float16")
    held = torch.arange(len(x), device=x.device) % HELD_OUT == HELD_OUT - 1
    before = drift(F.linear(x[held].double(), weight.double(), bias.double()), targets[held])

    def held_out_drift(candidate: float) -> float:
        found = solve(x[~held], targets[~held], weight, bias, candidate)
        return drift(F.linear(x[held].double(), *found), targets[held])

    unit = float(x.double().square().mean())
    tried = {
        ridge: held_out_drift(ridge) for ridge in ([unit * 10**e for e in EXPONENTS] if ridge is None else [ridge])
    }
    best = min(tried, key=tried.get)
    return Solved(*solve(x, targets, weight, bias, best), best, before, tried[best])


def drift(embeddings: Tensor, targets: Tensor) -> float:
    """Mean of 1 - cosine over the images (n, E)."""
    return 1 - float(F.cosine_similarity(embeddings.double(), targets.double(), dim=-1).mean())
