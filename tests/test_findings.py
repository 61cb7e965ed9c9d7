"""What a report says first, and rows without intervals, with controls of some seeds, and of other sweeps beside."""

import json

import numpy as np
import pytest
from made_up_run import TASKS, Run

from patchrank.config import Claim, Objective, PromptConfig, ReportConfig
from patchrank.data.digits import CREDIT
from patchrank.report import write_report
from patchrank.report.claims import judge
from patchrank.report.compare import change, mean
from patchrank.report.findings import WIDTH, brief_table, question, verdicts
from patchrank.tune.spec import load_sweep

BY_RATE = ["pruning.keep_rate", "seed"]
UNTUNED, TUNED = (PromptConfig(mode=mode).model_dump() for mode in ("none", "TV"))


@pytest.fixture
def run(tmp_path):
    return Run(tmp_path / "run")


def page_of(run):
    return (run.root / "report.md").read_text()


def change_arrays(run, changed):
    """Saves the arrays of every row anew, each name and values as `changed(name, values)` gives them, or not at all."""
    for row in run.rows:
        path = run.root / "trials" / f"{row['id']}.npz"
        with np.load(path) as arrays:
            found = [changed(name, values) for name, values in arrays.items()]
        np.savez(path, **{name: values for each in found for name, values in each.items()})


def in_one_group(run):
    def with_groups(name, values):
        if not name.endswith("ids"):
            return {name: values}
        groups = {name.removesuffix("ids") + "groups": np.full(len(values), "folder/holiday")}
        return {name: values} | groups | {name.removesuffix("ids") + "unit": np.asarray("group")}

    change_arrays(run, with_groups)


# ---- the table at the end


def test_the_table_at_the_end_fits_a_terminal_and_has_a_line_for_each_setting(run):
    golden = {"window": 3, "rounds": 4}
    for seed in (0, 1):
        run.add(seed=seed, lost=12 * seed, pruning__keep_rate=0.5, predictor={"name": "transformer", "dim": 128})
        run.add(seed=seed, pruning__keep_rate=0.8, golden=golden, predictor={"loss": "listwise", "lr": 0.00123456})
    run.add(pruning__reducer="golden", pruning__keep_rate=0.8)
    report = run.report(["golden", "predictor", *BY_RATE])
    head, unpruned, first, second, oracle, note = report.table.splitlines()
    assert head.split() == ["setting", "accuracy", "change,", "95", "%", "interval", "GMACs", "val"]
    assert unpruned.startswith("nothing pruned ") and unpruned.split()[2:] == ["95.0", "0.0456", "96.5"]
    assert "90.0 ± 7.1   -5.00 [-" in first and first.endswith("0.0340  95.5") and "*" not in report.table
    assert "85.0°" in oracle and note == "° on the first 40 images of each task alone"
    assert max(map(len, report.table.splitlines())) <= WIDTH and "|" not in report.table
    assert "listwise" in page_of(run)


def test_a_name_that_is_too_long_is_visibly_shortened(run):
    prompt = PromptConfig(words="a rather long beginning of a prompt that goes on and on").model_dump()
    for number in range(2):
        words = f"{prompt['words']}, in the variant that was numbered {number}"
        run.add(prompt=prompt | {"words": words}, pruning__locations=[1, 2, 3, 4, 5, 6, 7, 8, 9, 10])
    lines = brief_table(run.settings(), ["prompt.words", "pruning.locations"]).splitlines()
    assert {len(line) for line in lines[2:]} == {WIDTH} and all("…" in line for line in lines[2:])
    assert len(set(lines)) == len(lines)


# ---- three sentences


def test_what_was_asked_is_said_by_the_sweep_file_or_by_its_axes():
    assert question("Which?", ["seed"]) == "Which?"
    axes = ["pruning.keep_rate", "seed", "controls", "pruning.locations"]
    assert question(None, axes) == "How does accuracy change with pruning keep rate and pruning locations?"
    assert question(None, ["seed"]) == "How does accuracy change with pruning?"


def test_claims_are_counted(run):
    run.add(lost=12, pruning__keep_rate=0.5)
    about = {"of": {"pruning.keep_rate": 0.5}, "against": "unpruned", "measure": "accuracy"}
    claims = [Claim(say="A", at_least=-90, **about), Claim(say="B", **about)]
    claims += [Claim(say="C", of={"pruning.keep_rate": 0.1}, measure="accuracy"), Claim(say="D", at_least=-20, **about)]
    judgements = [judge(claim, run.settings()) for claim in claims]
    assert verdicts(judgements) == "Of 4 claims, 2 hold, 1 is refuted and 1 could not be measured."
    assert (
        verdicts(judgements[1:2]) == "Its one claim is refuted." and verdicts([]) == "Nothing was claimed beforehand."
    )


