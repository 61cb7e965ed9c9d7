"""What becomes of trials, as Ray tells it: unit tests of the callback, with made-up trials."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import ray
from helpers.small_sweep import plan_of

from patchrank.config import Resources
from patchrank.tune import callback
from patchrank.tune.callback import NO_MEMORY, RETRIES, Progress
from patchrank.tune.cluster import Where, ray_cluster
from patchrank.tune.early_stopping import STEP, VALUE
from patchrank.tune.signals import Interrupts
from patchrank.utils.errors import UserError

SPACE = "pruning.keep_rate: {grid: [0.9, 0.8]}"


class Actor:
    """Prints as a handle of Ray's does."""

    def __init__(self, name: str):
        self.name = name

    def __repr__(self):
        return f"Actor(Worker, {self.name})"


def trial_of(rate: float, name: str, result: dict | None = None) -> SimpleNamespace:
    config, state = {"values": {"pruning.keep_rate": rate}}, SimpleNamespace(ray_actor=Actor(f"actor-{name}"))
    return SimpleNamespace(trial_id=name, config=config, temporary_state=state, last_result=result, error_file=None)


@pytest.fixture
def progress(tmp_path):
    progress = Progress(plan_of(tmp_path, SPACE), 2, "run-1", {}, Interrupts())
    yield progress
    progress.bar.close()


def errors(progress: Progress) -> list[dict]:
    folder = Path(progress.plan.sweep.config.root) / "trials"
    return [json.loads(file.read_text()) for file in folder.glob("*.error.json")]


def test_an_actor_that_is_lost_before_its_trial_starts_costs_an_attempt_alone(progress):
    assert progress.next_round() and not progress.next_round()
    for n in range(RETRIES):
        progress.on_trial_error(0, [], trial_of(0.9, f"t{n}"))
        assert progress.next_round() and len(progress.lost) == 1 and progress.left == 2
    progress.on_trial_error(0, [], trial_of(0.9, "last"))
    assert not progress.next_round() and progress.left == 1
    assert [error["error"] for error in errors(progress)] == ["its worker process died, or the node under it"]
    assert errors(progress)[0]["run"] == "run-1"


def test_whoever_is_named_is_to_blame_for_memory_and_nobody_else(progress):
    for rate, name in ((0.9, "a"), (0.8, "b")):
        progress.on_trial_start(0, [], trial_of(rate, name))
    progress.out_of_memory("killed Actor(actor-b)")
    assert list(progress.lost.values()) == [{"pruning.keep_rate": 0.8}] and not progress.one_at_a_time


@pytest.mark.slow
def test_rays_own_actors_print_with_the_ids_that_its_messages_have():
    with ray_cluster(Resources(cpu=1), Where()):

        @ray.remote
        class Worker:
            def identify(self) -> str:
                return ray.get_runtime_context().get_actor_id()

        worker = Worker.remote()
        assert callback.actor_id(worker) == ray.get(worker.identify.remote())


def test_where_nobody_is_named_trials_come_round_one_at_a_time(progress):
    for _ in range(RETRIES + 2):
        for rate, name in ((0.9, "a"), (0.8, "b")):
            progress.on_trial_start(0, [], trial_of(rate, name))
        progress.out_of_memory("killed somebody")
        assert progress.one_at_a_time and not progress.failures and progress.next_round()
    for _ in range(RETRIES + 1):
        progress.on_trial_start(0, [], trial_of(0.9, "a"))
        progress.out_of_memory("killed somebody")
    assert [failure.cause for failure in progress.failures.values()] == [NO_MEMORY]


@pytest.mark.parametrize("result", [{"failure": "RuntimeError: x"}, {STEP: 2, VALUE: 50.0, "done": True}])
def test_a_store_that_takes_nothing_does_not_end_tune(progress, monkeypatch, result):
    def write_json(path, value):
        raise UserError("cannot write: No space left on device")

    monkeypatch.setattr(callback, "write_json", write_json)
    asha = SimpleNamespace(model_dump=lambda: {})
    config = progress.plan.sweep.config
    search = config.search.model_copy(update={"asha": asha})
    progress.plan.sweep = replace(progress.plan.sweep, config=config.model_copy(update={"search": search}))
    trial = trial_of(0.9, "a", result)
    progress.on_trial_start(0, [], trial)
    progress.on_trial_complete(0, [], trial)
    assert progress.left == 1 and len(progress.failures) == ("failure" in result)


def test_a_trial_that_reports_nothing_has_failed(progress):
    trial = trial_of(0.9, "a", {"training_iteration": 1})
    progress.on_trial_start(0, [], trial)
    progress.on_trial_complete(0, [], trial)
    assert [failure.cause for failure in progress.failures.values()] == ["it ended without reporting anything"]


def test_gauges_count_what_has_a_record(progress, monkeypatch):
    shown = []
    monkeypatch.setattr(callback, "show_sweep", lambda *about: shown.append(about))
    metrics = {"id": "x", "val_accuracy": 91.0}
    for rate, name, result in ((0.9, "a", metrics), (0.8, "b", {"failure": "RuntimeError: x"})):
        progress.on_trial_start(0, [], trial_of(rate, name))
        progress.on_trial_complete(0, [], trial_of(rate, name, result))
    progress.on_step_end(0, [])
    assert shown == [("small", 2, 1, 1, {"val_accuracy": 91.0})]
