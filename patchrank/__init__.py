"""patchrank: CLIP's image tower made faster by ranking its patches and dropping the least important ones.

Importing it registers the timm models `patchrank_clip_*` and nothing else; heavier parts load when they are used.
"""

from __future__ import annotations

import sys
from pathlib import Path


def _is_command() -> bool:
    """Whether this process is `python -m patchrank[.STAGE]` or `patchrank STAGE`, by what Python was started with.

    While Python looks for the module that `-m` names, which imports the packages around it, `sys.argv[0]` is "-m".
    """
    if sys.argv[:1] == ["-m"] and "-m" in sys.orig_argv:
        module = sys.orig_argv[sys.orig_argv.index("-m") + 1]
        return module.partition(".")[0] == __name__
    return Path("".join(sys.argv[:1])).stem == __name__


if not _is_command():  # commands say something before they spend seconds on torch, and import what they need
    from patchrank.models import patchrank_clip as patchrank_clip

__version__ = "0.1.0"
__all__ = ["create_clip", "prune_open_clip", "save_pretrained", "unprune"]


def create_clip(name: str, **kwargs):
    """Image tower, text tower, tokenizer and transform in one; see `patchrank.models.clip.create_clip`."""
    from patchrank.models.clip import create_clip

    return create_clip(name, **kwargs)


def prune_open_clip(model, **pruning):
    """Our image tower in the place of an open_clip model's; see `patchrank.models.open_clip.prune.prune_open_clip`."""
    from patchrank.models.open_clip.prune import prune_open_clip

    return prune_open_clip(model, **pruning)


def save_pretrained(model, directory):
    """A tower as a directory that timm makes it from again; see `patchrank.models.checkpoints.save`."""
    from patchrank.models.checkpoints.save import save_pretrained

    save_pretrained(model, directory)


def unprune(model):
    """Undoes `prune_open_clip`; see `patchrank.models.open_clip.prune.unprune`."""
    from patchrank.models.open_clip.prune import unprune

    return unprune(model)
