"""What can be measured of each image, and what stands for accuracy where a model gives none."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple


class Measure(NamedTuple):
    """The array of a trial that holds a measure of each image. It is shown times `scale`, plus `offset`."""

    array: str
    scale: float = 100
    offset: float = 0


CONTROLS = {"random", "reversed"}  # a setting may have run these with some of its seeds alone
OF_RANKINGS = ("matching", "matching_prior", "kendall", "ndcg")  # of validation images

OF_IMAGES = {
    "accuracy": Measure("right_pruned"),
    "unpruned": Measure("right_unpruned"),
    "random": Measure("right_random"),  # the controls that a trial ran beside its own ranking
    "reversed": Measure("right_reversed"),
    "agreement": Measure("same"),
    "cosine": Measure("cosine", 1),
    "drift": Measure("cosine", -1000, 1000),  # thousandths of 1 - cosine
    "knn_accuracy": Measure("knn_right_pruned"),  # of nearest neighbours, where the model has no text tower
    "knn_unpruned": Measure("knn_right_unpruned"),
    "knn_random": Measure("knn_right_random"),
    "knn_reversed": Measure("knn_right_reversed"),
    "knn_agreement": Measure("knn_same"),
}
INSTEAD = {
    "cosine_share": Measure("cosine"),
    "whole": Measure("cosine", 0, 100),  # agreement and cosine of the unpruned tower with itself
}


def with_val(measures: Mapping[str, Measure]) -> dict[str, Measure]:
    """Measures, and those of validation images as `val_...`; controls are of test images alone."""
    both = {key: each for key, each in measures.items() if key.rpartition("_")[2] not in CONTROLS}
    return {**measures} | {f"val_{key}": each._replace(array=f"val_{each.array}") for key, each in both.items()}


MEASURES = with_val(OF_IMAGES) | {name: Measure(name, 1) for name in OF_RANKINGS}
"""Those that a claim may be about."""
ALL_MEASURES = MEASURES | with_val(INSTEAD)

STAND_INS = {
    "accuracy": {},
    "k-NN accuracy": {
        "accuracy": "knn_accuracy",
        "unpruned": "knn_unpruned",
        "random": "knn_random",
        "reversed": "knn_reversed",
        "agreement": "knn_agreement",
    },
    "agreement": {"accuracy": "agreement", "unpruned": "whole"},
    "100 cosine": {"accuracy": "cosine_share", "unpruned": "whole"},
}
"""What a setting is judged by, in words, the best first; and what then stands for each measure."""
