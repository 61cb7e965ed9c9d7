import json
import struct
from pathlib import Path

import numpy as np
import pytest
from helpers.made_up_run import CREDITS, DIGITS, ORACLE, SCENES, TASKS, Run
from matplotlib.figure import Figure

from patchrank.config import Claim, Objective, PromptConfig, ReportConfig
from patchrank.report import paper_rows, write_report
from patchrank.report.__main__ import main
from patchrank.report.labels import labels, swept
from patchrank.report.paper import paper_section
from patchrank.report.plots.style import scale_points
from patchrank.report.plots.sweep import curve_lines, draw_panel, draw_sweep, is_crowded
from patchrank.report.results import change, subset
from patchrank.utils.errors import UserError
from patchrank.utils.veil import draw_left, veil_dropped


@pytest.fixture
def run(tmp_path):
    return Run(tmp_path / "run")


def png_size(path):
    content = path.read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n" and content[-8:-4] == b"IEND"
    return struct.unpack(">II", content[16:24])


# ---- the table


def test_rows_have_accuracies_by_task_and_the_change_with_its_interval(run):
    run.add(lost=12, pruning__keep_rate=0.5)
    run.add(lost=0, pruning__keep_rate=0.8)
    head, rows = run.table(["pruning.keep_rate"])
    assert head[:5] == ["kept", "digits", "digits_ink", "mean", "change"] and "ranked by" not in head
    assert rows[0]["kept"] == "nothing pruned" and rows[0]["mean"] == "95.0" and rows[0]["GMACs"] == "0.0456"
    assert rows[1]["kept"] == "50 %" and rows[1]["digits"] == "85.0"
    assert rows[1]["change"].startswith("**-10.00** [-")
    assert rows[2]["change"] == "+0.00 [+0.00, +0.00]"
    assert rows[1]["matching, prior, chance"] == "80.0, 70.0, 51.6" and rows[1]["Kendall"] == "0.50"
    assert "NDCG" not in head and "ranking MMACs" not in head  # no row has the one, and the other is the same in all


def test_intervals_draw_whole_digits_of_all_tasks_at_once(run):
    run.add(lost=10)
    found = change(run.settings()[0])
    assert (found.n, found.clusters) == (DIGITS * SCENES * 2, DIGITS)
    # 10 digits of 40 lost one of their 3 scenes in both tasks: the mean of 40 draws of 0 or 1/3
    error = 100 / 3 * np.sqrt(0.25 * 0.75 / DIGITS)
    assert found.estimate == pytest.approx(-100 / 12)
    assert (found.high - found.low) / 2 == pytest.approx(1.96 * error, rel=0.1)


def test_seeds_are_merged_and_their_spread_is_shown(run):
    for seed, lost in enumerate((0, 6, 12)):
        run.add(lost=lost, seed=seed)
    run.add(pruning__reducer="prior")
    _, rows = run.table(["seed", "pruning.reducer"])
    assert [row["ranked by"] for row in rows] == ["nothing pruned", "predictor", "position prior"]
    assert rows[1]["mean"] == "90.0 ± 5.0" and "±" not in rows[2]["mean"]


def test_oracles_are_compared_on_their_own_images_where_every_method_stands_beside(run):
    run.add(lost=50)  # of these, none is among the first 40
    run.add(pruning__reducer="golden")
    assert subset(run.settings()) == ORACLE
    _, rows = run.table(["pruning.reducer"])
    column = f"on the oracles' {ORACLE}"
    assert rows[0][column] == "85.0" and rows[1][column] == "85.0, +0.00 [+0.00, +0.00]"
    assert rows[2][column].startswith("85.0") and rows[2]["digits"] == "85.0°"
    assert rows[2]["mean"] == rows[2]["change"] == ""  # nothing to be read beside means over all images


def test_oracles_alone_need_no_column_of_their_own(run):
    run.add(pruning__reducer="golden")
    head, rows = run.table([])
    assert not [name for name in head if "oracles" in name] and rows[1]["mean"] == "85.0"


