"""Reports of methods at equal cost: the best around each point of a grid, further columns, claims against several."""

import re

import pytest
import yaml

from patchrank.config import Claim, Constraint, Objective, ReportConfig, validate
from patchrank.report import write_report
from patchrank.report.claims import judge
from patchrank.report.paper import paper_rows
from patchrank.report.plots.methods import Curves, draw_methods, has_methods
from patchrank.utils.errors import UserError
from tests.helpers.made_up_run import Run

VAL_COSINE = [Objective(metric="val_cosine", mode="max")]
AXES = ["pruning.reducer", "pruning.budget", "pruning.locations", "pruning.taper"]


@pytest.fixture
def run(tmp_path):
    return Run(tmp_path)


def add(run, reducer, budget, val_cosine=0.99, share=None, **settings):
    run.add(lost=settings.pop("lost", 3), pruning__reducer=reducer, pruning__budget=budget, **settings)
    metrics = run.rows[-1]["metrics"]
    metrics |= {"val_cosine": val_cosine, "n_kept": 8, "n_tokens": 16, "gmacs_text": 0.012}
    metrics["gmacs"] = metrics["gmacs_unpruned"] * (share or budget - 0.004)


def page_of(run):
    return (run.root / "report.md").read_text()


def searched(run, **about):
    config = ReportConfig(table="made-up")
    write_report(run.rows, str(run.root), config, AXES, "s.yaml", objectives=VAL_COSINE, sampled=AXES[2:], **about)
    return (run.root / "report.md").read_text()


def test_of_a_search_around_a_grid_the_page_has_the_best_of_each_point_ready_to_be_copied(run):
    for taper, cosine in ((0.5, 0.97), (0.7, 0.99), (1.0, 0.98)):
        add(run, "tome", 0.65, cosine, pruning__locations=[2, 3, 4], pruning__taper=taper)
        add(run, "random", 0.65, 1 - cosine, pruning__locations=[4], pruning__taper=taper)
    page = searched(run)
    assert "around 2 points, 6 trials in all; the rows are the best of each by val_cosine (max)" in page
    grid = yaml.safe_load(re.search(r"```yaml\n(.*?)```", page, re.DOTALL)[1])["pruning"]["grid"]
    assert grid == [
        {"reducer": "tome", "budget": 0.65, "locations": [2, 3, 4], "taper": 0.7},
        {"reducer": "random", "budget": 0.65, "locations": [4], "taper": 0.5},
    ]
    assert page.count("| ToMe |") == 1


def test_a_trial_that_breaks_a_bound_is_best_only_where_all_do(run):
    for taper, cosine in ((0.5, 0.97), (0.7, 0.99)):
        add(run, "tome", 0.65, cosine, pruning__taper=taper)
        add(run, "tome", 0.55, cosine, share=0.9, pruning__taper=taper)
    run.rows[2]["metrics"]["gmacs"] = 0.045  # the better one at 65 %
    page = searched(run, constraints=[Constraint(metric="gmacs", at_most=0.03)])
    assert "budget: 0.65, locations: [4, 6, 8, 10], taper: 0.5}" in page
    assert "budget: 0.55, locations: [4, 6, 8, 10], taper: 0.7}" in page


def test_a_search_around_one_point_shows_all_trials(run):
    add(run, "tome", 0.65, pruning__taper=0.5)
    add(run, "tome", 0.65, pruning__taper=0.7)
    assert "best around each point" not in searched(run)


def test_columns_that_are_asked_for_tell_tasks_costs_and_what_was_seen(run):
    add(run, "guided_merge", 0.65)
    run.rows[-1]["metrics"] |= {"gmacs_matching": 0.002}
    add(run, "tome", 0.65, lost=12)
    config = ReportConfig(table="made-up", columns=("by_task", "seen", "share", "parts"))
    write_report(run.rows, str(run.root), config, ["pruning"], "s.yaml")
    page = (run.root / "report.md").read_text()
    head = next(line for line in page.splitlines() if line.startswith("| ranked by"))
    lines = [line for line in page.splitlines() if line.startswith(("| guided", "| ToMe"))]
    cells = [[cell.strip() for cell in line.split("|")] for line in [head, *lines]]
    rows = [dict(zip(cells[0], line)) for line in cells[1:]]
    assert rows[0]["images seen"] == "256" and rows[1]["images seen"] == "0"
    assert rows[0]["share of MACs"] == "64.6 %"
    assert rows[0]["MMACs: image tower, ranking, matching, one caption"] == "27.16, 0.30, 2.00, 12.00"
    assert re.fullmatch(r"85.0, \*\*-10.00\*\* \[-\d+.\d\d, -\d.\d\d\]", rows[1]["digits"])
    assert "2 settings with one, each below it" in page


def test_three_budgets_make_a_picture_of_each_methods_best(run, monkeypatch):
    drawn = []
    monkeypatch.setattr("matplotlib.axes.Axes.plot", lambda panel, at, values, **look: drawn.append((at, values, look)))
    for budget in (0.75, 0.65, 0.55):
        for lost, cosine in ((24, 0.97), (12, 0.98)):  # the second is better on val
            add(run, "tome", budget, cosine, lost=lost, pruning__taper=cosine)
        add(run, "tome", budget, 0.999, lost=0, repair={"images": 256, "ridge": None})
        add(run, "rank_merge", budget, lost=0)
    picture, caption = draw_methods(run.settings(), AXES)
    assert picture.startswith(b"\x89PNG") and "without repair" in caption
    lines = {look["label"]: (at, values) for at, values, look in drawn[1::2]}  # of accuracy; drift comes before
    assert lines == {"ToMe": ([75.0, 65.0, 55.0], [-10.0] * 3), "ranked matching": ([75.0, 65.0, 55.0], [0.0] * 3)}


