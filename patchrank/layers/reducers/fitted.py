"""Rankings that were fitted: by the paper's trained predictor (section 3.2), or by the position prior alone."""

from __future__ import annotations

from torch import Tensor, nn

from patchrank.layers import predictors
from patchrank.layers.reducers.base import Reducer, TokenState, register_reducer
from patchrank.utils.errors import UserError


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
