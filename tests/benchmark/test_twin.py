"""One tower beside its unpruned twin: what is measured, what a measurement is named by, and the command."""

import json

import pytest
import torch

from patchrank import benchmark
from patchrank.benchmark import main, measure, twin
from patchrank.config import BenchmarkConfig, TrialConfig
from patchrank.trial.identity import speed_id, speed_settings
from patchrank.trial.requirements import ResolvedTrial
from patchrank.trial.speed import measure_trial, random_tower
from patchrank.tune.space import configure
from patchrank.utils.device import hardware
from patchrank.utils.errors import UserError

FEW = BenchmarkConfig(batch_size=2, repeats=3)
BASE = TrialConfig(pruning={"keep_rate": 0.6})


def test_towers_take_turns_and_the_first_runs_do_not_count(monkeypatch):
    ran, tower = [], random_tower(ResolvedTrial(BASE))
    costs = {True: iter([9, 9, 9, 2, 4, 6]), False: iter([9, 9, 9, 8, 8, 10])}

    def seconds(run, images):
        ran.append(run.pruner is not None)
        assert tuple(images.shape) == (4, 3, 64, 64) and torch.is_inference_mode_enabled()
        return next(costs[ran[-1]])

    monkeypatch.setattr(twin, "seconds_of", seconds)
    found = measure(tower, batch_size=4, repeats=3)
    assert ran == [True, False] * 6
    assert found["ms"] == 1000 and found["ms_unpruned"] == 2000 and found["speedup"] == 2
    assert found["ms_quartiles"] == [750, 1250] and found["ms_unpruned_quartiles"] == [2000, 2250]


def test_the_twin_of_a_tower_with_a_budget_is_whole(monkeypatch):
    pruned, trial = [], configure(BASE, {"pruning.reducer": "tome", "pruning.budget": 0.7})
    monkeypatch.setattr(twin, "seconds_of", lambda run, _: pruned.append(run.pruner is not None) or 1.0)
    measure(random_tower(trial), batch_size=2, repeats=1)
    assert pruned == [True, False] * 4


def test_lengths_that_only_prompts_make_possible_need_not_be_kept_to_by_the_twin(monkeypatch):
    """66 tokens are left of 64 patches, the class token and 4 prompts; without prompts there are only 65."""
    pruned, tower = [], random_tower(configure(BASE, {"prompt.mode": "V"}))
    tower.set_pruning(reducer="tome", locations=(4,), align=66)
    monkeypatch.setattr(twin, "seconds_of", lambda run, _: pruned.append((run.pruner is not None, run.prompts)) or 1.0)
    measure(tower, batch_size=2, repeats=1)
    assert pruned == [(True, tower.prompts), (False, None)] * 4


def test_what_is_timed_is_the_pruned_forward_and_timms_own(monkeypatch):
    images, outputs = [], []
    tower = random_tower(configure(BASE, {"prompt.mode": "V"}))
    assert tower.num_prompt_tokens == 4

    def seconds(run, given):
        images.append(given)
        outputs.append(run(given))
        return 1.0

    monkeypatch.setattr(twin, "seconds_of", seconds)
    measure(tower, batch_size=2, repeats=1, seed=5)
    tower.set_prompts(None)
    tower.set_pruning(keep_rate=1.0, drop_counts=None)
    with torch.inference_mode():
        assert torch.equal(outputs[1], tower(images[0])) and not torch.allclose(outputs[0], outputs[1], atol=1e-3)
    assert all(torch.equal(images[0], each) for each in images)
    assert torch.equal(images[0], torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(5)))


def test_real_times_make_sense():
    trial = configure(BASE, {"pruning.reducer": "center", "pruning.locations": [1], "pruning.keep_rate": 0.1})
    found = measure(random_tower(trial), batch_size=16, repeats=9)
    assert found["speedup"] == found["ms_unpruned"] / found["ms"] > 1.5  # of 4.7 that are counted
    assert found["ms_quartiles"][0] <= found["ms"] <= found["ms_quartiles"][1]


@pytest.mark.parametrize(
    "changes",
    [
        {"seed": 3},
        {"predictor.lr": 0.5, "predictor.epochs": 3, "predictor.loss": "listwise"},
        {"golden.metric": "label", "golden.window": 3},
        {"data.n_train": 7, "data.tasks": ["digits_ink"]},
        {"predictor.fit_on": ["digits"]},
        {"prompt.mode": "T"},
    ],
)
def test_what_changes_no_time_changes_no_id(changes):
    machine = hardware()
    assert speed_id(configure(BASE, changes), machine, FEW) == speed_id(ResolvedTrial(BASE), machine, FEW)