def test_controls_stand_below_and_the_papers_average_beside(run):
    both = tuned("TV")
    run.add(tasks=["digits"], controls=["random", "reversed"], pruning__locations=[2, 3, 4, 5], prompt=both)
    run.add(tasks=["digits"], pruning__locations=[3], prompt=both)
    run.add(tasks=["digits"], pruning__locations=[4, 6, 8, 10], pruning__keep_rate=0.5, prompt=both)
    run.add(tasks=["digits"], pruning__locations=[2, 3, 4, 5])
    head, rows = run.table(["pruning.locations"], paper_rows("table7"))
    assert head[2] == "accuracy"  # a single task needs no mean
    assert [row["ranked by"] for row in rows[1:4]] == ["predictor", "at random (control)", "reversed (control)"]
    assert rows[2]["accuracy"] == "50.0" and rows[2]["change"].startswith("**-45.00**")
    papers = [row["paper (see below)"] for row in rows[1:]]
    # the rest has other locations, another keep rate than the paper's 60 %, or none of its prompts
    assert papers == ["78.6", "", "", "", "", ""]


def tuned(mode, loss="cross_entropy", gains=False):
    return PromptConfig(mode=mode, loss=loss, norm_gains=gains).model_dump()


def test_prompts_are_one_column_and_say_what_they_have_seen(run):
    axes = ["pruning.keep_rate", "prompt.mode", "prompt.loss", "prompt.norm_gains", "seed"]
    run.add(prompt=tuned("none"))
    run.add(prompt=tuned("TV"), seen=(160, 401, 160))
    run.add(prompt=tuned("V", "distill", True), seen=(1024, 1024, 0))
    run.add(prompt=tuned("none"), pruning__keep_rate=1.0)
    head, rows = run.table(axes, paper_rows("table5"))
    assert head[:2] == ["kept", "prompts"]
    assert [row["prompts"] for row in rows[1:]] == ["none", "text + visual", "visual + gains, distilled", "none"]
    assert [row["images seen"] for row in rows[1:]] == ["256", "401", "1024", "0"]  # 256 of the ranking among them
    assert [row["labels seen"] for row in rows[1:]] == ["0", "160", "0", "0"]
    assert rows[1]["1000 (1 - cosine)"] == "10.00"
    assert [row["paper (see below)"] for row in rows[1:]] == ["66.3", "79.5", "", "67.9"]
    names = labels(run.settings(), axes)
    assert names[:3] == ["60 % kept; no prompts", "60 % kept; text + visual prompts",
                         "60 % kept; visual prompts + gains, distilled"]  # fmt: skip
    run.report(axes)
    page = (run.root / "report.md").read_text()
    assert "160 images of each task with their labels or 1024 images of each task without labels" in page
    assert page.count("Zero-shot accuracy") == 0 and "text + visual" in page


def test_panels_show_all_rates_of_the_sweep_though_a_row_may_lack_some(run):
    run.add(pruning__keep_rate=0.8)
    panel = Figure().add_subplot()
    draw_panel(panel, curve_lines(run.settings(), ["pruning.keep_rate"]), "digits", [20.0, 80.0, 100.0])
    assert panel.get_xlim() == (103, 17) and list(panel.get_xticks()) == [20, 80, 100]


def test_other_settings_of_prompts_have_columns_of_their_own(run):
    for shots in (1, 16):
        run.add(prompt=tuned("TV") | {"shots": shots})
    columns = swept(run.settings(), ["prompt.mode", "prompt.shots"])
    assert columns["shots"] == ["1", "16"] and columns["prompts"] == ["text + visual"] * 2


def test_tuned_curves_have_colours_of_their_own(run):
    for rate in (0.8, 0.5):
        for mode in ("none", "T", "TV"):
            run.add(prompt=tuned(mode), pruning__keep_rate=rate)
        run.add(prompt=tuned("none"), pruning__keep_rate=rate, pruning__reducer="cls_attention")
    axes = ["pruning.keep_rate", "pruning.reducer", "prompt.mode"]
    lines = curve_lines(run.settings(), axes)
    names = ["predictor", "predictor; text prompts", "predictor; text + visual prompts", "CLS attention"]
    assert sorted(look["label"] for look, _ in lines) == sorted(names)
    assert len({look["color"] for look, _ in lines}) == 4 and all(len(points) == 2 for _, points in lines)