# ---- one group, and words


@pytest.mark.parametrize(
    "axes", [BY_RATE, ["predictor.fit_on"], ["pruning.locations"], ["pruning.keep_rate", "golden.window"]]
)
def test_one_group_alone_costs_intervals_and_no_report(run, tmp_path, axes):
    for window in range(1, 13):  # as many as make a cloud, where keep rate and window are swept
        rate = round(0.2 + 0.05 * window, 2)
        run.add(tasks=["folder"], lost=window, pruning__keep_rate=rate, golden__window=window, controls=["random"])
    in_one_group(run)
    holds = Claim(say="S", of={"golden.window": 1}, against="unpruned", measure="accuracy")
    config = ReportConfig(table="made-up", claims=[holds])
    objectives = [Objective(metric="val_accuracy", mode="max"), Objective(metric="gmacs", mode="min")]
    report = write_report(run.rows, str(run.root), config, axes, "sweep.yaml", objectives=objectives)
    page = page_of(run)
    assert page.count("**Without an interval**") == 1 and "(`folder`: one group)" in page
    assert "not measured**: S: one group alone" in page and "nan" not in page + report.table
    assert "-0.83" in report.table and "[" not in report.table.partition("\n")[2] and "group" in page
    saved = json.loads((run.root / "claims.json").read_text(), parse_constant=pytest.fail)
    assert "on 120 images of 1 group;" in saved["found"]
    assert {path.name for path in run.root.glob("*.png")} == {
        f"made-up-{n}.png" for n in ("accuracy", "tokens", "front")
    }


def test_words_are_those_of_the_data(run):
    run.add(tasks=["folder"], lost=12)
    holds = Claim(say="S", of={}, against="unpruned", measure="accuracy", at_least=-50)
    run.report([], claims=[holds])
    page = page_of(run)
    assert "; 120 images\n" in page and "digit" not in page.replace("patchrank_clip_digits", "")
    assert "over images)" in page and "Without an interval" not in page
    run.add(lost=12)
    run.rows = run.rows[1:]
    run.report([], claims=[holds])
    assert "; 240 images of 40 digits\n" in page_of(run) and "over digits)" in page_of(run)


def test_photographs_and_digits_are_credited_where_they_were_shown_or_fitted_on(run):
    run.add(tasks=["folder"])
    run.report([])
    assert CREDIT not in page_of(run)
    run.add(tasks=["folder"], predictor__fit_on=["digits_ink"])
    run.report(["predictor.fit_on"])
    assert page_of(run).endswith(f"{CREDIT}\n")


# ---- controls beside some seeds


def test_controls_are_means_over_the_seeds_that_ran_them(run):
    for seed in range(3):
        run.add(seed=seed, lost=6 * seed, controls=["random", "reversed"] * (seed == 0))
        run.rows[-1]["config"]["controls"] = ["random", "reversed"] * (seed == 0)
        run.add(seed=seed, pruning__reducer="prior")
    settings = run.settings()
    assert [len(each.rows) for each in settings] == [3, 3]
    assert settings[0].has("random") and not settings[1].has("random") and settings[0].has("accuracy")
    assert len(settings[0].seeds("random")) == 1 and mean(settings[0], "random") == 50
    assert len(settings[0].seeds("accuracy")) == 3 and change(settings[0]).estimate == pytest.approx(-5)
    better = Claim(say="S", of={"pruning.reducer": "predictor"}, against=90, measure="random")
    (comparison,) = judge(better, settings).comparisons
    assert comparison.verdict == "refuted" and comparison.interval.estimate == pytest.approx(-40)
    _, rows = run.table(["pruning.reducer", "seed", "controls"])
    assert [row["ranked by"] for row in rows][1:4] == ["predictor", "at random (control)", "reversed (control)"]
    assert rows[1]["mean"] == "90.0 ± 5.0" and rows[2]["mean"] == "50.0"


# ---- other sweeps beside