@pytest.mark.parametrize(
    "changes",
    [
        {"pruning.keep_rate": 0.5},
        {"pruning.locations": [4]},
        {"pruning.reducer": "random"},
        {"pruning.drop_counts": [1, 1, 1, 1]},
        {"predictor.name": "transformer"},
        {"predictor.dim": 32},
        {"predictor.head": "mean"},
        {"model.name": "patchrank_clip_b32"},
        {"prompt.mode": "V"},
        {"prompt.mode": "V", "prompt.num_tokens": 2},
        {"prompt.mode": "TV", "prompt.norm_gains": True},
    ],
)
def test_what_changes_time_changes_the_id(changes):
    machine = hardware()
    assert speed_id(configure(BASE, changes), machine, FEW) != speed_id(ResolvedTrial(BASE), machine, FEW)


def test_hardware_and_batch_are_part_of_the_id_and_a_predictor_where_it_ranks_alone():
    machine, ids = hardware(), set()
    for other in (machine, machine | {"gpu": "X"}, machine | {"threads": 99}, machine | {"cpu": "Y"}):
        ids.add(speed_id(ResolvedTrial(BASE), other, FEW))
    assert len(ids | {speed_id(ResolvedTrial(BASE), machine, BenchmarkConfig(batch_size=3, repeats=3))}) == 5
    center = {"pruning.reducer": "center"}
    assert speed_settings(configure(BASE, center)) == speed_settings(configure(BASE, center | {"predictor.dim": 32}))
    whole = [configure(BASE, {"pruning.keep_rate": 1.0, "pruning.reducer": name}) for name in ("random", "predictor")]
    assert speed_settings(whole[0]) == speed_settings(whole[1])
    assert machine["cpu"] and machine["gpu"] is None and machine["threads"] == torch.get_num_threads()


def test_a_trial_is_measured_once_with_its_own_predictor(tmp_path, monkeypatch):
    trial, towers = configure(BASE, {"predictor.name": "transformer", "predictor.dim": 24}), []

    def measured(tower, *args):
        towers.append((type(tower.pruner.reducer.predictor).__name__, args))
        return {"ms": 1.0, "ms_unpruned": 2.0, "speedup": 2.0, "ms_quartiles": [1.0, 1.0]}

    monkeypatch.setattr(benchmark, "measure", measured)
    record = measure_trial(trial, "cpu", FEW, str(tmp_path))
    assert towers == [("Transformer", (2, 3))]
    assert json.loads((tmp_path / f"{record['id']}.json").read_text()) == record
    assert record["id"] == speed_id(trial, hardware(), FEW) and record["hardware"] == hardware()
    assert record["settings"]["predictor"] == {"name": "transformer", "dim": 24, "head": "linear"}
    assert measure_trial(configure(trial.config, {"seed": 4}), "cpu", FEW, str(tmp_path)) == record and len(towers) == 1
    (tmp_path / f"{record['id']}.json").write_text("{")  # a damaged record is made again
    assert measure_trial(trial, "cpu", FEW, str(tmp_path))["ms"] == 1.0 and len(towers) == 2


@pytest.mark.parametrize("reducer", ["predictor", "prior", "center", "random", "cls_attention"])
def test_every_reducer_has_a_tower_to_be_timed(reducer):
    trial = configure(BASE, {"pruning.reducer": reducer, "prompt.mode": "TV", "prompt.norm_gains": True})
    state = torch.random.get_rng_state()
    tower = random_tower(trial)
    assert torch.equal(state, torch.random.get_rng_state())
    assert len(tower.prompts.norm_gains) == 26 and tower.pruning.reducer == reducer
    with torch.inference_mode():
        assert tower(torch.randn(2, 3, 64, 64)).isfinite().all()


def test_oracles_have_no_time(tmp_path):
    with pytest.raises(UserError, match="'golden'.*no time of its own; try prior"):
        measure_trial(configure(BASE, {"pruning.reducer": "golden"}), "cpu", FEW, str(tmp_path))
    assert not list(tmp_path.iterdir())


def test_the_command_prints_one_line(capsys, tmp_path):
    before, rows = torch.get_num_threads(), tmp_path / "rows.json"
    fast = ["--batch-size", "2", "--repeats", "3", "--threads", "1"]
    try:
        main(["--keep-rate", "0.5", *fast, "--json", str(rows)])
    finally:
        torch.set_num_threads(before)
    out, err = capsys.readouterr()
    row = json.loads(out)
    assert json.loads(rows.read_text()) == [row]
    assert row["hardware"]["threads"] == 1 and row["batch_size"] == 2 and row["ms"] > 0 and "speed-up" in err
    assert row["gmacs"] < row["gmacs_unpruned"] and row["keep_rate"] == 0.5
    with pytest.raises(UserError, match="device 'cuda:9'"):
        main(["--device", "cuda:9"])