def test_a_section_axis_is_named_by_what_it_changes_and_unread_settings_are_left_out(run):
    for golden in ({}, {"window": 3}, {"rounds": 4}):
        run.add(golden=golden)
    run.add(pruning__reducer="random")
    columns = swept(run.settings(), ["golden", "pruning.reducer"])
    assert columns == {
        "golden": ["default", "window 3", "rounds 4", ""],
        "ranked by": ["predictor", "predictor", "predictor", "at random"],
    }
    assert labels(run.settings(), ["golden", "pruning.reducer"])[1:] == [
        "predictor; window 3",
        "predictor; rounds 4",
        "at random",
    ]


# ---- the paper


def test_papers_tables_were_copied_right():
    """Table 7's averages are the means of its rows, up to the paper's slips of 0.13 and 0.17 in the last two."""
    for line in paper_rows("table7")["rows"]:
        assert np.mean(line["values"][:-1]) == pytest.approx(line["values"][-1], abs=0.18)
    of_scores, of_predictors = (
        {tuple(row["key"]): row["values"] for row in paper_rows(key)["rows"]} for key in ("table1", "table6")
    )
    assert len(of_scores) == len(of_predictors) == 21
    for (dataset, name), (matching, unpruned, *predicted) in of_predictors.items():
        assert unpruned == of_scores[dataset, "Label"][0]
        if name == "Mix-MLP":  # stands in both tables
            assert [matching, *predicted] == of_scores[dataset, "Preservation"][5:]
    # table 5's average of table 1's predictions at 60 %
    kept_60 = [values[8] for (_, score), values in of_scores.items() if score == "Preservation"]
    assert np.mean(kept_60) == pytest.approx(66.3, abs=0.05)


@pytest.mark.parametrize("key", ["table1", "table2", "table6", "table7"])
def test_papers_tables_are_whole(key):
    paper = paper_rows(key)
    assert {len(row["values"]) for row in paper["rows"]} == {len(paper["columns"])}
    lines = paper_section(paper).splitlines()[2:]
    assert len({line.count("|") for line in lines}) == 1 and "not comparable" in paper_section(paper)


def test_means_of_the_papers_datasets_are_said_to_be_ours():
    means = [line for line in paper_section(paper_rows("table1")).splitlines() if "by us" in line]
    assert len(means) == 3 and means[2].startswith("| **mean, by us** | Preservation | 67.9 |")


def test_unknown_paper_table_is_refused():
    with pytest.raises(UserError, match="did you mean 'table7'"):
        paper_rows("tabel7")


# ---- pages and pictures


def test_the_page_begins_with_what_was_found_and_ends_with_details(run):
    for rate in (0.8, 0.5):
        for reducer in ("predictor", "random"):
            run.add(pruning__reducer=reducer, pruning__keep_rate=rate)
    claims = [
        Claim(say="Little is lost", of={"pruning.reducer": "predictor", "pruning.keep_rate": 0.5}, against="unpruned",
              measure="accuracy", at_least=-1.0),
        Claim(say="Better than at random", of={"pruning.reducer": "predictor"}, against={"pruning.reducer": "random"},
              measure="accuracy", each=["task", "pruning.keep_rate"]),
    ]  # fmt: skip
    asked = "Is the predictor worth its cost?"
    run.report(["pruning.reducer", "pruning.keep_rate"], claims=claims, paper="table1", question=asked)
    text = (run.root / "report.md").read_text()
    order = ["# made-up", f"{asked}\n\nBest is", "Worst is", "Of 2 claims, 2 hold.\n", "| ranked by | kept |",
             "| nothing pruned", "Accuracy falls in 2 and rises in 0 of 4 settings (", "over digits", "**Claims**",
             "Little is", "sweeps/made-up.yaml`", "2026-11-22",
             "on 120 test images each", "-accuracy.png)", "-tokens.png)", "in detail: Better", "Table 1:",
             CREDITS["digits"]]  # fmt: skip
    places = [text.index(part) for part in order]
    assert places == sorted(places) and "smoke run" not in text
    assert "validation: 20 images of each task" in text
    saved = json.loads((run.root / "claims.json").read_text())
    assert [claim["verdict"] for claim in saved["claims"]] == ["true", "true"]
    assert all(f"- {claim['line']}" in text for claim in saved["claims"])
    assert (saved["sweep"], saved["table"], saved["quick"]) == ("made-up", "made-up", False)
    assert saved["found"].startswith(
        "Best is predictor; 50 % kept: accuracy changes by +0.00 points (95 % interval +0.00 to +0.00) against nothing "
        "pruned, on 240 images of 40 digits. Worst is at random; 80 % kept: accuracy changes by -10.00 points (95 % "
    )
    assert saved["found"].endswith("). Of 2 claims, 2 hold.") and saved["question"] == asked
    assert saved["found"].count(". ") == 2


