"""What pruning a command runs: as its flags say, or as a folder's tower was saved where they say nothing."""

from __future__ import annotations

import argparse

from patchrank.cli.config_flags import read_config
from patchrank.config import PruningConfig, validate
from patchrank.models.from_timm import saved_settings

SCHEDULE = ("keep_rate", "budget", "drop_counts", "locations", "taper", "align")  # how many patches leave, and where
PARTS = SCHEDULE, tuple(name for name in PruningConfig.model_fields if name not in SCHEDULE)  # and by what


def read_pruning(args: argparse.Namespace) -> PruningConfig:
    """The pruning that a command runs.

    Of a folder with a tower of ours, the schedule is as it was saved unless a flag says something of it; then flags
    say all of it. So it is with who ranks and what becomes of the others. A flag at its default says nothing.

    Raises:
        UserError: flags that do not fit each other, or a folder that cannot be read.
    """
    said, saved = read_config(args, PruningConfig), saved_settings(getattr(args, "model", None))
    usual = PruningConfig()
    for part in PARTS:
        if any(getattr(said, name) != getattr(usual, name) for name in part):
            saved = {name: value for name, value in saved.items() if name not in part}
    return validate(PruningConfig, dict(said) | saved, f"model {args.model}") if saved else said
