"""What a report says first, and rows without intervals, with controls of some seeds, and of other sweeps beside."""

import json
from pathlib import Path

import numpy as np
import pytest
from helpers.made_up_run import CREDITS, TASKS, Run

from patchrank.config import Claim, Objective, PromptConfig, ReportConfig
from patchrank.io import read_bytes
from patchrank.report import results, write_report
from patchrank.report.claims import judge
from patchrank.report.prose import question, verdicts
from patchrank.report.results import change, mean
from patchrank.report.table import WIDTH, brief_table
from patchrank.tune.sweep import load_sweep

KEEP_RATE = "pruning.keep_rate"
BY_RATE = [KEEP_RATE, "seed"]
CREDIT = CREDITS["digits"]
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
    def one(name, values):
        if name.endswith("groups"):
            return {name: np.full(len(values), "folder/holiday")}
        return {name: np.asarray("group") if name.endswith("unit") else values}

    change_arrays(run, one)


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


def grouped(run, group_of):
    """Gives the images of the last row groups, by their place."""
    rows, run.rows = run.rows, run.rows[-1:]

    def with_groups(name, values):
        if name == "folder.groups":
            return {name: np.array([group_of(n) for n in range(len(values))])}
        return {name: np.asarray("group") if name == "folder.unit" else values}

    change_arrays(run, with_groups)
    run.rows = rows


def test_changes_without_an_interval_are_not_counted_as_none(run):
    run.add(tasks=["folder"], lost=60, pruning__keep_rate=0.5)
    grouped(run, lambda n: "folder/a")
    for rate, lost in ((0.6, 12), (0.7, 0)):
        run.add(tasks=["folder"], lost=lost, pruning__keep_rate=rate)
        grouped(run, lambda n: f"folder/{n % 20}")
    run.report(BY_RATE)
    assert "Accuracy falls in 1 and rises in 0 of 2 settings (" in page_of(run)
    assert " 1 more has no interval." in page_of(run)
    found = json.loads((run.root / "claims.json").read_text())["found"]
    assert "against nothing pruned, on 120 images of 20 groups. Worst is 50 % kept" in found
    assert "changes by -50.00 points, on 120 images of 1 group." in found


def test_the_claim_that_answers_is_the_answer(run):
    run.add(lost=12)
    about = {"of": {}, "against": "unpruned", "measure": "accuracy"}
    claims = [Claim(say="First", at_least=-50, **about), Claim(say="Second", **about)]
    for marked, said in (
        (claims, "**true**: First"),
        ([claims[0], claims[1].model_copy(update={"answers": True})], "**refuted**: Second"),
    ):
        run.report([], claims=marked)
        assert json.loads((run.root / "claims.json").read_text())["answer"] == said
    with pytest.raises(ValueError, match="only one claim can answer the question; try `answers: true` at that one"):
        ReportConfig(table="made-up", claims=[Claim(say="S", answers=True, **about)] * 2)


def test_without_claims_the_answer_is_short(run):
    for n in range(3):
        predictor = {"name": "transformer", "dim": 100 + n, "loss": "listwise", "lr": 0.00123456 + n}
        run.add(lost=12 * n, predictor=predictor, pruning__locations=[1, 2, 3, 4, 5, 6, 7, 8 + n])
    run.report(["predictor", "pruning.locations"])
    answer = json.loads((run.root / "claims.json").read_text())["answer"]
    assert (
        answer.startswith("Accuracy: best +0.00 points (") and "worst -20.00 points (" in answer and len(answer) < 120
    )


@pytest.mark.parametrize("name", sorted(path.stem for path in (Path(__file__).parents[2] / "sweeps").glob("*.yaml")))
def test_every_sweep_that_ships_asks_a_question_and_says_what_answers_it(name):
    report = load_sweep(name).config.report
    assert report.question and report.question.endswith("?")
    assert sum(claim.answers for claim in report.claims) == bool(report.claims)


# ---- one group, and words


