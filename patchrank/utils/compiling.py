"""What `torch.compile` may keep."""

from __future__ import annotations

import torch

MOST_GRAPHS = 1024  # compiled forms of one function; torch's own limit of 8 is too few for several towers and sizes


def raise_graph_limit() -> None:
    """Lets torch keep more compiled forms of one function, for the rest of this process.

    Beyond its limit torch runs a function as it is, without a word. Older versions have no public name for the limit,
    and keep theirs.
    """
    config = getattr(torch.compiler, "config", None)
    for name in ("recompile_limit", "accumulated_recompile_limit"):
        if hasattr(config, name):
            setattr(config, name, max(MOST_GRAPHS, getattr(config, name)))