SWEEPS = {
    "dots": (["pruning.locations"], [{"pruning__locations": [1]}, {"pruning__locations": [4, 6]}]),
    "curves": (
        ["pruning.reducer", "pruning.keep_rate", "pruning.locations"],
        [
            {"pruning__reducer": reducer, "pruning__keep_rate": rate, "pruning__locations": [layer]}
            for reducer in ("predictor", "random", "golden")
            for rate in (0.8, 0.7, 0.6, 0.5)
            for layer in (1, 4)
        ],
    ),
    "map": (["predictor.fit_on"], [{"predictor__fit_on": tasks} for tasks in ("own", ["digits"], TASKS)]),
    "rates": (
        ["predictor", "pruning.keep_rate"],
        [{"predictor": {"dim": dim}, "pruning__keep_rate": rate} for dim in range(1, 10) for rate in (0.6, 0.3)],
    ),
}


@pytest.mark.parametrize("kind", SWEEPS)
def test_every_kind_of_sweep_is_drawn(run, kind):
    axes, points = SWEEPS[kind]
    for point in points:
        run.add(**point)
    run.report(axes)
    for picture in ("accuracy", "tokens"):
        width, height = png_size(run.root / f"made-up-{picture}.png")
        assert 200 < width < 2400 and 100 < height < 2400
    text = (run.root / "report.md").read_text()
    assert ("for 6 of 24 settings, with 60 % kept" in text) == (kind == "curves")
    assert ("Default predictor: dim 1." in text) == (kind == "rates")


def test_small_changes_and_collapses_stand_in_one_picture():
    panel = Figure().add_subplot()
    scale_points(panel, "y", np.array([-0.4, -60.0]))
    small, all_of_it = (panel.transData.transform([(0, 0), (0, low)])[:, 1] for low in (-0.4, -60.0))
    assert (small[0] - small[1]) / (all_of_it[0] - all_of_it[1]) > 0.05  # 0.007 on a linear axis
    assert "-30" in [label.get_text() for label in panel.get_yticklabels()]


def test_dropped_patches_are_veiled_and_kept_ones_untouched():
    pictures = np.full((1, 8, 8, 3), 200, np.uint8)
    veiled = veil_dropped(pictures, np.array([[0, 3]]), np.array([2, 2]))
    assert (veiled[0, :4, :4] == 200).all() and (veiled[0, 4:, 4:] == 200).all()
    assert (veiled[0, :4, 4:] < 150).all() and (veiled[0, 4:, :4] < 150).all()
    assert (draw_left(pictures, np.array([[0, 3]]), None, np.array([2, 2])) == veiled).all()