@pytest.mark.parametrize(
    "axes",
    [
        BY_RATE,
        *(pytest.param([axis], marks=pytest.mark.slow) for axis in ("predictor.fit_on", "pruning.locations")),
        ["pruning.keep_rate", "golden.window"],
    ],
)
def test_one_group_alone_costs_intervals_and_no_report(run, tmp_path, axes):
    for window in range(1, 13):  # too many for rows, where keep rate and window are swept
        rate = round(0.2 + 0.05 * window, 2)
        run.add(tasks=["folder"], lost=window, pruning__keep_rate=rate, golden__window=window, controls=["random"])
    in_one_group(run)
    holds = Claim(say="S", of={"golden.window": 1}, against="unpruned", measure="accuracy")
    config = ReportConfig(table="made-up", claims=[holds])
    objectives = [Objective(metric="val_accuracy", mode="max"), Objective(metric="gmacs", mode="min")]
    report = write_report(run.rows, str(run.root), config, axes, "sweep.yaml", objectives=objectives)
    page = page_of(run)
    assert page.count("**Without an interval.** All images of `folder` belong to one group, so nothing tells") == 1
    assert " falls in " not in page
    assert "not measured**: S: one group alone" in page and "nan" not in page + report.table
    assert "-0.83" in report.table and "[" not in report.table.partition("\n")[2] and "group" in page
    saved = json.loads((run.root / "claims.json").read_text(), parse_constant=pytest.fail)
    assert saved["found"].count("on 120 images of 1 group.") == 1 and "interval" not in saved["found"]
    pictures = {f"made-up-{name}.png" for name in ("accuracy", "tokens", "front")}
    if "golden.window" in axes:  # so many settings that the front stands for the picture of accuracy
        pictures.remove("made-up-accuracy.png")
    assert {path.name for path in run.root.glob("*.png")} == pictures


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


def test_mixed_tasks_name_both_kinds(run):
    run.add(tasks=["digits", "folder"], lost=12)
    run.report([], claims=[Claim(say="S", of={}, against="unpruned", measure="accuracy", at_least=-50)])
    saved = json.loads((run.root / "claims.json").read_text())
    assert saved["found"].count("on 120 images of 40 digits and 120 images.") == 1
    assert "; 120 images of 40 digits and 120 images\n" in page_of(run) and "over digits and images)" in page_of(run)
    assert "group" not in page_of(run)


@pytest.mark.parametrize("count, said", [(1, "`folder` has one image alone, so"), (2, "")])
def test_one_image_alone_has_no_interval(run, count, said):
    run.add(tasks=["folder"], lost=0)
    change_arrays(run, lambda name, values: {name: values[:count] if values.shape[:1] == (120,) else values})
    run.report([])
    assert said in page_of(run) and ("**Without an interval.**" in page_of(run)) == bool(said)


IDS = {
    "folder": "{kind}/IMG-{n:04d}.jpg",  # a camera's
    "caltech101": "{kind}/image_{n:04d}.jpg",
    "imagenet": "{kind}/ILSVRC2012_val_{n:08d}.JPEG",
    "wds": "{kind}/{n:05d}-0",  # WebDataset's shard and key
}


@pytest.mark.parametrize("saved", ["images", "ids alone"])
@pytest.mark.parametrize("task", IDS)
def test_a_report_on_anybodys_ids_speaks_of_images(run, task, saved):
    for rate, lost in ((0.5, 12), (0.8, 0)):
        run.add(tasks=[task], lost=lost, pruning__keep_rate=rate, controls=["random"])

    ids = [IDS[task].format(kind=kind, n=n) for kind in ("cats", "dogs") for n in range(60)]

    def named(name, values):
        if saved == "ids alone" and name.endswith(("groups", "unit")):
            return {}
        new = {f"{task}.ids": np.array(ids), f"{task}.groups": np.array([f"{task}/{each}" for each in ids])}
        return {name: new.get(name, values)}

    change_arrays(run, named)
    claim = Claim(
        say="Little is lost", of={}, against="unpruned", measure="accuracy", at_least=-50, each=["task", KEEP_RATE]
    )
    report = run.report(BY_RATE, claims=[claim])
    page = page_of(run).replace("patchrank_clip_digits", "")
    assert "**true**: Little is lost: holds 2, refuted 0, not told apart 0 of 2" in page and "; 120 images\n" in page
    assert "nothing pruned, on 120 images." in page and "over images)" in page and "-10.00 [" in report.table
    assert "digit" not in page and "group" not in page and CREDIT not in page


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
        controls = ["random", "reversed"] if seed == 0 else []
        run.add(seed=seed, lost=6 * seed, controls=controls)
        run.rows[-1]["config"]["controls"] = controls
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


