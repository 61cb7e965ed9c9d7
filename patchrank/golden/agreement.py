"""How well a predictor's ranking agrees with the golden one, on images that it was not fitted to."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from patchrank.golden.dataset import Ranked
from patchrank.utils.metrics import kendall, matching_each, matching_rate, ndcg, top_k


@torch.inference_mode()
def matching_on(predictor: nn.Module, data: Ranked) -> float:
    """Matching rate (%) of a predictor on images, as `matching` has it."""
    return matching_rate(predictor(data.cls, data.patches).cpu().numpy(), data.golden.cpu().numpy())


@torch.inference_mode()
def rank_quality(predictor: nn.Module, prior: np.ndarray, data: Ranked) -> dict[str, np.ndarray]:
    """Per image (n,): how a predictor's ranking compares with the golden one, and how the position prior's does."""
    golden = data.golden.cpu().numpy()
    predicted = predictor(data.cls, data.patches).cpu().numpy()
    return {
        "matching": matching_each(predicted, golden),
        "matching_prior": matching_each(prior, golden),
        "kendall": kendall(predicted, golden),
        "ndcg": ndcg(predicted, golden),
    }


def matching(quality: dict[str, np.ndarray], num_tokens: int) -> dict[str, float]:
    """Means of `rank_quality`: matching rate on images that were not fitted on, beside position prior and chance."""
    means = {key: float(values.mean()) for key, values in quality.items()}
    chance = 100 * top_k(num_tokens) / num_tokens
    return {"matching_rate": means.pop("matching"), **means, "matching_chance": chance}


def prior_of(data: Ranked) -> np.ndarray:
    """The position prior (N,): the mean golden map of the images that a predictor was fitted on."""
    return data.golden.cpu().numpy().mean(0)
