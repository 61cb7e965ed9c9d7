"""The one loop over images: a pair embeds and classifies them as it stands, and beside that as it came.

`unpruned` means the pair as it came, with nothing pruned and no prompts: what pruning is measured against.

Shapes: n images, b of a batch, E width of embeddings, N patches of the grid, K of them kept, P tokens before those.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from patchrank.layers.reducers import Random, TokenState, sample_keys
from patchrank.models.answers import Answers, Neighbours, known_labels
from patchrank.models.clip import Clip
from patchrank.models.pruned_vit import PrunedOutput
from patchrank.utils.progress import progress

BATCH_SIZE = 64

Batch = tuple[Tensor, range]  # images (b, 3, H, W), normalised, and their places among all
Rankings = Callable[[Tensor, PrunedOutput], dict[str, Tensor]]  # of a batch: name of a ranking -> scores (b, N)


class Left(NamedTuple):
    """What pruning leaves of n images.

    kept: (n, K), places of the patches that stay, in the full grid.
    source: (n, N), which of the kept each patch lives in, -1 where it was dropped; None where patches never merge.
    """

    kept: Tensor
    source: Tensor | None


def split_batches(
    clip: Clip, split: Any, batch_size: int = BATCH_SIZE, what: str = "embed", quiet: bool = False
) -> Iterator[Batch]:
    """The images of an `ImageSplit` as the pair takes them; shows progress, which `what` names."""
    with progress(total=len(split), desc=f"{what} {split.task}/{split.split}", unit="image", disable=quiet) as bar:
        for images, places in split.batches(clip.transform(), batch_size):
            yield images, places
            bar.update(len(images))


def embed(
    clip: Clip,
    batches: Iterable[Batch],
    scores: Tensor | None = None,
    tokens: Tensor | None = None,
    unpruned: Tensor | None = None,
    with_unpruned: bool = True,
    rankings: Rankings | None = None,
    raw: bool = False,
) -> tuple[dict[str, Tensor], Left]:
    """Embeds images by the pair as it stands and as it came; layers that both have in common run once.

    Args:
        scores: (n, N), high = keep, to rank by instead of the reducer's own.
        tokens, unpruned: (n, P + N, D) and (n, E), what `embed_shared` and `embed_unpruned` gave for these images;
            computed here if left out.
        with_unpruned: False if nobody asks for the embeddings of the pair as it came.
        rankings: scores of other rankings, by which the same images are pruned once more.
        raw: True for embeddings as the tower gives them, in place of unit vectors.

    Returns:
        Unit vectors (n, E), float32, of each variant: `unpruned`, where it was wanted; `pruned`, with the pruning and
        prompts in force; and the same by other rankings, by their names. And the patches that `pruned` rests on.
    """

    tower = clip.visual
    merges = tower.pruner is not None and tower.pruner.merges

    def one_batch(images: Tensor, places: range) -> dict[str, Tensor]:
        """Embeddings (b, E) of every variant, not normalised, and what is left: `kept` (b, K), `source` (b, N)."""
        given, x, whole = (
            None if known is None else known[places.start : places.stop].to(images.device)
            for known in (scores, tokens, unpruned)
        )
        if x is None:
            x = tower.forward_prefix(images, tower.shared_layer)
        pruned = tower.forward_pruned(images, given, x)
        if whole is None and with_unpruned:
            untouched = tower.pruner is None and tower.prompts is None
            whole = pruned.embedding if untouched else tower.forward_whole(images, x)
        found = {} if whole is None else {"unpruned": whole}
        found |= {"pruned": pruned.embedding, "kept": pruned.kept}
        found |= {"source": pruned.source} if merges else {}
        others = {} if rankings is None else rankings(images, pruned)
        return found | {name: tower.forward_pruned(images, other, x).embedding for name, other in others.items()}

    parts = over_batches(clip, batches, one_batch)
    joined = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    left = Left(joined.pop("kept"), joined.pop("source", None))
    return joined if raw else {name: unit(embeddings) for name, embeddings in joined.items()}, left


def unit(embeddings: Tensor) -> Tensor:
    """Unit vectors (..., E), float32."""
    return F.normalize(embeddings.float(), dim=-1)


def classify(vectors: Tensor, head: Tensor) -> np.ndarray:
    """The nearest class (n,) of unit vectors (n, E), as places in a head (C, E)."""
    return (vectors @ head.float().T).argmax(-1).cpu().numpy()


def embed_unpruned(clip: Clip, split: Any, batch_size: int = BATCH_SIZE) -> Tensor:
    """Embeddings (n, E), not normalised and on the CPU, of an `ImageSplit` by the tower as it came."""
    batches = split.batches(clip.transform(), batch_size)
    return torch.cat(over_batches(clip, batches, lambda images, _: clip.visual.forward_whole(images).cpu()))


def embed_shared(clip: Clip, split: Any, batch_size: int = BATCH_SIZE) -> Tensor:
    """Tokens (n, P + N, D), on the CPU, as they enter the last layer that the pruning in force does not touch."""
    tower, batches = clip.visual, split.batches(clip.transform(), batch_size)
    return torch.cat(over_batches(clip, batches, lambda x, _: tower.forward_prefix(x, tower.shared_layer).cpu()))


@torch.no_grad()
def over_batches(clip: Clip, batches: Iterable[Batch], function: Callable[[Tensor, range], Any]) -> list:
    """What `function(images, places)` gives of each batch, with the images on the pair's device."""
    device = clip.logit_scale.device
    return [function(images.to(device), places) for images, places in batches]