def test_a_report_says_of_which_seeds_controls_are(run):
    for seed in range(3):
        run.add(seed=seed, controls=["random", "reversed"] if seed == 0 else [])
        run.add(seed=seed, pruning__keep_rate=0.3, controls=["random"] if seed < 2 else [])
    run.report(BY_RATE)
    assert "Controls: of seed 0 alone or seeds 0 and 1 alone." in page_of(run)
    run.rows = [row for row in run.rows if row["config"]["seed"] == 0]
    run.report(BY_RATE)
    assert "Controls drop as many" in page_of(run) and "Controls: of" not in page_of(run)


def test_controls_of_one_seed_may_come_from_several_rows(run):
    for controls in (["random"], ["reversed"], []):
        run.add(lost=6, controls=controls)
        run.rows[-1]["config"]["controls"] = controls
    (setting,) = run.settings()
    assert len(setting.rows) == 1 and setting.has("random") and setting.has("reversed")
    assert change(setting).estimate == pytest.approx(-5) and setting.seeds_with("reversed") == [0]


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
    assert f"Beside them stand 3 trials of `{other.root}`. All trials of `{other.root}` are shown already." in page_of(
        ours
    )


def test_arrays_are_read_once(tmp_path, monkeypatch):
    ours, other = two_runs(tmp_path)
    read = []
    monkeypatch.setattr(results, "read_bytes", lambda path: read.append(str(path)) or read_bytes(path))
    ours.report(BY_RATE, beside=[str(other.root)])
    assert len(read) == len(set(read)) == 4  # on an object store each reading costs


DAMAGED = "stands 1 trial of `ROOT`. Left out of its 2: 1 whose record or arrays are missing or damaged."
FAULTS = {
    "nothing": ("is shown beside, since its results.jsonl cannot be read", 2),
    "no text": ("since its results.jsonl cannot be read", 2),
    "damaged": (DAMAGED, 1),
    "no config": (DAMAGED, 1),
    "no metrics": (DAMAGED, 1),
    "no figure": (DAMAGED, 1),
    "no file": (DAMAGED, 1),
    "cut file": (DAMAGED, 1),
    "no zip": (DAMAGED, 1),
    "no array": (DAMAGED, 1),
    "scalar array": (DAMAGED, 1),
    "short array": (DAMAGED, 1),
}


def spoil(other, fault):
    """Damages the first row of a sweep, or its arrays."""
    row, path = other.rows[0], other.root / "trials" / "0000.npz"
    if fault in ("no config", "no metrics"):
        del row[fault.removeprefix("no ")]
    elif fault == "no figure":
        del row["metrics"]["gmacs"]
    elif fault == "no file":
        path.unlink()
    elif fault == "cut file":
        path.write_bytes(path.read_bytes()[:500])
    elif fault == "no zip":
        path.write_bytes(b"no zip at all")
    elif fault.endswith("array"):
        with np.load(path) as arrays:
            found = dict(arrays)
        whole = found.pop("digits_ink.cosine")
        left = {"no array": {}, "scalar array": {"digits_ink.cosine": whole[0]}}
        np.savez(path, **found, **left.get(fault, {"digits_ink.cosine": whole[:-1]}))
    write_rows(other)
    file = other.root / "results.jsonl"
    if fault == "nothing":
        file.unlink()
    elif fault == "no text":
        file.write_bytes(b"\xff\xfe\x00")
    elif fault == "damaged":
        file.write_text('{"id": \n' + file.read_text().splitlines()[1])


