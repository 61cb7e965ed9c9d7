"""The position prior as everyone's ranking: what a predictor that has learnt nothing but position would do."""

from __future__ import annotations

from torch import nn

from patchrank.layers import predictors
from patchrank.layers.reducers.base import register_reducer
from patchrank.layers.reducers.predictor import Predictor
from patchrank.utils.errors import UserError


@register_reducer("prior")
class Prior(Predictor):
    """Ranks by a fitted `prior`, and by no other predictor, so that a result's label says what ranked."""

    untrained = "prior"

    def __init__(self, predictor: nn.Module):
        if not isinstance(predictor, predictors.Prior):
            raise UserError(
                f"reducer 'prior' ranks by a fitted 'prior', but was given a {type(predictor).__name__}; "
                "reducer 'predictor' takes any"
            )
        super().__init__(predictor)
