"""Ray's W&B callback, without the key in places where Ray shows it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from ray.air.integrations.wandb import WandbLoggerCallback


class WandbCallback(WandbLoggerCallback):
    """Logs every trial as a W&B run.

    Modifications: Ray's own hands WANDB_API_KEY to its logging actors in their runtime environment, which the
    dashboard shows and the logs repeat; here they find it in the environment of the node, or in what `wandb login`
    left. And `mode` counts where Ray asks the environment alone.
    """

    def setup(self, *args, **kwargs) -> None:
        with _environment("WANDB_MODE", wandb_mode(self.kwargs)):
            super().setup(*args, **kwargs)

    def log_trial_start(self, trial) -> None:
        with _environment("WANDB_API_KEY", None):
            super().log_trial_start(trial)


def wandb_mode(settings: dict[str, object]) -> str | None:
    """`online`, `offline`, ..., as settings or environment say; None where neither does."""
    return settings.get("mode") or os.environ.get("WANDB_MODE")


@contextmanager
def _environment(name: str, value: str | None) -> Iterator[None]:
    """A variable with a value, or without one, for the length of a block."""
    before = os.environ.pop(name, None)
    try:
        if value is not None:
            os.environ[name] = value
        yield
    finally:
        os.environ.pop(name, None)
        if before is not None:
            os.environ[name] = before