def test_patches_that_merged_show_the_mean_colour_of_their_region():
    picture = np.arange(12 * 12 * 3).reshape(12, 12, 3).astype(np.uint8)
    # the first row is one region, patch 3 stands alone, 4 joins 5, and the others were dropped
    source = np.array([[0, 0, 0, 1, 2, 2, -1, -1, -1]])
    drawn = draw_left(picture[None], np.array([[0, 3, 5]]), source, np.array([3, 3]))[0]
    region = picture[:4].reshape(-1, 3).mean(0).astype(np.uint8)
    assert (drawn[:3] == region).all()
    assert (drawn[3] != region).any(-1).all()  # the line below it
    assert (drawn[4:8, :3] == picture[4:8, :3]).all() and (drawn[4:8, 3] != picture[4:8, 3]).any(-1).all()
    assert (drawn[4:7, 4:] == picture[4:8, 4:].reshape(-1, 3).mean(0).astype(np.uint8)).all()
    assert abs(drawn[8:].astype(int) - 128).max() < 0.16 * 128


def test_a_page_says_what_merged_patches_show(run):
    run.add()
    run.add(pruning__leftovers="merge")
    path = run.root / "trials" / "0001.npz"
    with np.load(path) as arrays:
        sources = {f"{task}.pictures_source": np.tile(np.arange(16) % 8, (6, 1)) for task in TASKS}
        found = {**arrays, **sources}
    run.report(["pruning.leftovers"])
    before = (run.root / "made-up-tokens.png").read_bytes()
    assert "merged" not in (run.root / "report.md").read_text()
    np.savez(path, **found)
    run.report(["pruning.leftovers"])
    assert "patches that merged show the mean colour" in (run.root / "report.md").read_text()
    assert (run.root / "made-up-tokens.png").read_bytes() != before


# ---- the index


def test_the_index_copies_reports_and_says_what_each_found(tmp_path):
    for name in ("one", "two"):
        run = Run(tmp_path / name)
        run.add()
        of = {"pruning.reducer": "predictor"}
        claim = Claim(say=f"Claim {name}", of=of, against="unpruned", measure="accuracy", at_least=-1.0)
        run.report([], table=name, claims=[claim])
    main([str(tmp_path / "one"), str(tmp_path / "two"), "--out", str(tmp_path / "docs")])
    index = (tmp_path / "docs" / "README.md").read_text()
    assert "## [one](one.md)" in index and "## [two](two.md)" in index and "Claim two: +0.00 [" in index
    assert "python -m patchrank.report" in index and "Accuracy changes by +0.00 points" in index
    rows = [line for line in index.splitlines() if line.startswith("| [")]
    assert rows[1].startswith(
        "| [two](two.md) | How does accuracy change with pruning? | **true**: Claim two | +0.00 ["
    )
    files = {path.name for path in (tmp_path / "docs").iterdir()}
    assert files == {"README.md"} | {
        f"{n}{end}" for n in ("one", "two") for end in (".md", "-accuracy.png", "-tokens.png")
    }
    assert (tmp_path / "docs" / "one.md").read_text() == (tmp_path / "one" / "report.md").read_text()


def test_an_index_keeps_what_it_said_of_other_tables(tmp_path):
    for name, lost in (("one", 0), ("two", 0), ("one", 30)):
        run = Run(tmp_path / f"{name}{lost}")
        run.add(lost=lost)
        run.report([], table=name)
        main([str(run.root), "--out", str(tmp_path / "docs")])
    index = (tmp_path / "docs" / "README.md").read_text()
    one, two = index.split("## [")[1:]
    assert one.startswith("one]") and "changes by -25.00 points" in one
    assert two.startswith("two]") and "changes by +0.00 points" in two
    rows = [line for line in index.splitlines() if line.startswith("| [")]
    assert len(rows) == 2 and "-25.00 points" in rows[0] and rows[0].endswith("| [picture](one-accuracy.png) |")
    assert rows[1].startswith("| [two](two.md) | How does") and "+0.00 points" in rows[1]
    assert index.count("Last brought up to date by") == 1 and "docs/ablations" not in index


