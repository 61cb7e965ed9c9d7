"""The classifier that a tower came with: taken off, so that the tower gives embeddings, and put on to be saved."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from timm.models import get_arch_pretrained_cfgs
from torch import nn

from patchrank.models.pair import Clip


def split_classifier(tower: nn.Module) -> nn.Linear | None:
    """Takes the classifier off a tower of timm's shape, which ends in what entered it from then on.

    Returns:
        The classifier; None for a tower that has none, or ends in the projection of a CLIP, which stays.
    """
    head = tower.head
    if not isinstance(head, nn.Linear) or is_projection(tower):
        return None
    tower.reset_classifier(0)
    return head


def is_projection(tower: nn.Module) -> bool:
    """Whether a tower's last layer leads to the embeddings of a CLIP, and not to classes.

    timm records both in the same way. An architecture of CLIP's has tags of image towers and of classifiers that were
    made of them, whose names say so, and the former have another number of outputs.
    """
    name = (getattr(tower, "pretrained_cfg", None) or {}).get("architecture") or ""
    if "clip" not in name:
        return False
    if name.startswith("patchrank_clip"):
        return True
    tags = get_arch_pretrained_cfgs(name).values()
    return tower.num_classes in {cfg.num_classes for cfg in tags if cfg.tag and "_ft_" not in cfg.tag}


@contextmanager
def classifier_on(clip: Clip) -> Iterator[nn.Module]:
    """A pair's image tower with the classifier that it came with, if it had one, for the length of a block."""
    tower, head = clip.visual, clip.classifier
    before = tower.head, tower.num_classes
    try:
        if head is not None:
            tower.head, tower.num_classes = head, head.out_features
        yield tower
    finally:
        tower.head, tower.num_classes = before
