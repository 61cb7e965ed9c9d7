"""Sweeps that grow or shrink: finished trials stay, what is missing is all that runs, and nothing is lost for ever."""

from pathlib import Path

import optuna
import pytest
from helpers.small_sweep import plan_of, write_record

from patchrank.tune.console import print_plan
from patchrank.tune.plan import Plan, make_plan
from patchrank.tune.search import CellSearch
from patchrank.tune.sweep import load_sweep

SPACE = "pruning.keep_rate: {uniform: [0.3, 0.9], step: 0.1}\npruning.locations: {choice: [[4], [4, 6, 8, 10]]}"


def rates(*values: float) -> str:
    return f"pruning.keep_rate: {{grid: {list(values)}}}"


def asked(plan: Plan) -> list[dict]:
    """All that a run would run, in order."""
    search, found = CellSearch(plan), []
    while (next_one := search.suggest(f"t{len(found)}")) != CellSearch.FINISHED:
        found.append(next_one["values"])
    return found


def finish(plan: Plan) -> None:
    """Lets everything that is missing leave its record."""
    for values in asked(plan):
        write_record(plan, values, sweep="small")


def shown(plan: Plan) -> list[tuple]:
    return [(row["config"]["pruning"]["keep_rate"], row["config"]["pruning"]["locations"]) for row in plan.rows()]


def test_an_axis_that_is_extended_runs_its_new_points_alone(tmp_path):
    finish(plan_of(tmp_path, rates(0.5, 0.6)))
    before = {file.name: file.stat().st_mtime_ns for file in Path(tmp_path, "runs/small/trials").iterdir()}
    wider = plan_of(tmp_path, rates(0.4, 0.5, 0.6, 0.7))
    assert (wider.size, wider.missing()) == (4, 2)
    assert [values["pruning.keep_rate"] for values in asked(wider)] == [0.4, 0.7]
    finish(wider)
    wider.refresh()
    assert [rate for rate, _ in shown(wider)] == [0.4, 0.5, 0.6, 0.7]  # in plan order
    now = {file.name: file.stat().st_mtime_ns for file in Path(tmp_path, "runs/small/trials").iterdir()}
    assert {name: now[name] for name in before} == before


def test_an_axis_that_is_new_keeps_the_trials_that_had_its_value_as_a_setting(tmp_path):
    finish(plan_of(tmp_path, rates(0.5, 0.6)))
    both = plan_of(tmp_path, rates(0.5, 0.6) + "\nseed: {grid: [0, 1]}")
    assert asked(both) == [{"pruning.keep_rate": rate, "seed": 1} for rate in (0.5, 0.6)]


def test_a_value_that_is_dropped_leaves_the_rows_and_comes_back_with_its_record(tmp_path, capsys):
    finish(plan_of(tmp_path, rates(0.5, 0.6, 0.7)))
    fewer = plan_of(tmp_path, rates(0.5, 0.7))
    assert fewer.missing() == 0 and [rate for rate, _ in shown(fewer)] == [0.5, 0.7]
    print_plan(fewer, [], 0)
    assert "note: finished trials that are not in this plan: 1; their records stay" in capsys.readouterr().err
    back = plan_of(tmp_path, rates(0.5, 0.6, 0.7))
    assert back.missing() == 0 and [rate for rate, _ in shown(back)] == [0.5, 0.6, 0.7]
    print_plan(back, [], 0)
    assert "not in this plan" not in capsys.readouterr().err


def test_more_samples_of_a_random_search_keep_the_first_ones(tmp_path):
    few = plan_of(tmp_path, SPACE, search="{method: random, samples: 4}")
    first = [cell.values for cell in few.cells]
    finish(few)
    more = plan_of(tmp_path, SPACE, search="{method: random, samples: 9}")
    assert [cell.values for cell in more.cells][:4] == first and len(asked(more)) == 5
    assert not any(values in first for values in asked(more))


def test_a_search_that_learns_goes_on_from_what_a_random_one_has_finished(tmp_path):
    finish(plan_of(tmp_path, SPACE, search="{method: random, samples: 4}"))
    wider = SPACE.replace("[0.3, 0.9]", "[0.2, 1.0]")  # for a random search another draw
    learning = plan_of(tmp_path, wider, search="{method: optuna, samples: 6}")
    assert learning.missing() == 2 and len(CellSearch(learning).studies[0].trials) == 4


def test_an_axis_that_is_pinned_leaves_the_rows_of_its_value_and_comes_back(tmp_path):
    finish(plan_of(tmp_path, rates(0.5, 0.6)))
    where = [f"root={tmp_path}/runs/small", f"shards={tmp_path}/runs/shards"]
    pinned = make_plan(load_sweep(str(tmp_path / "sweep.yaml"), [*where, "trial.pruning.keep_rate=0.6"]))
    assert pinned.missing() == 0 and [rate for rate, _ in shown(pinned)] == [0.6]
    assert plan_of(tmp_path, rates(0.5, 0.6)).missing() == 0


