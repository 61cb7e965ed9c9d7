"""What `torch.compile` may keep in memory."""

from __future__ import annotations

import torch

MOST_GRAPHS = 1024  # compiled forms of one function


def raise_graph_limit() -> None:
    """Lets torch keep 1024 compiled forms of one function, such as one for each batch size.

    By itself it keeps 8, or 256 of a function that several modules share, and runs all others uncompiled without a
    word. A higher limit stays as it is. So does all of an older torch that has no such settings.
    """
    config = getattr(torch.compiler, "config", None)
    for name in ("recompile_limit", "accumulated_recompile_limit"):
        if hasattr(config, name):
            setattr(config, name, max(getattr(config, name), MOST_GRAPHS))