def test_the_index_that_ships_keeps_its_rows_and_sections(tmp_path):
    ours = (Path(__file__).parents[2] / "docs/ablations/README.md").read_text()
    (tmp_path / "README.md").write_text(ours)
    run = Run(tmp_path / "run")
    run.add()
    run.report([], table="transfer", question="Or | not?")
    main([str(run.root), "--out", str(tmp_path)])
    index = (tmp_path / "README.md").read_text()
    (before, *old), (after, *new) = (text.split("\n## [") for text in (ours, index))
    assert len(old) == len(new) >= 8
    assert [a.partition("]")[0] for a, b in zip(old, new) if a.strip() != b.strip()] == ["transfer"]
    rows = [[line for line in text.splitlines() if line.startswith("| [")] for text in (before, after)]
    assert [row.split("]")[0] for row in rows[0]] == [f"| [{section.partition(']')[0]}" for section in old]
    assert [a for a, b in zip(*rows) if a != b] == [rows[0][1]] and "| Or \\| not? | Accuracy changes" in rows[1][1]


def test_an_index_without_a_table_gets_one(run, tmp_path):
    (tmp_path / "README.md").write_text("# Ablations\n\nMade long ago.\n\n## [old](old.md)\n\nIt was good.\n")
    run.add()
    run.report([], table="new")
    main([str(run.root), "--out", str(tmp_path)])
    index = (tmp_path / "README.md").read_text()
    assert "| [old](old.md) |  | see below |  |\n| [new](new.md) | How does" in index and "It was good." in index


def test_the_index_refuses_a_report_of_another_version(run, tmp_path):
    run.add()
    run.report([])
    saved = json.loads((run.root / "claims.json").read_text())
    (run.root / "claims.json").write_text(json.dumps(saved | {"schema": 1}))
    with pytest.raises(UserError, match="its report is of another version; run its sweep again"):
        main([str(run.root), "--out", str(tmp_path / "docs")])
    assert not (tmp_path / "docs").exists()


@pytest.mark.parametrize("case", ["quick", "nothing", "twice"])
def test_the_index_refuses_and_writes_nothing(run, tmp_path, case):
    run.add()
    run.report([], command="sweeps/made-up.yaml --quick" if case == "quick" else "sweeps/made-up.yaml")
    folder = str(tmp_path / "empty") if case == "nothing" else str(run.root)
    docs = str(tmp_path / "docs")
    reason = {"quick": "smoke run", "nothing": "no claims.json", "twice": "overwrite"}[case]
    with pytest.raises(UserError, match=reason):
        main([folder, folder, "--out", docs] if case == "twice" else [folder, "--out", docs])
    assert not (tmp_path / "docs").exists()
    assert ("smoke run" in (run.root / "report.md").read_text()) == (case == "quick")


def test_while_trials_are_missing_nothing_is_true_and_the_index_refuses(run, tmp_path):
    run.add()
    holds = Claim(say="Little is lost", of={}, against="unpruned", measure="accuracy", at_least=-5.0)
    run.report([], claims=[holds])
    assert "**true**: Little is lost" in (run.root / "report.md").read_text()
    run.report([], claims=[holds], unfinished=2)
    page = (run.root / "report.md").read_text()
    assert "**not told apart**: Little is lost" in page and "2 trials of this sweep are not done" in page
    with pytest.raises(UserError, match="2 trials of its sweep are not done"):
        main([str(run.root), "--out", str(tmp_path / "docs")])


def test_a_claim_that_fits_several_settings_costs_no_report(run):
    run.add(pruning__keep_rate=0.5)
    run.add(pruning__keep_rate=0.6)
    vague = Claim(say="It holds", of={}, against="unpruned", measure="accuracy", at_least=-5.0)
    run.report(["pruning.keep_rate"], claims=[vague])
    page = (run.root / "report.md").read_text()
    assert "**not measured**: It holds" in page and "several settings match" in page


# ---- sweeps that do not look at test, fronts and failures


