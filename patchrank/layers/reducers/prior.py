"""The position prior as a reducer: it ranks as a predictor would that has learnt positions alone."""

from __future__ import annotations

from torch import nn

from patchrank.layers import predictors
from patchrank.layers.reducers.base import register_reducer
from patchrank.layers.reducers.predictor import Predictor
from patchrank.utils.errors import UserError


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
