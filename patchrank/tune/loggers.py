"""Trackers that hear of every trial (W&B, MLflow) through Ray's own callbacks, where a sweep file asks for them.

Keys of `loggers.wandb` are those of Ray's callback and of `wandb.init`, keys of `loggers.mlflow` those of Ray's
callback; what Ray sets for each trial itself is left to it. Secrets come from the environment alone.
"""

from __future__ import annotations

import importlib
import inspect
import os
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from patchrank.config import Loggers
from patchrank.io import resolve
from patchrank.utils.errors import UserError, near

if TYPE_CHECKING:
    from ray.tune import Callback

OF_TRIALS = {"id", "name", "config", "config_exclude_keys", "config_include_keys", "resume", "resume_from", "reinit"}
OF_TRIALS |= {"fork_from", "allow_val_change", "save_checkpoints", "anonymous"}  # and what is deprecated
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
    for name, settings in _asked(loggers):
        _check_secrets(f"loggers.{name}", settings, name)
        known = _known_keys(name)
        for key in settings:
            if key not in known:
                raise UserError(f"loggers.{name}.{key}: {name} knows no such setting here; {near(key, known)}")
    if loggers.wandb is not None:
        _check_login(loggers.wandb)


def tracker_callbacks(loggers: Loggers, sweep: str) -> list[Callback]:
    """Callbacks for `ray.tune.RunConfig`, none where nothing is asked for.

    Where a sweep file does not say otherwise, nor the environment, W&B runs go to project `patchrank` and the group,
    MLflow runs to the experiment, of the sweep's name.

    Raises:
        UserError: as `check_trackers`.
    """
    check_trackers(loggers)
    callbacks: list[Callback] = []
    if loggers.wandb is not None:
        from patchrank.tune.wandb_callback import WandbCallback

        names = {"project": os.environ.get("WANDB_PROJECT_NAME", "patchrank")}
        names |= {"group": os.environ.get("WANDB_GROUP_NAME", sweep), "dir": os.environ.get("WANDB_DIR", ".")}
        names |= loggers.wandb
        callbacks.append(WandbCallback(**names | {"dir": resolve(names["dir"])}))  # it runs in a folder of Ray's
    if loggers.mlflow is not None:
        from ray.air.integrations.mlflow import MLflowLoggerCallback

        experiment = {"experiment_name": os.environ.get("MLFLOW_EXPERIMENT_NAME", f"patchrank {sweep}")}
        callbacks.append(MLflowLoggerCallback(**experiment | loggers.mlflow))
    return callbacks


def _asked(loggers: Loggers) -> Iterator[tuple[str, dict[str, Any]]]:
    for name in ("wandb", "mlflow"):
        if getattr(loggers, name) is not None:
            yield name, getattr(loggers, name)


def _known_keys(name: str) -> list[str]:
    """What may stand below `loggers.<name>`, from the signatures of what it goes to."""
    package = _load(name)
    integration = importlib.import_module(f"ray.air.integrations.{name}")
    callback = integration.WandbLoggerCallback if name == "wandb" else integration.MLflowLoggerCallback
    functions = [callback.__init__] + ([package.init] if name == "wandb" else [])
    keys = [parameter for function in functions for parameter in inspect.signature(function).parameters]
    hidden = OF_TRIALS | {"self", "args", "kwargs"}
    return [key for key in dict.fromkeys(keys) if key not in hidden and not SECRET.search(key)]


def _load(name: str):
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(f"loggers.{name}: {error}; near: pip install 'patchrank-clip[{name}]'") from error


def _check_secrets(path: str, value: Any, name: str) -> None:
    """Refuses secrets, without repeating them: sweep files are shared, and Ray writes settings down."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if SECRET.search(str(key)):
                raise UserError(f"{path}.{key}: a sweep file must hold no secret; near: {FROM_ENVIRONMENT[name]}")
            _check_secrets(f"{path}.{key}", inner, name)
    elif isinstance(value, list):
        for inner in value:
            _check_secrets(path, inner, name)
    elif isinstance(value, str) and IN_URL.search(value):
        raise UserError(f"{path}: a URL in a sweep file must hold no secret; near: {FROM_ENVIRONMENT[name]}")


def _check_login(settings: dict[str, Any]) -> None:
    """W&B would ask for a key in the middle of the sweep, or end it."""
    from patchrank.tune.wandb_callback import wandb_mode

    if wandb_mode(settings) in ("offline", "disabled") or os.environ.get("WANDB_API_KEY"):
        return
    import wandb

    if not wandb.login(prompt=False):
        raise UserError(f"loggers.wandb: not logged in; near: {FROM_ENVIRONMENT['wandb']}, or mode: offline")