def blind_run(run):
    """Rows as trials with `n_test: 0` write them: nothing is there of test."""
    for keep_rate, lost in ((0.5, 12), (0.8, 0)):
        run.add(lost=lost, pruning__keep_rate=keep_rate, data__n_test=0)
        row = run.rows[-1]
        path = run.root / "trials" / f"{row['id']}.npz"
        arrays = dict(np.load(path))
        moved = {}
        for key, value in arrays.items():
            task, _, name = key.partition(".")
            if name in ("right_pruned", "right_unpruned", "cosine", "ids", "groups", "unit"):
                moved[f"{task}.val_{name}"] = value
            elif not name.startswith("val_"):
                moved[key] = value
        np.savez(path, **moved)
        measured = {key: row["metrics"].pop(key) for key in ("accuracy", "accuracy_unpruned", "agreement", "cosine")}
        row["metrics"] |= {f"val_{key}": value for key, value in measured.items()}
    return run


def test_without_test_everything_shown_is_of_val_and_says_so(run):
    head, rows = blind_run(run).table(["pruning.keep_rate"])
    assert head[:5] == ["kept", "digits", "digits_ink", "mean, val", "change"] and "val" not in head
    assert [row["mean, val"] for row in rows] == ["95.0", "85.0", "95.0"]
    assert rows[1]["change"].startswith("**-10.00** [")
    assert rows[1]["agreement"] == "98.0" and rows[1]["cosine"] == "0.9900"
    text = (run.root / run.report(["pruning.keep_rate"]).path).read_text()
    assert "on 120 validation images each of" in text and "**No trial looked at test: all figures here are" in text
    assert "test images" not in text and "On validation images." in text and "on validation images" in text
    summary = json.loads((run.root / "claims.json").read_text())
    assert summary["found"].startswith("Best is 80 % kept: accuracy on val changes by +0.00 points (")
    assert summary["answer"] == "Val accuracy: best +0.00 points (80 % kept), worst -10.00 points (50 % kept)"


def test_claims_on_test_are_not_measured_on_val_instead(run):
    about = {"say": "S", "of": {"pruning.keep_rate": 0.5}, "against": 95}
    claims = [Claim.model_validate(about | {"measure": name}) for name in ("accuracy", "val_accuracy")]
    blind_run(run).report(["pruning.keep_rate"], claims=claims)
    on_test, on_val = json.loads((run.root / "claims.json").read_text())["claims"]
    assert on_test["verdict"] == "not measured" and on_test["missing"] == ["no accuracy"]
    assert on_val["verdict"] == "refuted"


def test_a_front_stands_in_the_page_where_there_are_several_objectives(run, tmp_path):
    blind_run(run)
    objectives = [Objective(metric="val_accuracy", mode="max"), Objective(metric="gmacs", mode="min")]
    run.rows[0]["metrics"] |= {"ms": 1.0, "ms_unpruned": 2.0, "speedup": 2.0}
    where = (str(run.root), ReportConfig(table="made-up"), ["pruning.keep_rate"], "sweeps/made-up.yaml")
    report = write_report(run.rows, *where, objectives=objectives)
    text = (run.root / "report.md").read_text()
    assert "**Pareto front** of val_accuracy (max), gmacs (min): 1 of 2 trials" in text
    assert text.index("Pareto front") < text.index("| kept | digits |") and "| ms | speed-up |" in text
    assert "Pareto" not in report.table
    assert png_size(run.root / "made-up-front.png")[0] > 300 and "](made-up-front.png)" in text
    main([str(run.root), "--out", str(tmp_path / "index")])
    assert (tmp_path / "index" / "made-up-front.png").is_file()
    (run.root / "made-up-front.png").unlink()
    write_report(run.rows, *where, objectives=objectives[:1])
    assert not (run.root / "made-up-front.png").exists() and "Pareto" not in (run.root / "report.md").read_text()


