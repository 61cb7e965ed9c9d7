"""What towers without class embeddings answer: by a classifier of their own, or by the nearest labelled images.

Shapes: n images, m labelled images of an index, E width of embeddings, C classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from patchrank.models.pair import Clip
from patchrank.utils.metrics import percent
from patchrank.utils.nearest import nearest

CONTROLS = ("random", "reversed")
NEIGHBOURS, TEMPERATURE = 20, 0.07  # of DINO's k-NN protocol (Caron et al. 2021, https://arxiv.org/abs/2104.14294)


@dataclass
class Answers:
    """What each variant (unpruned, pruned, controls) answered, (n,) each, and the labels (n,); None if not known."""

    labels: np.ndarray | None
    answers: dict[str, np.ndarray]

    def same(self) -> np.ndarray:
        """Where the pruned tower answers what the unpruned one does."""
        return self.answers["pruned"] == self.answers["unpruned"]

    def right(self, variant: str = "pruned") -> np.ndarray:
        return self.answers[variant] == self.labels

    def figures(self) -> dict[str, float]:
        """Percentages: accuracy of every variant where labels are known, and agreement with the unpruned answers."""
        if not self.answers:
            return {}
        row: dict[str, float] = {}
        if self.labels is not None:
            row = {"accuracy": percent(self.right()), "accuracy_unpruned": percent(self.right("unpruned"))}
            row |= {f"accuracy_{name}": percent(self.right(name)) for name in self.answers if name in CONTROLS}
        return row | {"agreement": percent(self.same())}

    def arrays(self) -> dict[str, np.ndarray]:
        """What the figures are means of, image by image."""
        right = {} if self.labels is None else {f"right_{name}": self.right(name) for name in self.answers}
        return right | ({"same": self.same()} if self.answers else {})


class Neighbours(NamedTuple):
    """Labelled images that others are compared with: embeddings (m, E) of the tower as it came, and labels (m,)."""

    embeddings: Tensor
    labels: Tensor

    def answers(self, queries: Tensor) -> np.ndarray:
        """Labels (n,) by a vote of the 20 nearest, or of all where they are fewer; each counts exp(cosine / 0.07)."""
        index, labels = (part.to(queries.device) for part in self)
        found = nearest(queries, index, min(NEIGHBOURS, len(index)), what="neighbours", quiet=False)
        votes = found.cosine.new_zeros(len(queries), int(labels.max()) + 1)
        votes.scatter_add_(1, labels[found.place], (found.cosine / TEMPERATURE).exp())
        return votes.argmax(-1).cpu().numpy()


def places_apart(labelled: Any, split: Any) -> list[int]:
    """Places of the labelled images that may answer for a split: none of its own, and none of the same group."""
    seen = set(split.clusters())  # of images without groups these are their names
    return [place for place, group in enumerate(labelled.clusters()) if group not in seen]


def known_labels(clip: Clip, split: Any) -> np.ndarray | None:
    """A split's labels (n,) as places among what the model answers; None where they cannot be told.

    Where that is class embeddings, or nothing, they are the split's own. A class of the model's own classifier is found
    by its whole name, or by one of the names that stand between commas ("tench, Tinca tinca"). Case and underscores do
    not count. A name that several classes have tells nothing, and then no label is known.
    """
    if split.labels is None or clip.has_text or clip.classifier is None:
        return None if split.labels is None else np.asarray(split.labels)
    if not split.classes or not clip.class_names:
        return None
    whole: dict[str, set[int]] = {}
    parts: dict[str, set[int]] = {}
    for place, name in enumerate(clip.class_names):
        whole.setdefault(_plain(name), set()).add(place)
        for part in name.split(","):
            parts.setdefault(_plain(part), set()).add(place)
    found = [whole.get(name) or parts.get(name) or set() for name in map(_plain, split.classes)]
    if any(len(places) != 1 for places in found):
        return None
    return np.asarray([place for places in found for place in places])[split.labels]


def _plain(name: str) -> str:
    return " ".join(name.replace("_", " ").casefold().split())
