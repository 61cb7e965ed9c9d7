"""Trials that tell of their steps: what is told, that nothing depends on it, and what an end leaves behind."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
from torch import nn

from patchrank import fit
from patchrank.config import AshaConfig, TrialConfig
from patchrank.golden.agreement import matching, matching_on, prior_of, rank_quality
from patchrank.golden.dataset import Ranked
from patchrank.layers.predictors import PREDICTORS
from patchrank.prompt import tuning
from patchrank.trial import training
from patchrank.trial.epochs import Steps
from patchrank.trial.identity import trial_id
from patchrank.trial.inputs import load_inputs
from patchrank.trial.requirements import ResolvedTrial, TrialContext
from patchrank.trial.run import run_trial
from patchrank.utils.errors import UserError

EPOCHS = 3
BASE = TrialConfig.model_validate(
    {
        "data": {"tasks": ["digits", "digits_ink"], "n_train": 24, "n_val": 16, "n_test": 16},
        "golden": {"stride": 2},
        "predictor": {"epochs": EPOCHS, "dim": 8},
        "pruning": {"locations": [4], "keep_rate": 0.4},
    }
)
PROMPTS = {"mode": "TV", "shots": 1, "images": 10, "epochs": EPOCHS}
DISTILLED = PROMPTS | {"mode": "V", "loss": "distill"}


def trial(prompt: dict | None = None, tasks: int = 2, **sections) -> ResolvedTrial:
    """The base trial with keys of its sections replaced; prompts make it one whose ranking is not fitted."""
    raw = BASE.model_dump()
    raw["data"]["tasks"] = raw["data"]["tasks"][:tasks]
    raw["pruning"]["reducer"] = "predictor" if prompt is None else "center"
    for section, changes in sections.items():
        raw[section] |= changes
    return ResolvedTrial(TrialConfig.model_validate(raw | {"prompt": prompt}))


@pytest.fixture(scope="module")
def inputs():
    return load_inputs(BASE.model, BASE.data)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Golden-rank shards, made once."""
    return tmp_path_factory.mktemp("shards")


@pytest.fixture
def run(inputs, shards, tmp_path):
    """Runs a trial; what tests before this one fitted and tuned is gone, and `afresh` what this one did."""

    def forget():
        for kind in ("predictors", "prompts"):
            shutil.rmtree(shards / kind, ignore_errors=True)

    def run_one(what: ResolvedTrial, steps: Steps | None = None, given=inputs, afresh: bool = False, pulse=None):
        if afresh:
            forget()
        return run_trial(what, given, str(tmp_path), str(shards), "test", quiet=True, steps=steps, pulse=pulse)

    forget()
    return run_one


class Told(list):
    """Steps and values, in the order in which they were told."""

    def steps(self, of: str, until: int | None = None, reason: BaseException | None = None) -> Steps:
        """Whose listener raises `reason` at step `until`."""

        def report(step: int, value: float) -> None:
            torch.rand(3), np.random.rand(3)  # nobody may depend on what a listener draws
            self.append((step, value))
            if step == until:
                raise reason

        return Steps(of, report)


class Forgetful(nn.Linear):
    """A predictor that draws random numbers while it is trained."""

    def __init__(self, embed_dim: int, grid_size: tuple[int, int]):
        super().__init__(embed_dim, 1)
        self.rest = nn.Dropout(0.5)

    def forward(self, cls, patches):
        return super().forward(self.rest(patches)).squeeze(-1)


