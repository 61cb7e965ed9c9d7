"""The one loop over images: a pair embeds them as it stands, and beside that as it came.

`unpruned` means the pair as it came, with nothing pruned and no prompts: what pruning is measured against.

Shapes: n images, b of a batch, E width of embeddings, N patches of the grid, K of them kept, P tokens before those.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from patchrank.models.clip import Clip
from patchrank.models.pruned_vit import PrunedOutput
from patchrank.utils.progress import progress

BATCH_SIZE = 64

Batch = tuple[Tensor, range]  # images (b, 3, H, W), normalised, and their places among all
Rankings = Callable[[Tensor, PrunedOutput], dict[str, Tensor]]  # of a batch: name of a ranking -> scores (b, N)


class Embedded(NamedTuple):
    """Embeddings of n images, in their order, and the patches that they rest on.

    vectors: variant -> unit vectors (n, E), float32. Variants are `unpruned`, where it was wanted; `pruned`, with the
    pruning and prompts in force; and the same by other rankings, by their names.
    kept: (n, K), places of the patches that `pruned` rests on.
    """

    vectors: dict[str, Tensor]
    kept: Tensor


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
) -> Embedded:
    """Embeds images by the pair as it stands and as it came; layers that both have in common run once.

    Args:
        scores: (n, N), high = keep, to rank by instead of the reducer's own.
        tokens, unpruned: (n, P + N, D) and (n, E), what `embed_shared` and `embed_unpruned` gave for these images;
            computed here if left out.
        with_unpruned: False if nobody asks for the embeddings of the pair as it came.
        rankings: scores of other rankings, by which the same images are pruned once more.
    """

    tower = clip.visual

    def one_batch(images: Tensor, places: range) -> dict[str, Tensor]:
        """Embeddings (b, E) of every variant, not normalised, and `kept` (b, K)."""
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
        others = {} if rankings is None else rankings(images, pruned)
        return found | {name: tower.forward_pruned(images, other, x).embedding for name, other in others.items()}

    parts = over_batches(clip, batches, one_batch)
    joined = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    kept = joined.pop("kept")
    return Embedded({name: unit(embeddings) for name, embeddings in joined.items()}, kept)


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