@pytest.mark.parametrize("fault", FAULTS)
def test_what_cannot_stand_beside_costs_a_line(tmp_path, fault):
    ours, other = two_runs(tmp_path)
    spoil(other, fault)
    report = ours.report(BY_RATE, claims=[WON], beside=[str(other.root)])
    page, (said, missing) = page_of(ours), FAULTS[fault]
    assert said.replace("ROOT", str(other.root)) in page and "nothing to compare with" in page
    assert "(going by its name, `python -m patchrank.tune sweeps/other.yaml`)" in page
    assert len(report.table.splitlines()) == 6 - missing


def test_rows_that_draw_images_otherwise_do_not_stand_beside(tmp_path):
    ours, other = (Run(tmp_path / name) for name in ("ours", "other"))
    for run, prompt in ((ours, TUNED), (other, UNTUNED)):
        run.add(tasks=["folder"], prompt=prompt)
    in_one_group(ours)
    ours.rows[0]["id"] = "t0000"
    (ours.root / "trials/0000.npz").rename(ours.root / "trials/t0000.npz")
    write_rows(other)
    ours.report(BY_RATE, beside=[str(other.root)])
    assert "1 of an earlier version, which draws images otherwise. To mend what" in page_of(ours)
    in_one_group(other)
    report = ours.report(BY_RATE, beside=[str(other.root)])
    assert f"Beside them stands 1 trial of `{other.root}`." in page_of(ours) and len(report.table.splitlines()) == 4
    assert "All images of `folder` belong to one group" in page_of(ours)


@pytest.mark.parametrize(
    "changed, why",
    [
        ({"data": {"n_test": 0}}, "of another model or other data (data.n_test)"),
        ({"data": {"n_train": 64}}, "of another model or other data (data.n_train)"),
        ({"data": {"root": "elsewhere", "templates": "openai7"}}, "or other data (data.root, data.templates)"),
        ({"data": {"vocabulary": "names.yaml"}}, "or other data (data.vocabulary)"),
        ({"data": {"tasks": ["digits"]}}, "or other data (data.tasks)"),
        ({"model": {"checkpoint": "mine.safetensors"}}, "of another model or other data (model.checkpoint)"),
        ({"model": {"name": "vit_base"}}, "of another model or other data (model.name)"),
    ],
)
def test_rows_of_another_model_or_other_data_do_not_stand_beside(tmp_path, changed, why):
    ours, other = two_runs(tmp_path)
    for section, values in changed.items():
        other.rows[0]["config"][section] |= values
    if changed.get("data") == {"n_test": 0}:
        row = other.rows[0]
        row["metrics"] |= {"val_agreement": 98.0, "val_cosine": 0.99}
    write_rows(other)
    report = ours.report(BY_RATE, beside=[str(other.root)])
    page = page_of(ours)
    assert f"stands 1 trial of `{other.root}`. Left out of its 2: 1 " in page and f"{why}." in page
    assert "To mend" not in page and len(report.table.splitlines()) == 5


def test_rows_of_other_images_do_not_stand_beside(tmp_path):
    ours, other = two_runs(tmp_path)
    change_arrays(other, lambda name, values: {name: values[::-1] if name == "digits.ids" else values})
    ours.report(BY_RATE, beside=[str(other.root)])
    assert f"Nothing of `{other.root}` is shown beside. Left out of its 2: 2 of other images." in page_of(ours)


