"""Trackers that hear of every trial (W&B, MLflow) through Ray's own callbacks, where a sweep file asks for them.

Keys of `loggers.wandb` are those of Ray's callback and of `wandb.init`, keys of `loggers.mlflow` those of Ray's
callback. What Ray sets for each trial is left to it. Secrets come from the environment alone.
"""

from __future__ import annotations

import importlib
import inspect
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ray.air.integrations.mlflow import MLflowLoggerCallback
from ray.air.integrations.wandb import WandbLoggerCallback
from ray.tune import Callback

from patchrank.config import Loggers
from patchrank.io import resolve
from patchrank.utils.errors import UserError, near

OF_TRIALS = {"id", "name", "config", "config_exclude_keys", "config_include_keys", "resume", "resume_from", "reinit"}
OF_TRIALS |= {"fork_from", "allow_val_change", "save_checkpoints", "anonymous"}  # the last two are deprecated
_WORDS = r"api[_\-]?key|access[_\-]?key|token|password|passwd|secret|credentials?"
SECRET = re.compile(rf"(^|[_.\-])({_WORDS})($|[_.\-])", re.I)
IN_URL = re.compile(r"://[^/@\s]+@|[?&](api_?key|token|password|secret)=", re.I)
FROM_ENVIRONMENT = {
    "wandb": "WANDB_API_KEY in the environment, or `wandb login`",
    "mlflow": "MLFLOW_TRACKING_TOKEN, or _USERNAME and _PASSWORD, in the environment",
}


def check_trackers(loggers: Loggers) -> None:
    """Refuses, before anything starts, what a tracker could not use.

    Raises:
        UserError: a tracker that is not installed, a key that it does not know or that trials have for themselves, a
            secret in the sweep file, or no W&B key anywhere.
    """
    for name, settings in (("wandb", loggers.wandb), ("mlflow", loggers.mlflow)):
        if settings is None:
            continue
        _check_secrets(f"loggers.{name}", settings, name)
        known = _known_keys(name)
        for key in settings:
            if key not in known:
                raise UserError(f"loggers.{name}.{key}: {name} knows no such setting here; {near(key, known)}")
    if loggers.wandb is None or _wandb_mode(loggers.wandb) in ("offline", "disabled"):
        return
    import wandb

    # W&B would ask for a key in the middle of the sweep, or end it
    if not os.environ.get("WANDB_API_KEY") and not wandb.login(prompt=False):
        raise UserError(f"loggers.wandb: not logged in; try {FROM_ENVIRONMENT['wandb']}, or mode: offline")


def tracker_callbacks(loggers: Loggers, sweep: str) -> list[Callback]:
    """Callbacks for `ray.tune.RunConfig`, none where nothing is asked for.

    Where neither the sweep file nor the environment says otherwise, W&B runs go to the project `patchrank` and a group
    of the sweep's name, and MLflow runs go to an experiment of the sweep's name.

    Raises:
        UserError: as `check_trackers`.
    """
    check_trackers(loggers)
    callbacks: list[Callback] = []
    if loggers.wandb is not None:
        names = {"project": os.environ.get("WANDB_PROJECT_NAME", "patchrank")}
        names |= {"group": os.environ.get("WANDB_GROUP_NAME", sweep), "dir": os.environ.get("WANDB_DIR", ".")}
        names |= loggers.wandb
        callbacks.append(WandbCallback(**names | {"dir": resolve(names["dir"])}))  # it runs in a folder of Ray's
    if loggers.mlflow is not None:
        experiment = {"experiment_name": os.environ.get("MLFLOW_EXPERIMENT_NAME", f"patchrank {sweep}")}
        callbacks.append(MLflowLoggerCallback(**experiment | loggers.mlflow))
    return callbacks


class WandbCallback(WandbLoggerCallback):
    """Logs every trial as a W&B run.

    Modifications: Ray's own callback puts WANDB_API_KEY into the runtime environment of its logging actors, which the
    dashboard shows and the logs repeat. Here the actors find the key in their node's environment, or where
    `wandb login` left it. And `mode` of the settings counts, where Ray reads the environment alone.
    """

    def setup(self, *args, **kwargs) -> None:
        with _environment("WANDB_MODE", _wandb_mode(self.kwargs)):
            super().setup(*args, **kwargs)

    def log_trial_start(self, trial) -> None:
        with _environment("WANDB_API_KEY", None):
            super().log_trial_start(trial)


def _known_keys(name: str) -> list[str]:
    """What may stand below `loggers.<name>`, from the signatures of the functions that it goes to."""
    try:
        package = importlib.import_module(name)
    except ImportError as error:
        raise UserError(f"loggers.{name}: {error}; try pip install 'patchrank-clip[{name}]'") from error
    functions = [WandbLoggerCallback.__init__, package.init] if name == "wandb" else [MLflowLoggerCallback.__init__]
    keys = [parameter for function in functions for parameter in inspect.signature(function).parameters]
    hidden = OF_TRIALS | {"self", "args", "kwargs"}
    return [key for key in dict.fromkeys(keys) if key not in hidden and not SECRET.search(key)]


def _check_secrets(path: str, value: Any, name: str) -> None:
    """Refuses secrets, without repeating them: sweep files are shared, and Ray writes settings down."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if SECRET.search(str(key)):
                raise UserError(f"{path}.{key}: a sweep file must hold no secret; try {FROM_ENVIRONMENT[name]}")
            _check_secrets(f"{path}.{key}", inner, name)
    elif isinstance(value, list):
        for inner in value:
            _check_secrets(path, inner, name)
    elif isinstance(value, str) and IN_URL.search(value):
        raise UserError(f"{path}: a URL in a sweep file must hold no secret; try {FROM_ENVIRONMENT[name]}")


def _wandb_mode(settings: dict[str, Any]) -> str | None:
    """`online`, `offline`, ..., as settings or environment say; None where neither does."""
    return settings.get("mode") or os.environ.get("WANDB_MODE")


@contextmanager
def _environment(name: str, value: str | None) -> Iterator[None]:
    """Sets an environment variable, or removes it where `value` is None, for the length of a block."""
    before = os.environ.pop(name, None)
    try:
        if value is not None:
            os.environ[name] = value
        yield
    finally:
        os.environ.pop(name, None)
        if before is not None:
            os.environ[name] = before