@dataclass
class Evaluation(Answers):
    """Per image, in the order of the split: what each variant (unpruned, pruned, controls) answered.

    answers: variant -> class indices (n,), none where nothing answers. labels (n,), or None; of a model's own
    classifier they are known where its classes have the names of the split's. cosine: variant -> cosine to the unpruned
    embedding (n,). kept (n, K), places of the surviving tokens; source (n, N), which of them each patch lives in, -1
    where it was dropped, or None where patches never merge. knn: what nearest neighbours answered, None where no
    labelled images were given.
    """

    cosine: dict[str, np.ndarray]
    kept: np.ndarray
    source: np.ndarray | None = None
    knn: Answers | None = None

    def row(self) -> dict[str, float]:
        """`figures`, and the same of nearest neighbours as `knn_...`; and the mean cosine.

        Without labels there is no accuracy, and without answers no agreement either.
        """
        knn = {} if self.knn is None else {f"knn_{name}": value for name, value in self.knn.figures().items()}
        return self.figures() | knn | {"cosine": float(self.cosine["pruned"].mean())}


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
    neighbours: Neighbours | None = None,
) -> Evaluation:
    """Classifies an `ImageSplit` with the pruning and prompts in force, beside the pair as it came.

    What is called unpruned has no prompts either. Losses to pruning, and what prompts win back, count from there.
    Answers are those of class embeddings, or of the model's own classifier where it has no text tower.

    Args:
        controls: also rank at `random` (by `seed` and each image's pixels), or `reversed` (the reducer's, negated).
        scores: (n, N), high = keep, to rank by instead of the reducer's own: oracles.
        unpruned, tokens: (n, E) and (n, P + N, D), what `embed_unpruned` and `embed_shared` gave for these images;
            computed here if left out.
        neighbours: labelled images that answer as well, by `neighbours_for` this split.
    """

    answer = answering(clip, split)

    def other_scores(images: Tensor, pruned: PrunedOutput) -> dict[str, Tensor]:
        found = {"random": random_scores(images, clip.visual.num_patches, seed)} if "random" in controls else {}
        if "reversed" in controls and pruned.scores is not None:
            found["reversed"] = -pruned.scores
        return found

    given = None if scores is None else torch.from_numpy(scores)
    batches = split_batches(clip, split, batch_size, "evaluate", quiet)
    raw, left = embed(clip, batches, given, tokens, unpruned, rankings=other_scores, raw=True)
    vectors = {name: unit(embeddings) for name, embeddings in raw.items()}
    labels = None if split.labels is None else np.asarray(split.labels)
    knn = None
    if neighbours is not None:
        knn = Answers(labels, {name: neighbours.answers(z) for name, z in vectors.items()})
    return Evaluation(
        labels=known_labels(clip, split),
        answers={} if answer is None else {name: answer(name, raw[name]) for name in raw},
        cosine={name: (z * vectors["unpruned"]).sum(-1).cpu().numpy() for name, z in vectors.items()},
        kept=left.kept.cpu().numpy(),
        source=None if left.source is None else left.source.cpu().numpy(),
        knn=knn,
    )


def answering(clip: Clip, split: Any) -> Callable[[str, Tensor], np.ndarray] | None:
    """What gives the answers (n,) of a variant from its embeddings (n, E), not normalised; None where nothing does."""
    if clip.has_text and split.classes:
        plain = clip.zero_shot_head(split.classes, split.templates, prompted=False)
        head = clip.zero_shot_head(split.classes, split.templates)
        return lambda name, raw: classify(unit(raw), plain if name == "unpruned" else head)
    if not clip.has_text and clip.classifier is not None:
        return lambda name, raw: clip.classifier(raw).argmax(-1).cpu().numpy()
    return None


def random_scores(images: Tensor, num_tokens: int, seed: int) -> Tensor:
    """Scores (B, N) of the `random` reducer for images (B, 3, H, W), without a tower."""
    index = torch.arange(num_tokens, device=images.device).expand(len(images), -1)
    state = TokenState(tokens=images, index=index, cls=images, sample_key=sample_keys(images))
    return Random(seed).score(state)