def test_the_sentences_at_the_beginning_are_of_the_sweeps_own_rows(tmp_path):
    ours, other = two_runs(tmp_path)
    other.add(lost=60, pruning__keep_rate=0.1, prompt=UNTUNED)
    other.add(lost=60, pruning__keep_rate=0.5, prompt=TUNED, seed=1)  # another seed of one of ours
    write_rows(other)
    report = ours.report(BY_RATE, beside=[str(other.root)])
    saved = json.loads((ours.root / "claims.json").read_text())
    assert "-50.00" in report.table and "±" in report.table
    assert "Worst is 50 % kept; text + visual prompts: accuracy changes by -5.00 points" in saved["found"]
    assert "rises in 0 of 2 settings" in page_of(ours) and "-50" not in saved["answer"]


def test_roots_beside_are_resolved_as_the_sweeps_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    overrides = ["report.beside=[runs/one, memory://two]", 'report.question="What for?"']
    sweep, quick = (load_sweep("locations", overrides, quick) for quick in (False, True))
    assert sweep.config.report.beside == (str(tmp_path / "runs/one"), "memory://two")
    assert quick.config.report.beside == (str(tmp_path / "runs/one-quick"), "memory://two-quick")
    assert sweep.config.report.question == "What for?" and sweep.config.report.claims
    assert set(TASKS) < set(sweep.config.trial.data.tasks)


# ---- what leaves, and how


def add_merging(run, **settings):
    """A setting with matching, as of tokens that are compared."""
    run.add(lost=2, **settings)
    run.rows[-1]["metrics"] |= {"gmacs_matching": 0.001, "n_kept": 30, "n_tokens": 64}


def test_a_page_says_what_leaves_and_how(run):
    for budget in (0.75, 0.65):
        both = {"pruning__budget": budget, "pruning__taper": 0.5, "pruning__align": 8, "pruning__keep_rate": 1.0}
        add_merging(run, pruning__reducer="tome", **both)
        add_merging(run, pruning__reducer="guided_merge", **both)
        add_merging(run, pruning__leftovers="merge", **both)
        run.add(**both)
        run.rows[-1]["metrics"] |= {"n_kept": 26, "n_tokens": 64}
    axes = ["pruning.reducer", "pruning.leftovers", "pruning.budget"]
    run.report(axes)
    page = page_of(run)
    told = "tokens leave at layers 4, 6, 8, 10; ranking by preservation; predictor mix_mlp; taper 0.5; align 8."
    assert f"Everywhere: {told}" in page
    assert "% of patch tokens kept" not in page and "its ranking and matching included" in page
    names = [row["ranked by"] for row in run.table(axes)[1]]
    assert names[1:5] == ["ToMe", "guided merging", "predictor", "predictor"]
    head, rows = run.table(axes)
    assert [row["leftovers"] for row in rows[1:5]] == ["", "", "merge", "drop"]
    assert [row["budget"] for row in rows[1:]] == ["75 %"] * 4 + ["65 %"] * 4
    assert [row["tokens left"] for row in rows[1:5]] == ["30 of 64"] * 3 + ["26 of 64"]
    assert brief_table(run.settings(), axes).splitlines()[4].startswith("predictor; merge; 75 % of MACs ")


def test_a_page_on_one_budget_names_it_and_a_page_without_says_what_it_said_before(run):
    add_merging(run, pruning__budget=0.65, pruning__leftovers="merge", pruning__locations=[4])
    run.report([])
    said = "Everywhere: at most 65 % of the tower's MACs; tokens leave before layer 4; leftovers: merge; ranking by"
    assert said in page_of(run) and "taper" not in page_of(run)
    other = Run(run.root.parent / "other")
    other.add()
    other.report([])
    said = "Everywhere: 60 % of patch tokens kept; tokens leave before layers 4, 6, 8, 10; leftovers: drop; ranking by"
    assert said in page_of(other) and "tokens left" not in page_of(other)
    assert "GMACs: one image, its ranking included." in page_of(other)


def test_settings_that_say_nothing_of_leftovers_are_those_that_drop(run):
    run.add(pruning__leftovers=None)
    run.add(pruning__leftovers="drop", seed=1)
    (setting,) = run.settings()
    assert len(setting.rows) == 2 and setting.leftovers == "drop"