@pytest.mark.parametrize("name", ["forgetful", "mix_mlp"])
def test_what_is_fitted_does_not_depend_on_who_listens(name, monkeypatch):
    monkeypatch.setitem(PREDICTORS, "forgetful", Forgetful)
    draw = torch.Generator().manual_seed(0)
    data = Ranked(*(torch.randn(shape, generator=draw) for shape in ((80, 8), (80, 16, 8), (80, 16))))
    told = []

    def hear(epoch, predictor):
        assert not predictor.training
        torch.rand(5)
        told.append((epoch, matching_on(predictor, data)))

    how = dict(name=name, epochs=3, lr=0.3, quiet=True)
    alone, heard = (fit.fit_predictor(data, (4, 4), after_epoch=each, **how) for each in (None, hear))
    assert all(torch.equal(value, heard.state_dict()[key]) for key, value in alone.state_dict().items())
    assert [epoch for epoch, _ in told] == [1, 2, 3] and not heard.training
    quality = rank_quality(heard, prior_of(data), data)
    assert told[-1][1] == pytest.approx(matching(quality, 16)["matching_rate"])
    assert len({value for _, value in told}) > 1  # of the predictor as it stood each time


@pytest.mark.parametrize(
    "prompt",
    [pytest.param(PROMPTS, marks=pytest.mark.slow), DISTILLED | {"norm_gains": True}, PROMPTS | {"patience": 1}],
)
def test_what_is_tuned_does_not_depend_on_who_listens(prompt, run, shards):
    one = trial(prompt, tasks=1)
    alone = run(one)
    (path,) = (shards / "prompts").iterdir()
    before = path.read_bytes()
    told = Told()
    heard = run(one, told.steps("prompt"), afresh=True)
    assert path.read_bytes() == before and list((shards / "prompts").iterdir()) == [path]
    assert heard["id"] == alone["id"] and heard["metrics"] == alone["metrics"]
    assert told[0][0] == 1 and 2 <= len(told) <= EPOCHS


@pytest.mark.parametrize("of, what", [("predictor", trial()), ("prompt", trial(PROMPTS))])
def test_a_pulse_hears_every_epoch_and_nothing_is_measured_for_it(of, what, run, monkeypatch):
    told = []
    for module, name in ((training, "matching_on"), (tuning, "_watch")):
        monkeypatch.setattr(module, name, lambda *args: pytest.fail("a value was measured"))
    run(what, pulse=lambda *reached: told.append(reached))
    assert told == [(of, n, 2 * EPOCHS) for n in range(1, 2 * EPOCHS + 1)]


@pytest.mark.parametrize("of, what", [("predictor", trial()), ("prompt", trial(PROMPTS)), ("prompt", trial(DISTILLED))])
def test_steps_are_counted_over_tasks_and_end_at_what_the_record_says(of, what, run, inputs):
    told = Told()
    metrics = run(what, told.steps(of))["metrics"]
    assert [step for step, _ in told] == list(range(1, 2 * EPOCHS + 1))
    assert TrialContext(what, inputs).num_steps(of) == 2 * EPOCHS
    measure, scale = {"predictor": ("matching_rate", 1)}.get(of, ("val_accuracy", 1))
    if what.learns and what.config.prompt.loss == "distill":
        measure, scale = "val_cosine", 100
    for task, step in zip(what.tasks, (EPOCHS, 2 * EPOCHS)):
        assert told[step - 1][1] == pytest.approx(scale * metrics["tasks"][task][measure], abs=1e-3)
    again = Told()
    assert run(what, again.steps(of))["metrics"] == metrics
    assert again == []  # nothing had to be trained


def test_a_predictor_for_several_tasks_is_judged_by_all_of_them(run, inputs):
    what, told = trial(predictor={"fit_on": ["digits_full"]}), Told()
    metrics = run(what, told.steps("predictor"))["metrics"]
    assert [step for step, _ in told] == [1, 2, 3] and TrialContext(what, inputs).num_steps("predictor") == 3
    assert told[-1][1] == pytest.approx(metrics["matching_rate"])


@pytest.mark.parametrize("of, what", [("predictor", trial(PROMPTS)), ("prompt", trial())])
def test_other_trainings_than_those_asked_for_are_no_steps(of, what, run, inputs):
    told = Told()
    run(what, told.steps(of))
    assert told == [] and TrialContext(what, inputs).num_steps(of) == 0