def test_every_failure_is_named_and_none_breaks_the_page(run):
    run.add()
    failures = [("predictor; 60 %", "ValueError: a | b\n| --- |\nin <module>")]
    failures += [("window 9", "no *room* for `it` [x](y)")]
    where = (str(run.root), ReportConfig(table="made-up"), ["seed"], "sweeps/made-up.yaml")
    write_report(run.rows, *where, unfinished=2, failures=failures, stopped=3)
    text = (run.root / "report.md").read_text()
    assert "3 trials were ended early (ASHA), and are not shown." in text
    section = text[text.index("**Failed trials**: 2") :].split("\n\n")[1].splitlines()
    assert section == [
        "| settings | cause |",
        "| --- | --- |",
        "| predictor; 60 % | ValueError: a \\| b \\| --- \\| in &lt;module&gt; |",
        "| window 9 | no \\*room\\* for \\`it\\` \\[x\\](y) |",
    ]
    write_report([], *where, unfinished=2, failures=failures)
    alone = (run.root / "report.md").read_text()
    assert "\n".join(section) in alone and "no trial has a result" in alone and "**2 trials of this sweep" in alone
    assert "![" not in alone and json.loads((run.root / "claims.json").read_text())["unfinished"] == 2


def test_of_settings_too_many_for_rows_the_front_is_drawn(run, tmp_path):
    for window in range(1, 13):  # each at a rate of its own, as samplers draw them
        run.add(lost=3, pruning__keep_rate=round(0.2 + 0.05 * window, 2), golden__window=window)
        run.rows[-1]["metrics"] |= {"gmacs": 0.03 + window / 1000, "val_accuracy": 90.0 + window}
    axes = ["pruning.keep_rate", "golden.window"]
    assert is_crowded(run.settings(), axes) and not is_crowded(run.settings()[:9], axes)
    write_report(run.rows, str(run.root), ReportConfig(table="many"), axes, "many.yaml")
    assert "Pareto front** of val_accuracy (max), gmacs (min): 12 of 12 trials" in (run.root / "report.md").read_text()
    assert png_size(run.root / "many-front.png")[1] < 1000
    main([str(run.root), "--out", str(tmp_path / "docs")])
    shown = {"many-front.png", "many-tokens.png"}
    assert {path.name for path in run.root.glob("*.png")} == shown
    assert {path.name for path in (tmp_path / "docs").glob("*.png")} == shown
    assert json.loads((run.root / "claims.json").read_text())["figure"] == "[picture](many-front.png)"


def test_two_rates_are_dots_and_three_are_curves(run):
    for rate, what in ((0.8, "dots"), (0.6, "dots"), (0.5, "curves")):
        run.add(pruning__keep_rate=rate, predictor__fit_on=["digits"])
        _, caption = draw_sweep(run.settings(), ["pruning.keep_rate"])
        assert ("bands are" in caption) == (what == "curves")


@pytest.mark.parametrize(
    "key, value",
    [
        ("date", "soon"),
        ("date", None),
        ("env", []),
        ("env", {"torch": "2"}),
        ("sweep", 3),
        ("metrics", {}),
        ("metrics", None),
    ],
)
def test_a_record_that_somebody_changed_is_named(run, key, value):
    run.add()
    run.rows[0][key] = value
    with pytest.raises(UserError, match=rf"trials/.*\.json: lacks a sound '{key}'; try removing it"):
        run.report([])
    assert not (run.root / "report.md").exists()


@pytest.mark.parametrize("key", ["agreement", "cosine", "gmacs_unpruned"])
@pytest.mark.parametrize("value", [None, "high", [1.0]])
def test_a_figure_that_somebody_changed_is_named(run, key, value):
    run.add()
    run.rows[0]["metrics"][key] = value
    with pytest.raises(UserError, match=rf"trials/{run.rows[0]['id']}\.json: lacks a sound '{key}' in metrics; try"):
        run.report([])


@pytest.mark.parametrize("content", [b"", b"no arrays", b"PK\x03\x04 and no more"])
def test_arrays_that_are_damaged_are_named(run, content):
    run.add()
    (path,) = (run.root / "trials").glob("*.npz")
    path.write_bytes(content)
    with pytest.raises(UserError, match=rf"{path}: cannot be read \(.*\); try removing it"):
        run.report([])


def test_more_than_forty_rows_are_too_many_for_one_picture(run):
    for seed in range(41):
        run.add(lost=3, golden__window=seed + 1)
    assert is_crowded(run.settings(), ["golden.window"]) and not is_crowded(run.settings()[:40], ["golden.window"])
