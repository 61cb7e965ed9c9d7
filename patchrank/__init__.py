"""patchrank: image towers made faster by ranking their patches and dropping the least important ones.

Importing it registers the timm models `patchrank_*` and nothing else; heavier parts load when they are used.
"""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path


def _is_command() -> bool:
    """Whether this process is `python -m patchrank[.STAGE]` or `patchrank STAGE`, by what Python was started with.

    While Python looks for the module that `-m` names, which imports the packages around it, `sys.argv[0]` is "-m".
    """
    if sys.argv[:1] == ["-m"] and "-m" in sys.orig_argv:
        module = sys.orig_argv[sys.orig_argv.index("-m") + 1]
        return module.partition(".")[0] == __name__
    return Path("".join(sys.argv[:1])).stem == __name__


if _is_command():  # commands say something before they spend seconds on torch, and import what they need
    from patchrank.utils.startup import begin_command

    begin_command()
else:
    from patchrank.models import patchrank_clip as patchrank_clip

__version__ = "0.1.0"

# Public names and the modules they come from: imported when they are used, since some bring heavy libraries along.
PUBLIC = {
    "UserError": "patchrank.utils.errors",
    "create_clip": "patchrank.models.clip",
    "preset": "patchrank.models.presets",
    "find_tower": "patchrank.models.hosts.prune",
    "prune": "patchrank.models.hosts.prune",
    "prune_open_clip": "patchrank.models.open_clip.prune",
    "save_pretrained": "patchrank.models.checkpoints.save",
    "unprune": "patchrank.models.hosts.prune",
}
__all__ = list(PUBLIC)


def __getattr__(name: str):
    if name not in PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *PUBLIC})
