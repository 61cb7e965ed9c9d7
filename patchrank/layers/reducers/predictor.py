"""The paper's own: a trained predictor of the golden ranking decides (section 3.2)."""

from __future__ import annotations

from torch import Tensor, nn

from patchrank.layers.reducers.base import Reducer, TokenState, register_reducer


@register_reducer("predictor")
class Predictor(Reducer):
    """Ranks by a predictor; `about` is what its file says of itself, {} where it came as a module.

    untrained: which predictor stands in where no weights are wanted.
    """

    fitted = True
    untrained = "mix_mlp"

    def __init__(self, predictor: nn.Module):
        super().__init__()
        self.predictor = predictor
        self.about: dict = {}

    def score(self, state: TokenState) -> Tensor:
        return self.predictor(state.cls, state.tokens)

    def num_macs(self, tower: nn.Module, reaching: dict[int, int]) -> int:
        return self.predictor.num_macs()
