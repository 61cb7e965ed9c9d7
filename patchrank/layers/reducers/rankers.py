"""Reducers that rank: they score tokens, and the pruning settings say whether what is not kept is dropped or merges."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from patchrank.layers import predictors
from patchrank.layers.class_token import cls_row_macs
from patchrank.layers.reducers.base import Reducer, register_reducer
from patchrank.layers.token_state import TokenState
from patchrank.utils.errors import UserError

# SplitMix64's constants as signed 64-bit integers; products wrap around, as they should.
_GAMMA, _MIX1, _MIX2 = -0x61C8864680B583EB, -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15


@register_reducer("predictor")
class Predictor(Reducer):
    """Ranks by a predictor.

    about: what the predictor's file says of it, {} where it came as a module.
    untrained: which predictor stands in where no weights are wanted.
    """

    fitted = True
    untrained = "mix_mlp"

    def __init__(self, predictor: nn.Module):
        super().__init__()
        self.predictor = predictor
        self.about: dict = {}

    def score(self, state: TokenState) -> Tensor:
        """Scores (B, N). Raises `UserError` where the predictor still awaits its weights."""
        if not getattr(self.predictor, "filled", True):
            raise UserError(predictors.UNFILLED)
        return self.predictor(state.cls, state.tokens)

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        if all(f"{prefix}{key}" in state_dict for key in self.state_dict()):
            self.predictor.filled = True

    def num_macs(self, tower: nn.Module, reaching: dict[int, int]) -> int:
        return self.predictor.num_macs()


@register_reducer("prior")
class Prior(Predictor):
    """Ranks by a fitted `prior`, and refuses other predictors, so that a result's label says what ranked."""

    untrained = "prior"

    def __init__(self, predictor: nn.Module):
        if not isinstance(predictor, predictors.Prior):
            raise UserError(
                f"reducer 'prior' ranks by a fitted 'prior', but was given a {type(predictor).__name__}; "
                "reducer 'predictor' takes any"
            )
        super().__init__(predictor)


@register_reducer("golden")
class Golden(Reducer):
    """The oracle: ranks by golden scores that the caller computed for the same images (table 1, columns 3 to 7)."""

    needs = ("scores",)


@register_reducer("cls_attention")
class ClsAttention(Reducer):
    """Plain CLS attention: after softmax over all tokens, mean over heads, not renormalised, ranked anew each time.

    The row is the previous layer's own; before layer 1, where there is none, it is what layer 1 would attend to.
    """

    needs = ("cls_row",)
    ranks_anew = True

    def score(self, state: TokenState) -> Tensor:
        return state.cls_row

    def num_macs(self, tower: nn.Module, reaching: dict[int, int]) -> int:
        """One query against all keys at each location; before layer 1 also what makes them."""
        projections = cls_row_macs(tower.blocks[0], reaching[1]) if 1 in reaching else 0
        return projections + sum(reaching.values()) * tower.embed_dim


@register_reducer("center")
class Center(Reducer):
    """Patches near the centre of the grid stay, whatever the image shows.

    Scores are minus the squared distance, in patches, from a patch's place to the grid's centre.
    """

    def __init__(self, grid_size: tuple[int, int]):
        super().__init__()
        self.grid_size = grid_size

    def score(self, state: TokenState) -> Tensor:
        # no buffer, since in a tower of half precision it would be rounded, and distances would be tied
        rows, columns = (torch.arange(side, device=state.index.device) - (side - 1) / 2 for side in self.grid_size)
        return -(rows[:, None] ** 2 + columns**2).flatten()[state.index]


@register_reducer("random")
class Random(Reducer):
    """Tokens leave at random, seeded by each sample's pixels, so that batching does not matter."""

    needs = ("sample_key",)

    def __init__(self, seed: int = 0):
        super().__init__()
        self.seed = seed

    def score(self, state: TokenState) -> Tensor:
        bits = _mix(state.sample_key[:, None] + _mix(state.index * _GAMMA + self.seed))
        return (bits >> 40).to(torch.float32)  # 24 bits: exact in float32


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shift(x, 30)) * _MIX1
    x = (x ^ _shift(x, 27)) * _MIX2
    return x ^ _shift(x, 31)


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical shift to the right of signed integers."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def sample_keys(images: Tensor) -> Tensor:
    """One int64 per image (B, ...), from the exact bits of its pixels; sums of integers do not depend on order."""
    bits = torch.view_copy(images.float(), torch.int32).flatten(1).to(torch.int64)  # torch.jit cannot trace `view`
    places = torch.arange(1, bits.shape[1] + 1, device=bits.device) * _GAMMA | 1
    return (bits * places).sum(1)
