"""Phase I: golden scores. What happens to the embedding when a window of tokens is removed? (section 3.1)

One pass over the windows gives all three metrics; whatever they share is run once an image (`suffix`). Damage is
computed in float64 as 1 - s, in forms that do not round to 1 where the paper's s saturates. `--rounds` asks again
once the least important tokens have left: the greedy search of the paper's abstract.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from patchrank.config import DEFAULTS
from patchrank.golden.batch_size import batch_size_of
from patchrank.golden.suffix import Suffix
from patchrank.layers import pruning
from patchrank.layers.schedule import check_locations
from patchrank.utils.device import full_precision
from patchrank.utils.errors import UserError, near
from patchrank.utils.plain import plain

METRICS = ("label", "confidence", "preservation")
VERSION = 1  # of the scoring: bump it when the same images would get other scores


class GoldenScores(NamedTuple):
    """scores (B, M, N): importance g, high = keep; windows (B, M, W): raw damage per window; M metrics, float64."""

    scores: Tensor
    windows: Tensor


@torch.inference_mode()
def score_images(
    tower: nn.Module,
    images: Tensor,
    head: Tensor | None = None,
    labels: Tensor | None = None,
    logit_scale: float = 100.0,
    window: int = DEFAULTS.golden.window,
    stride: int = DEFAULTS.golden.stride,
    remove_at: int = DEFAULTS.golden.remove_at,
    rounds: int = DEFAULTS.golden.rounds,
    metrics: Sequence[str] = METRICS,
    batch_size: int | None = None,
    compile: bool = False,
    autocast: str | None = None,
    classifier: bool | nn.Linear = False,
) -> GoldenScores:
    """Golden scores of images by label (eq. 1), confidence (eq. 2) and preservation (eq. 3).

    Args:
        tower: image tower with `forward_prefix` and `forward_suffix`, in evaluation mode.
        images: (B, 3, H, W), normalised.
        head: class embeddings (C, E), unit vectors; without them, and without a classifier, there is `preservation`
            alone.
        labels: (B,) ground truth; without them there is no `label` row.
        window, stride: side of the removed square and its step, in tokens.
        remove_at: layer, counted from 1, before which the window's tokens leave.
        rounds: 1 scores every token of the whole image. With R rounds the N // R least important tokens leave after
            each of them, and the rest is scored again against the same whole image; g is then the z-scored rank.
        metrics: rows wanted; those that cannot be had are left out. Rounds cost one search for each, since different
            tokens leave.
        batch_size: sequences, that is pairs of an image and a window, run at a time; `batch_size_of` if left out.
        classifier: the tower's own head gives the logits of (C,) classes, in the place of `head`, and its embedding is
            what enters that head; or the layer that does so for a tower without a head.
        compile: as for `Suffix`; for one round, since later ones have sequences of many lengths.
        autocast: as for `Suffix`.

    Raises:
        UserError: labels that are not one class of the head for each image, a window larger than the grid, tokens
            that no window covers, a layer outside the tower, more rounds than tokens, compilation of more than one, an
            unknown metric, none that can be had without labels or class names, or a classifier that is none.
    """
    window, stride, rounds, batch_size = plain((window, stride, rounds, batch_size))
    (remove_at,) = check_locations((remove_at,), len(tower.blocks))
    squares = pruning.windows(tower.patch_embed.grid_size, window, stride).to(images.device)
    check_rounds(rounds, tower.num_patches, compile)
    logits_of = _logits_of(tower, head, logit_scale, classifier)
    wanted = known_metrics(metrics, labels is not None, logits_of is not None)
    if labels is not None and logits_of is not None:
        of_tower = classifier.out_features if isinstance(classifier, nn.Module) else tower.num_classes
        _check_labels(labels, len(images), of_tower if head is None else len(head))
    batch_size = batch_size or batch_size_of(tower, remove_at, window)
    with full_precision():
        tokens = torch.cat([tower.forward_prefix(part, remove_at) for part in images.split(batch_size)])
        suffix = Suffix(tower, tokens, remove_at, batch_size, compile, autocast, bool(classifier))
        whole = F.normalize(suffix.whole().double(), dim=-1)

        def damage(alive: Tensor) -> Tensor:  # (B, N) to (B, M, W)
            pieces = suffix.without(squares, alive)
            logits = None if logits_of is None else logits_of(pieces)  # (B, W, C)
            pieces = F.normalize(pieces.double(), dim=-1)
            ways = {
                "label": lambda: _improbability(logits, labels[:, None].expand(logits.shape[:2])),
                "confidence": lambda: _improbability(logits, logits.argmax(-1)),
                "preservation": lambda: (whole[:, None] - pieces).square().sum(-1) / 2,  # 1 - cos of unit vectors
            }
            return torch.stack([ways[name]() for name in wanted], dim=1)

        everything = tokens.new_ones(len(tokens), tower.num_patches, dtype=torch.bool)
        first = damage(everything)
        if rounds == 1:
            return GoldenScores(pruning.z_scored(pruning.window_mean(first, squares, tower.num_patches)), first)
        ranks = [
            _greedy(lambda alive, m=m: damage(alive)[:, m], first[:, m], squares, everything, rounds)
            for m in range(len(wanted))
        ]
    return GoldenScores(pruning.z_scored(torch.stack(ranks, dim=1)), first)


def _logits_of(
    tower: nn.Module, head: Tensor | None, logit_scale: float, classifier: bool | nn.Linear
) -> Callable[[Tensor], Tensor] | None:
    """What gives logits (..., C) of embeddings (..., E), in float64; None where there are no classes."""
    if classifier:
        own = classifier if isinstance(classifier, nn.Module) else tower.head if tower.num_classes else None
        if head is not None or own is None:
            why = "has none (num_classes=0)" if head is None else "is not used beside class embeddings"
            raise UserError(f"classifier: the tower's own head {why}; try classifier=False")
        return lambda embeddings: own(embeddings.to(next(own.parameters()).dtype)).double()
    if head is None:
        return None
    return lambda embeddings: float(logit_scale) * F.normalize(embeddings.double(), dim=-1) @ head.double().T


def known_metrics(metrics: Sequence[str], labelled: bool, named: bool) -> list[str]:
    """Those of `metrics` that can be had: all of them where classes have names and images have labels."""
    for name in metrics:
        if name not in METRICS:
            raise UserError(f"metric {name!r} does not exist; {near(name, METRICS)}")
    had = {"label": named and labelled, "confidence": named, "preservation": True}
    wanted = [name for name in metrics if had[name]]
    if not wanted:
        what = "labels" if named else "class names"
        raise UserError(f"metrics {list(metrics)} need {what}, and there are none; try preservation")
    return wanted


def check_rounds(rounds: int, num_tokens: int, compile: bool = False) -> None:
    """Raises `UserError` for more rounds than tokens, and for several of code that is compiled for one length."""
    if compile and rounds > 1:
        raise UserError(f"compile: later rounds have sequences of many lengths, and rounds is {rounds}; try rounds 1")
    if not 1 <= rounds <= num_tokens:
        raise UserError(f"rounds must lie in 1..{num_tokens}, the number of tokens, but is {rounds}")


def _greedy(damage: Callable[[Tensor], Tensor], first: Tensor, squares: Tensor, alive: Tensor, rounds: int) -> Tensor:
    """Ranks (B, N), high = left last: after each round the least important tokens leave, and the rest is scored again.

    damage(alive) gives the damage (B, W) of windows among the tokens still there; `first` is that of the first round.
    """
    num_tokens, alive = alive.shape[1], alive.clone()
    ranks = first.new_zeros(alive.shape)
    values = torch.arange(num_tokens - 1, -1, -1, device=first.device, dtype=first.dtype).expand_as(ranks)
    for n in range(rounds):
        per_token = pruning.window_mean(first if n == 0 else damage(alive), squares, num_tokens)
        order = pruning.rank(per_token.masked_fill(~alive, -torch.inf))  # the dead stand at the end
        here = num_tokens - n * (num_tokens // rounds)
        leaving = slice(here - num_tokens // rounds if n < rounds - 1 else 0, here)
        ranks.scatter_(1, order[:, leaving], values[:, leaving])
        alive.scatter_(1, order[:, leaving], False)
    return ranks


def _check_labels(labels: Tensor, images: int, classes: int) -> None:
    """Raises `UserError` where labels are not one class for each image; a single one would count for all of them."""
    if labels.shape != (images,) or (images and not 0 <= labels.min() <= labels.max() < classes):
        need = f"one number from 0 to {classes - 1} for each of {images} images"
        raise UserError(f"labels must be {need}, but are {labels.tolist()} of shape {tuple(labels.shape)}"[:300])


def _improbability(logits: Tensor, classes: Tensor) -> Tensor:
    """1 - softmax(logits)[class], as the share of all other classes, so that it keeps its digits near 0."""
    others = logits.scatter(-1, classes.unsqueeze(-1), -torch.inf)
    return (others.logsumexp(-1) - logits.logsumexp(-1)).exp()