def test_a_page_has_the_picture_of_budgets_where_there_are_three(run):
    for budget, has in ((0.75, False), (0.65, False), (0.55, True)):
        add(run, "tome", budget)
        run.report(["pruning.budget"])
        assert ("![What each method keeps at the same cost](made-up-curves.png)" in page_of(run)) == has
        assert (run.root / "made-up-curves.png").exists() == has


def test_keep_rates_of_many_settings_have_curves_a_row_for_each_place(run):
    axes = ["pruning.reducer", "pruning.keep_rate", "pruning.locations", "seed"]
    for rate in (0.8, 0.6, 0.4):
        for place in ([1], [4]):
            run.add(lost=3, pruning__reducer="tome", pruning__keep_rate=rate, pruning__locations=place)
            run.add(pruning__reducer="golden", pruning__keep_rate=rate, pruning__locations=place)
    rows = Curves(run.settings(), axes).rows()
    assert list(rows) == ["layer 1", "layer 4"] and list(rows["layer 1"]) == ["ToMe", "golden (oracle)"]
    points = rows["layer 4"]["ToMe"]
    assert [(point.config["pruning"]["keep_rate"], point.config["pruning"]["locations"]) for point in points] == [
        (rate, [4]) for rate in (0.8, 0.6, 0.4)
    ]
    assert has_methods(run.settings(), axes, crowded=True) and not has_methods(run.settings(), axes, crowded=False)
    assert "Dotted: oracles, on the first 40 images" in draw_methods(run.settings(), axes)[1]


@pytest.mark.parametrize("share", [0.66, 0.55])
def test_a_row_that_is_not_at_its_budget_is_named(run, share):
    add(run, "tome", 0.65, share=share)
    run.report(["pruning.budget"])
    page = (run.root / "report.md").read_text()
    assert "**Budgets**: of 1 setting with one, not all are" in page and f"ToMe at 65 % has {100 * share:.1f} %" in page


PEERS = {"pruning.reducer": ["tome", "random"], "pruning.leftovers": [None, "drop"]}


def claim(**rules):
    of = {"pruning.reducer": "guided_merge"}
    return Claim(say="S", of=of, against=PEERS, match=["pruning.budget"], measure="accuracy", **rules)


def test_a_claim_is_set_against_every_setting_that_matches(run):
    for budget in (0.65, 0.55):
        add(run, "guided_merge", budget, lost=3, pruning__locations=[2, 3])
        add(run, "tome", budget, lost=12, pruning__locations=[4, 6])
        add(run, "random", budget, lost=24, pruning__locations=[8])
    add(run, "random", 0.65, lost=0, pruning__leftovers="merge")  # which `against` leaves out
    found = judge(claim(each=["pruning.budget"]), run.settings())
    assert [(each.what["pruning.budget"], each.what["against"]) for each in found.comparisons] == [
        (budget, name) for budget in (0.65, 0.55) for name in ("ToMe, layers 4, 6", "at random, layer 8")
    ]
    assert found.verdict == "true" and "| 0.65 | ToMe, layers 4, 6 |" in found.details().replace("65 %", "0.65")


def test_a_side_that_nothing_matches_is_missing(run):
    add(run, "guided_merge", 0.65)
    add(run, "tome", 0.55)
    assert judge(claim(), run.settings()).missing == ["nothing to compare with"]


@pytest.mark.parametrize("theirs, verdict", [(3, "true"), (24, "true"), (0, "refuted")])
def test_not_behind_holds_where_nothing_tells_the_sides_apart(run, theirs, verdict):
    add(run, "guided_merge", 0.65, lost=12 if theirs == 0 else 3)
    add(run, "tome", 0.65, lost=theirs)
    assert judge(claim(not_behind=True), run.settings()).verdict == verdict


def test_rules_of_a_claim_exclude_each_other():
    with pytest.raises(UserError, match="at_least and within exclude each other, and share and not_behind all"):
        validate(Claim, {"say": "S", "of": {}, "measure": "drift", "not_behind": True, "within": 1}, "x")
    with pytest.raises(UserError, match="match needs settings of the other side"):
        validate(Claim, {"say": "S", "of": {}, "measure": "drift", "match": ["pruning.budget"], "against": 3}, "x")


def test_the_papers_tables_3_and_4_are_as_printed():
    averages = {row["key"][0]: row["values"][-1] for row in paper_rows("table4")["rows"]}
    assert averages == {"EViT": 64.3, "A-ViT": 63.8, "ToMe": 64.2, "Ours": 65.4, "Ours-IN": 65.4}
    assert all(len(row["values"]) == 10 for row in paper_rows("table4")["rows"])
    costs = [[23.4, 3.5], [16.8, 1.6], [27.6, 4.0], [20.9, 2.0]]
    assert [row["values"] for row in paper_rows("table3")["rows"]] == costs