def two_runs(tmp_path, untuned=UNTUNED):
    """A sweep without prompts, finished, and one with, each of two keep rates."""
    other, ours = Run(tmp_path / "other"), Run(tmp_path / "ours")
    for rate, lost in ((0.5, 12), (0.8, 0)):
        other.add(lost=lost, pruning__keep_rate=rate, prompt=untuned or UNTUNED)
        other.rows[-1]["config"]["prompt"] = untuned
        ours.add(lost=lost // 2, pruning__keep_rate=rate, prompt=TUNED)
    for row in ours.rows:  # two runs number their rows alike
        (ours.root / "trials" / f"{row['id']}.npz").rename(ours.root / "trials" / f"t{row['id']}.npz")
        row["id"] = f"t{row['id']}"
    write_rows(other)
    return ours, other


def write_rows(run):
    (run.root / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in run.rows))


WON = Claim(
    say="Tuned wins",
    of={"prompt.mode": "TV"},
    against={"prompt.mode": "none"},
    measure="accuracy",
    each=["pruning.keep_rate"],
)


@pytest.mark.parametrize("untuned", [UNTUNED, None, PromptConfig(mode="none", shots=4).model_dump()])
def test_rows_of_another_sweep_stand_beside_and_are_compared_with(tmp_path, untuned):
    ours, other = two_runs(tmp_path, untuned)
    report = ours.report(BY_RATE, claims=[WON], beside=[str(other.root)])
    names = [line.rpartition("prompts")[0] for line in report.table.splitlines()[2:]]
    assert names == ["50 % kept; text + visual ", "80 % kept; text + visual ", "50 % kept; no ", "80 % kept; no "]
    page = page_of(ours)
    assert "trials run: 2, on 2026-11-22" in page and f"Beside them stand 2 trials of `{other.root}`." in page
    assert "wins 1, loses 0, not told apart 1 of 2" in page
    assert "| 50 % | none |" in page and "| 50 % | text + visual |" in page


def test_rows_that_stand_in_both_count_once(tmp_path):
    ours, other = two_runs(tmp_path)
    other.rows.append(ours.rows[0])
    (other.root / "trials" / "t0000.npz").write_bytes((ours.root / "trials" / "t0000.npz").read_bytes())
    other.add(lost=60, pruning__keep_rate=0.5, prompt=UNTUNED)  # the same seed of the same setting again
    write_rows(other)
    report = ours.report(BY_RATE, beside=[str(other.root), str(other.root)])
    assert len(report.table.splitlines()) == 6 and "-10.00 [" in report.table and "±" not in report.table
    assert f"Beside them stand 3 trials of `{other.root}`. Beside them stand 0 trials" in page_of(ours)


@pytest.mark.parametrize("fault", ["nothing", "damaged", "no config", "no arrays", "old"])
def test_a_sweep_that_cannot_stand_beside_costs_a_line(tmp_path, fault):
    ours, other = two_runs(tmp_path)
    file = other.root / "results.jsonl"
    if fault == "nothing":
        file.unlink()
    elif fault == "damaged":
        file.write_text('{"id": ')
    elif fault == "no config":
        file.write_text('{"id": "x"}\n')
    elif fault == "no arrays":
        (other.root / "trials" / "0000.npz").unlink()
    else:
        other.add(tasks=["folder"])  # whose groups nothing tells
        write_rows(other)
    ours.report(BY_RATE, claims=[WON], beside=[str(other.root)])
    page = page_of(ours)
    said = {
        "nothing": "since it holds no results.jsonl",
        "no arrays": "stand 1 of 2 trials of",
        "old": "stand 2 of 3 trials of",
    }
    assert said.get(fault, "its results.jsonl cannot be used") in page
    assert "(going by its name, `python -m patchrank.tune sweeps/other.yaml`)" in page
    assert "nothing to compare with" in page or fault == "old"


def test_rows_whose_groups_are_known_stand_beside_whatever_their_data(tmp_path):
    ours, other = two_runs(tmp_path)
    other.rows = []
    other.add(tasks=["folder"], prompt=UNTUNED)
    in_one_group(other)
    write_rows(other)
    ours.report(BY_RATE, beside=[str(other.root)])
    assert f"Beside them stand 1 trials of `{other.root}`" in page_of(ours) and "`folder`: one group" in page_of(ours)


def test_roots_beside_are_resolved_as_the_sweeps_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    overrides = ["report.beside=[runs/one, memory://two]", 'report.question="What for?"']
    sweep, quick = (load_sweep("locations", overrides, quick) for quick in (False, True))
    assert sweep.config.report.beside == [str(tmp_path / "runs/one"), "memory://two"]
    assert quick.config.report.beside == [str(tmp_path / "runs/one-quick"), "memory://two-quick"]
    assert sweep.config.report.question == "What for?" and sweep.config.report.claims
    assert set(TASKS) < set(sweep.config.trial.data.tasks)
