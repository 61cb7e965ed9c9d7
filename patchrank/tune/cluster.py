"""Starting or joining Ray, quietly, and asking whether it has the resources that a trial takes."""

from __future__ import annotations

import importlib
import logging
import os
import socket
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import torch

from patchrank.config import Resources
from patchrank.tune.console import say
from patchrank.tune.ray_folder import ray_folder
from patchrank.utils.errors import UserError, one_line

ENVIRONMENT = {  # of Ray, where nobody has set it otherwise
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AIR_NEW_OUTPUT": "0",  # the only output engine that verbose=0 silences
    "RAY_SCHEDULER_EVENTS": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_task_oom_retries": "3",  # of a scoring task, which Ray would repeat for ever
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # signals.py handles both signals
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # one trial without a metric would end the whole sweep
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
}
AHEAD = 16  # trials that are submitted at a time to a cluster that may grow, however small it is now
CONNECT = 10.0  # seconds that a cluster's head may take to answer
POLL = 2.0  # seconds between two looks at a cluster that is to grow


@dataclass(frozen=True)
class Where:
    """Which Ray to run on: a cluster's address, or None for this machine's own.

    wait: seconds that a cluster may take to get the first node that holds a trial. Above 0 the cluster may also grow.
    """

    address: str | None = None
    wait: float = 0.0
    dashboard: bool = False


def check_machine(resources: Resources, where: Where) -> None:
    """Refuses, before Ray starts, what this machine does not have; clusters are asked later.

    Raises:
        UserError: says what is asked for and what is there.
    """
    if where.address is not None and where.address.startswith("ray://"):
        cure = "try ray job submit, or --address HOST:PORT from within the cluster's network"
        raise UserError(f"address {where.address}: a sweep cannot be driven through Ray's client; {cure}")
    for kind, there in own_machine().items():
        wanted = getattr(resources, kind.lower())
        if where.address is None and wanted > there:
            what = f"resources.{kind.lower()}"
            raise UserError(f"{what} is {wanted:g}, but this machine has {there:g}; try {what}={there:g}")


def own_machine() -> dict[str, int]:
    """What this machine has, as Ray names it."""
    return {"GPU": torch.cuda.device_count(), "CPU": os.cpu_count() or 1}


class Session(NamedTuple):
    """slots: how many trials fit at a time. outlives_us: a notebook's own Ray, which goes on when a sweep ends."""

    slots: int
    outlives_us: bool


@contextmanager
def ray_cluster(resources: Resources, where: Where, modules: Sequence[str] = ()) -> Iterator[Session]:
    """Ray for the length of a block.

    Args:
        modules: of the user's, which travel to a cluster's nodes with this package.

    Raises:
        UserError: no cluster at the address, or no node that can hold a trial.
    """
    for key, value in ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    import ray

    logging.getLogger("ray").setLevel(logging.ERROR)
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # our own callback tells what failed
    warnings.filterwarnings("ignore", module="ray")
    started = not ray.is_initialized()
    with ray_folder() if started and where.address is None else nullcontext():
        if started:
            _start(where, modules)
        try:
            yield Session(_slots_in_time(resources, where.wait), outlives_us=not started)
        finally:
            if started:  # a notebook's own cluster is left as it was
                ray.shutdown()


def check_address(address: str) -> None:
    """Refuses a host and port at which nobody listens: Ray would try for minutes.

    Raises:
        UserError: names the address.
    """
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():  # "auto", which Ray looks up itself
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), CONNECT).close()
    except (OSError, OverflowError) as error:  # the latter for a port that no machine has
        raise UserError(
            f"Ray cluster {address} cannot be reached ({one_line(error)}); try --address HOST:6379"
        ) from error


def _start(where: Where, modules: Sequence[str]) -> None:
    import ray

    if where.address is not None:
        check_address(where.address)
    how: dict = {"include_dashboard": where.dashboard} if where.address is None else {}
    if where.address is not None and not os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR"):
        # nodes get this package and the user's modules; a submitted job has a runtime environment of its own
        own = [importlib.import_module(name.partition(".")[0]) for name in ("patchrank", *modules)]
        places = [list(module.__path__)[0] if hasattr(module, "__path__") else module.__file__ for module in own]
        how["runtime_env"] = {"py_modules": places}
    try:
        context = ray.init(where.address or "local", logging_level=logging.ERROR, log_to_driver=False, **how)
    except Exception as error:  # of many kinds, down to a plain `Exception` where Ray's own processes do not come up
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        if where.address is None:
            raise UserError(f"Ray cannot be started on this machine ({reason})") from error
        raise UserError(f"Ray cluster {where.address} cannot be reached ({reason})") from error
    if url := context.dashboard_url:
        say(f"dashboard: http://{url.removeprefix('http://')}  (if it asks for a token: ray get-auth-token)")


def _slots_in_time(resources: Resources, wait: float) -> int:
    """`available_slots`, asked again until nodes have come or time is over."""
    from ray.autoscaler.sdk import request_resources

    deadline, asked = time.monotonic() + wait, False
    while True:
        try:
            found = available_slots(resources)
            return max(found, AHEAD) if wait else found
        except UserError as error:
            if time.monotonic() >= deadline:
                raise
            if not asked:
                say(f"{error}; waiting up to {wait:g} seconds for nodes")
                # an autoscaler hears what a trial takes; a cluster without one ignores it
                bundle = {kind.upper(): amount for kind, amount in resources.model_dump().items() if amount}
                request_resources(bundles=[bundle])
                asked = True
        time.sleep(POLL)


def available_slots(resources: Resources) -> int:
    """`slots` of the nodes that are there now."""
    import ray

    nodes = [node for node in ray.nodes() if node["Alive"]]
    return slots(resources, {f"{n['NodeManagerAddress']} ({n['NodeID'][:6]})": n["Resources"] for n in nodes})


def slots(resources: Resources, nodes: dict[str, dict]) -> int:
    """How many trials fit at a time on nodes, given as name -> its resources as Ray lists them.

    Raises:
        UserError: names what a trial needs and what each node has.
    """
    wanted = {kind: amount for kind, amount in resources.model_dump().items() if amount}
    fitting = [min(node.get(kind.upper(), 0) / amount for kind, amount in wanted.items()) for node in nodes.values()]
    found = sum(int(each + 1e-9) for each in fitting)
    if not found:
        needs = ", ".join(f"{kind} {amount:g}" for kind, amount in wanted.items())
        has = [f"{name}: cpu {node.get('CPU', 0):g}, gpu {node.get('GPU', 0):g}" for name, node in nodes.items()]
        there = "; ".join(has) or "no nodes"
        raise UserError(f"no node holds a trial: each needs {needs} (resources), and there are {there}")
    return found
