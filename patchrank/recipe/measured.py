"""What the chosen setting does to images that nothing was fitted to or chosen on, and what it saves on this machine."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from patchrank import benchmark
from patchrank.config import TrialConfig
from patchrank.models.clip import macs_row
from patchrank.retrieval import retrieval
from patchrank.trial.inputs import Inputs
from patchrank.trial.requirements import ResolvedTrial, TrialContext
from patchrank.trial.run import evaluate_part
from patchrank.trial.training import ranked, repaired
from patchrank.utils.device import hardware
from patchrank.utils.veil import draw_left

PICTURES = 8  # images that are drawn
SHARES = ("image_neighbours@10", "image_neighbours@10_reindexed")  # figures of search that a card shows
REPEATS = 20  # runs of each tower that count, in the measurement of milliseconds


@dataclass(frozen=True)
class Measured:
    """figures: of a card, by name. pairs: (n, 2, S, S, 3) uint8, images as the tower sees them and what is left."""

    figures: dict[str, object]
    pairs: np.ndarray
    merged: bool


def measure(choice: TrialConfig, inputs: Inputs, shards: str, batch_size: int) -> Measured:
    """Figures and pictures of a setting on the test images of its data.

    Args:
        inputs: model and data, with test images among them.
        shards: where predictors and repairs are kept.
        batch_size: images of a run, where milliseconds are measured.
    """
    context = TrialContext(ResolvedTrial(choice), inputs, shards)
    (task,) = choice.data.tasks
    with ranked(context, task), repaired(context, task):
        found, split = evaluate_part(context, task, "test")
        tower = inputs.clip.visual
        figures = {"n_images": len(split), "drift": float(1 - found.cosine["pruned"].mean())} | found.row()
        figures |= {"drift_p95": float(np.quantile(1 - found.cosine["pruned"], 0.95))}
        looked_up = retrieval(inputs.clip, split, ks=(10,), index=inputs.reference(task, "test").unpruned)
        figures |= {name: share for name, share in looked_up.row().items() if name in SHARES}
        figures |= macs_row(inputs.clip) | {"n_kept": found.kept.shape[1], "n_tokens": tower.num_patches}
        speed = benchmark.measure(inputs.clip, batch_size, REPEATS, quiet=False)
        figures |= speed | {"batch_size": batch_size, "hardware": hardware(str(inputs.clip.logit_scale.device))}
        few, transform = split.first(PICTURES), inputs.clip.transform()
        seen = inputs.clip.to_pixels(torch.stack([transform(few.image(n)) for n in range(len(few))]))
        source = None if found.source is None else found.source[: len(seen)]
        left = draw_left(seen, found.kept[: len(seen)], source, np.asarray(tower.patch_embed.grid_size))
    return Measured(figures, np.stack([seen, left], axis=1), source is not None)