@pytest.mark.parametrize(
    "what, of, count",
    [
        (trial(pruning={"reducer": "prior"}), "predictor", 0),
        (trial(predictor={"name": "prior"}), "predictor", 0),
        (trial({"mode": "none"}), "prompt", 0),
        (trial({"mode": "T"}), "prompt", 2 * 50),  # coop
        (trial({"mode": "TV"}), "prompt", 2 * 15),  # digits
        (trial({"mode": "V", "loss": "distill"}, tasks=1), "prompt", 8),
    ],
)
def test_a_trial_knows_how_many_steps_it_will_have(what, of, count, inputs):
    assert TrialContext(what, inputs).num_steps(of) == count


def test_nothing_is_computed_for_nobody(run, monkeypatch):
    monkeypatch.setattr(training, "matching_on", lambda *_: pytest.fail("nobody listens"))
    monkeypatch.setattr(tuning, "_watch", lambda *_: pytest.fail("nobody listens"))
    run(trial(PROMPTS, tasks=1, pruning={"reducer": "predictor"}))


@pytest.mark.parametrize(
    "of, what, reason",
    [
        ("predictor", trial(), SystemExit(0)),  # as Ray ends threads
        ("prompt", trial(PROMPTS), SystemExit(0)),
        ("prompt", trial(DISTILLED), RuntimeError("it fell behind")),
    ],
)
@pytest.mark.slow
def test_an_end_is_no_failure_and_leaves_nothing_to_the_next_trial(of, what, reason, run, inputs, shards, tmp_path):
    other = trial(DISTILLED, tasks=1, pruning={"keep_rate": 0.6})
    expected = run(other, given=load_inputs(BASE.model, BASE.data))["metrics"]
    states = [(module.training, module) for module in inputs.clip.modules()]
    told, folder = Told(), tmp_path / "trials"
    steps = told.steps(of, until=EPOCHS + 1, reason=reason)
    before = set(folder.iterdir())
    with pytest.raises(type(reason)) as raised:
        run(what, steps, afresh=True)
    assert raised.value is reason and steps.ended
    assert set(folder.iterdir()) == before  # neither record nor error
    finished = [file for kind in ("predictors", "prompts") for file in (shards / kind).glob("*.safetensors")]
    assert len(finished) == 1  # of the first task
    clip = inputs.clip
    assert clip.prompts is None and clip.visual.pruner is None and clip.visual.num_prompt_tokens == 0
    assert all(module.training == training for training, module in states)
    assert run(other)["metrics"] == expected
    rest = Told()
    complete = run(what, rest.steps(of))
    assert complete["metrics"] == run(what, given=load_inputs(BASE.model, BASE.data), afresh=True)["metrics"]
    first = EPOCHS + 2 if of == "prompt" else EPOCHS + 1  # prompts go on from where they were, predictors start anew
    assert [step for step, _ in rest] == list(range(first, 2 * EPOCHS + 1))


