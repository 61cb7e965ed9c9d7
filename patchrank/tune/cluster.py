"""Starting Ray, quietly, and asking whether it can give what a trial takes."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from patchrank.config import Resources
from patchrank.errors import UserError

QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AIR_NEW_OUTPUT": "0",  # the only output engine that verbose=0 silences
    "RAY_SCHEDULER_EVENTS": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # one trial without a metric would end the whole sweep
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
}


def check_machine(resources: Resources, address: str | None) -> None:
    """Refuses, before Ray starts, what this machine does not have; clusters are asked later.

    Raises:
        UserError: says what is asked for and what is there.
    """
    if address is not None:
        return
    cpus, gpus = os.cpu_count() or 1, torch.cuda.device_count()
    _check("gpu", resources.gpu, gpus, "this machine")
    _check("cpu", resources.cpu, cpus, "this machine")


@contextmanager
def ray_cluster(resources: Resources, address: str | None) -> Iterator[int]:
    """Ray for the length of a block; yields how many trials fit at a time.

    Raises:
        UserError: no cluster at the address, or no node that can hold a trial.
    """
    for key, value in QUIET.items():
        os.environ.setdefault(key, value)
    import ray

    logging.getLogger("ray").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="ray")
    started = not ray.is_initialized()
    dashboard = None if address else False
    try:
        if started:
            ray.init(address, include_dashboard=dashboard, logging_level=logging.ERROR, log_to_driver=False)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise UserError(f"Ray cluster {address!r} cannot be reached ({str(error).splitlines()[0]})") from error
    try:
        yield _slots(resources, [node["Resources"] for node in ray.nodes() if node["Alive"]])
    finally:
        if started:  # a notebook's own cluster is left as it was
            ray.shutdown()


def _slots(resources: Resources, nodes: list[dict]) -> int:
    for kind, wanted in (("gpu", resources.gpu), ("cpu", resources.cpu)):
        _check(
            kind, wanted, max((node.get(kind.upper(), 0) for node in nodes), default=0), "the cluster's largest node"
        )
    slots = sum(
        int(min(node.get(kind.upper(), 0) / wanted for kind, wanted in resources.model_dump().items() if wanted))
        for node in nodes
    )
    if not slots:
        raise UserError(f"no node of the cluster has both {resources.cpu:g} cpu and {resources.gpu:g} gpu for a trial")
    return slots


def _check(kind: str, wanted: float, there: float, where: str) -> None:
    if wanted > there:
        raise UserError(f"resources.{kind} is {wanted:g}, but {where} has {there:g}; near: resources.{kind}={there:g}")