def test_a_grid_around_a_random_search_grows_and_its_other_points_draw_as_before(tmp_path):
    how = "{method: random, samples: 3}"
    finish(plan_of(tmp_path, SPACE + "\nseed: {grid: [0]}", search=how))
    more = plan_of(tmp_path, SPACE + "\nseed: {grid: [0, 1]}", search=how)
    assert len(asked(more)) == 3 and all(values["seed"] == 1 for values in asked(more))


@pytest.mark.parametrize("sampler", ["tpe", pytest.param("nsga2", marks=pytest.mark.slow)])
def test_more_samples_of_a_search_are_asked_of_a_study_that_knows_the_finished_ones(tmp_path, sampler):
    how = f"{{method: optuna, sampler: {sampler}, samples: 4}}"
    finish(plan_of(tmp_path, SPACE, search=how))
    more = plan_of(tmp_path, SPACE, search=how.replace("4", "7"))
    first = shown(more)
    (study,) = CellSearch(more).studies
    assert sorted(trial.params["pruning.keep_rate"] for trial in study.trials) == sorted(rate for rate, _ in first)
    assert all(trial.state == optuna.trial.TrialState.COMPLETE for trial in study.trials)
    assert more.missing() == len(asked(more)) == 3
    finish(more)
    more.refresh()
    assert more.missing() == 0 and set(map(str, first)) < set(map(str, shown(more)))


@pytest.mark.parametrize(
    "space, kept",
    [
        (SPACE.replace("[0.3, 0.9]", "[0.2, 1.0]"), lambda rate, where: True),
        pytest.param(SPACE.replace("0.1}", "0.05}"), lambda rate, where: True, marks=pytest.mark.slow),
        pytest.param(SPACE.replace("[[4], ", "[[4], [4, 5], "), lambda rate, where: True, marks=pytest.mark.slow),
        (SPACE.replace("[[4], ", "["), lambda rate, where: where != [4]),
        pytest.param(
            SPACE.replace("[0.3, 0.9]", "[0.6, 0.9]"), lambda rate, where: rate >= 0.6, marks=pytest.mark.slow
        ),
        (SPACE.replace("0.1}", "0.2}"), lambda rate, where: rate in (0.3, 0.5, 0.7, 0.9)),
        (SPACE.replace("[0.3, 0.9]", "[0.25, 0.95]"), lambda rate, where: False),
    ],
)
def test_a_search_goes_on_in_a_space_that_has_changed_with_what_still_lies_in_it(tmp_path, space, kept):
    """Numbers between the steps of a new rule, too: Optuna refuses them, with a traceback."""
    how = "{method: optuna, samples: 14}"  # all there is
    before = plan_of(tmp_path, SPACE, search=how)
    finish(before)
    before.refresh()
    assert before.missing() == 0
    changed = plan_of(tmp_path, space, search="{method: optuna, samples: 16}")
    inside = [row for row in shown(before) if kept(*row)]
    assert sorted(map(str, shown(changed))) == sorted(map(str, inside))
    assert changed.set_aside() == 14 - len(inside)
    search = CellSearch(changed)
    assert len(search.studies[0].trials) == len(inside) and search.suggest("t") is not None
    assert plan_of(tmp_path, SPACE, search=how).missing() == 0  # and the way back is free


def test_whole_numbers_have_steps_too(tmp_path):
    space, how = "predictor.dim: {int: [16, 64], step: 16}", "{method: optuna, samples: 4}"
    finish(plan_of(tmp_path, space, search=how, reducer="predictor"))
    other = plan_of(tmp_path, "predictor.dim: {int: [16, 64], step: 24}", search=how, reducer="predictor")
    assert [row["config"]["predictor"]["dim"] for row in other.rows()] in ([16, 64], [64, 16])
    assert len(asked(other)) == 1


def test_what_was_ended_early_counts_in_a_sweep_that_grows(tmp_path):
    asha = "{method: grid, asha: {of: predictor, grace: 1}}"
    plan = plan_of(tmp_path, rates(0.5, 0.6), search=asha, reducer="predictor")
    rules = plan.sweep.config.search.asha.model_dump()
    reached = {"step": 1, "step_value": 70.0}
    write_record(plan, plan.cells[0].values, ".stopped", status="stopped", asha=rules, reached=reached, metrics={})
    wider = plan_of(tmp_path, rates(0.5, 0.6, 0.7), search=asha, reducer="predictor")
    assert [values["pruning.keep_rate"] for values in asked(wider)] == [0.6, 0.7]