def test_a_failure_beside_steps_is_one_still(run, inputs, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "matching_on", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(trial(), Told().steps("predictor"))
    identity = trial_id(TrialContext(trial(), inputs))
    assert (tmp_path / "trials" / f"{identity}.error.json").exists()


def test_settings_by_which_nothing_can_be_ended_are_refused():
    from patchrank.tune.early_stopping import asha_scheduler

    asha = AshaConfig(of="prompt", grace=6)
    with pytest.raises(UserError, match="no trial of this sweep trains one"):
        asha_scheduler(asha, 0)
    with pytest.raises(UserError, match="grace is 6, but must be below the 6 steps of a trial.* try 1"):
        asha_scheduler(asha, 6)
    told = asha_scheduler(AshaConfig(of="prompt", grace=2, reduction=3), 18).debug_string()
    assert re.findall(r"Iter ([\d.]+):", told) == ["6.000", "2.000"]  # and none at 18, when all is paid for


@pytest.mark.slow
def test_asha_ends_what_falls_behind_and_nothing_else(tmp_path):
    from ray import tune

    from patchrank.config import Resources
    from patchrank.tune.cluster import Where, ray_cluster
    from patchrank.tune.early_stopping import asha_scheduler, was_stopped

    asha = AshaConfig(of="prompt", grace=1, reduction=2)
    rates = [0.9, 0.8, 0.1, 0.15, 0.95, 0.2, 0.12, 0.85]  # some that fall behind, and others after them
    data = {"n_train": 32, "n_val": 16, "n_test": 16}
    many = PROMPTS | {"epochs": 6, "shots": 2}
    trials = [trial(many, tasks=1, data=data, pruning={"keep_rate": rate}) for rate in rates]
    given, last = load_inputs(BASE.model, trials[0].config.data), {}

    class Listener(tune.Callback):
        def on_trial_complete(self, iteration, trials, trial, **info):
            assert trial.config["n"] not in last
            last[trial.config["n"]] = trial.last_result

    def work(config, trials, root, asha):  # in here, since workers cannot import a test
        import json
        import os
        import threading

        import torch

        from patchrank.trial import inputs
        from patchrank.trial import run as trial
        from patchrank.tune.early_stopping import reporting

        torch.set_num_threads(1)
        running = sum(type(each).__name__ == "RunnerThread" for each in threading.enumerate())
        about = {"n": config["n"], "pid": os.getpid(), "running": running, "end": ""}
        what = trials[config["n"]]
        if not hasattr(torch, "kept"):  # what a worker keeps for its next trial
            torch.kept = inputs.load_inputs(what.config.model, what.config.data)
        try:
            record = trial.run_trial(what, torch.kept, root, f"{root}/shards", "test", True, reporting(asha))
        except BaseException as reason:
            about["end"] = repr(reason)
            raise
        finally:
            with open(f"{root}/workers.jsonl", "a") as file:
                file.write(json.dumps(about) + "\n")
        tune.report(record["metrics"])

    trainable = tune.with_parameters(work, trials=trials, root=str(tmp_path), asha=asha)
    scheduler = asha_scheduler(asha, max(TrialContext(each, given).num_steps("prompt") for each in trials))
    with ray_cluster(Resources(cpu=1), Where()):
        tuner = tune.Tuner(
            tune.with_resources(trainable, {"cpu": 1}),
            param_space={"n": tune.grid_search(list(range(len(rates))))},
            tune_config=tune.TuneConfig(scheduler=scheduler, max_concurrent_trials=2, reuse_actors=True),
            run_config=tune.RunConfig(storage_path=str(tmp_path / "ray"), verbose=0, callbacks=[Listener()]),
        )
        assert not tuner.fit().errors
    stopped = {n for n, result in last.items() if was_stopped(result)}
    assert len(last) == len(rates) and stopped and stopped < last.keys()
    assert {rates[n] for n in stopped} <= {0.1, 0.12, 0.15, 0.2}
    assert all(last[n]["step"] < 6 for n in stopped)

    ids = [trial_id(TrialContext(each, given)) for each in trials]
    finished = {f"{identity}.{kind}" for n, identity in enumerate(ids) if n not in stopped for kind in ("json", "npz")}
    assert {path.name for path in (tmp_path / "trials").iterdir()} == finished  # and no error

    work_done = [json.loads(line) for line in (tmp_path / "workers.jsonl").read_text().splitlines()]
    assert all(each["running"] == 1 for each in work_done)  # the thread of the trial before is gone
    ended = [place for place, each in enumerate(work_done) if each["end"]]
    assert {work_done[place]["n"] for place in ended} <= stopped
    assert all(work_done[place]["end"] == "SystemExit(0)" for place in ended)
    assert any(work_done[place]["pid"] in {each["pid"] for each in work_done[place + 1 :]} for place in ended)

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for n in last.keys() - stopped:
            alone = run_trial(trials[n], given, str(tmp_path / "alone"), str(tmp_path / "own"), "test", quiet=True)
            record = json.loads((tmp_path / "trials" / f"{ids[n]}.json").read_text())
            assert record["metrics"] == alone["metrics"] and record["config"] == alone["config"]
    finally:
        torch.set_num_threads(threads)
