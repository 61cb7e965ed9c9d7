"""Zero-shot classification of images, pruned beside unpruned: what each answered, and what was kept of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from patchrank.layers.reducers import Random, TokenState, sample_keys
from patchrank.models.clip import Clip
from patchrank.models.embed import BATCH_SIZE, classify, embed, split_batches
from patchrank.models.pruned_vit import PrunedOutput
from patchrank.utils.metrics import percent

CONTROLS = ("random", "reversed")


@dataclass
class Evaluation:
    """Per image, in the order of the split: what each variant (unpruned, pruned, controls) answered.

    answers: variant -> class indices (n,), none where classes have no names; cosine: variant -> cosine to the unpruned
    embedding (n,). labels (n,), or None; kept (n, K), places of the surviving tokens.
    """

    labels: np.ndarray | None
    answers: dict[str, np.ndarray]
    cosine: dict[str, np.ndarray]
    kept: np.ndarray

    def same(self) -> np.ndarray:
        """Where the pruned tower answers what the unpruned one does."""
        return self.answers["pruned"] == self.answers["unpruned"]

    def right(self, variant: str = "pruned") -> np.ndarray:
        return self.answers[variant] == self.labels

    def row(self) -> dict[str, float]:
        """Percentages: accuracy of every variant, agreement with the unpruned answers; and the mean cosine.

        Without labels there is no accuracy, and without class names no agreement either.
        """
        row: dict[str, float] = {}
        if self.answers and self.labels is not None:
            row = {"accuracy": percent(self.right()), "accuracy_unpruned": percent(self.right("unpruned"))}
            row |= {f"accuracy_{name}": percent(self.right(name)) for name in self.answers if name in CONTROLS}
        row |= {"agreement": percent(self.same())} if self.answers else {}
        return row | {"cosine": float(self.cosine["pruned"].mean())}


def evaluate(
    clip: Clip,
    split: Any,
    controls: Sequence[str] = (),
    scores: np.ndarray | None = None,
    batch_size: int = BATCH_SIZE,
    seed: int = 0,
    quiet: bool = False,
    unpruned: Tensor | None = None,
    tokens: Tensor | None = None,
) -> Evaluation:
    """Classifies an `ImageSplit` with the pruning and prompts in force, beside the pair as it came.

    What is called unpruned has no prompts either. Losses to pruning, and what prompts win back, count from there.

    Args:
        controls: also rank at `random` (by `seed` and each image's pixels), or `reversed` (the reducer's, negated).
        scores: (n, N), high = keep, to rank by instead of the reducer's own: oracles.
        unpruned, tokens: (n, E) and (n, P + N, D), what `embed_unpruned` and `embed_shared` gave for these images;
            computed here if left out.
    """

    plain = head = None
    if split.classes:
        plain = clip.zero_shot_head(split.classes, split.templates, prompted=False)
        head = clip.zero_shot_head(split.classes, split.templates)

    def other_scores(images: Tensor, pruned: PrunedOutput) -> dict[str, Tensor]:
        found = {"random": random_scores(images, clip.visual.num_patches, seed)} if "random" in controls else {}
        if "reversed" in controls and pruned.scores is not None:
            found["reversed"] = -pruned.scores
        return found

    given = None if scores is None else torch.from_numpy(scores)
    batches = split_batches(clip, split, batch_size, "evaluate", quiet)
    vectors, kept = embed(clip, batches, given, tokens, unpruned, rankings=other_scores)
    answers = {name: classify(z, plain if name == "unpruned" else head) for name, z in vectors.items() if split.classes}
    return Evaluation(
        labels=None if split.labels is None else np.asarray(split.labels),
        answers=answers,
        cosine={name: (z * vectors["unpruned"]).sum(-1).cpu().numpy() for name, z in vectors.items()},
        kept=kept.cpu().numpy(),
    )


def random_scores(images: Tensor, num_tokens: int, seed: int) -> Tensor:
    """Scores (B, N) of the `random` reducer for images (B, 3, H, W), without a tower."""
    index = torch.arange(num_tokens, device=images.device).expand(len(images), -1)
    state = TokenState(tokens=images, index=index, cls=images, sample_key=sample_keys(images))
    return Random(seed).score(state)
