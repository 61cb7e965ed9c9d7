"""The Pareto front: which rows are on it, and what of it a page shows."""

import itertools
import random

import pytest
from matplotlib.figure import Figure

from patchrank.config import Constraint, Objective, TrialConfig
from patchrank.report import pareto
from patchrank.report.pareto import draw_front, front_section, front_table, pareto_front

ACCURACY, COSINE = (Objective(metric=f"val_{name}", mode="max") for name in ("accuracy", "cosine"))
GMACS, MS = (Objective(metric=name, mode="min") for name in ("gmacs", "ms"))
ALL = (ACCURACY, COSINE, GMACS, MS)
CHEAP = Constraint(metric="gmacs", at_most=5)


def row(name, accuracy, gmacs, cosine=0.9, ms=1.0, reducer="predictor", keep_rate=0.6, **more):
    config = TrialConfig().model_dump()
    config["pruning"] |= {"reducer": reducer, "keep_rate": keep_rate}
    metrics = {"val_accuracy": accuracy, "val_cosine": cosine, "gmacs": gmacs, "ms": ms, "speedup": 2.0 / ms}
    metrics |= {"val_accuracy_unpruned": 96.0, "gmacs_unpruned": 17.5635, "ms_unpruned": 2.0}
    return {"id": name, "config": config, "metrics": metrics | more}


def ids(rows):
    return [each["id"] for each in rows]


def test_the_front_is_what_its_definition_says():
    """Against the definition, pair by pair, on many small sets full of ties."""
    draw = random.Random(0)
    for _ in range(200):
        rows = [row(f"{n}", draw.randint(0, 3), draw.randint(0, 3), draw.randint(0, 2)) for n in range(12)]
        objectives = draw.sample((ACCURACY, COSINE, GMACS), draw.randint(2, 3))

        def value(each, objective):
            return each["metrics"][objective.metric] * (1 if objective.mode == "max" else -1)

        def beats(a, b, objectives=objectives):
            pairs = [(value(a, each), value(b, each)) for each in objectives]
            return all(x >= y for x, y in pairs) and any(x > y for x, y in pairs)

        unbeaten = [each for each in rows if not any(beats(other, each) for other in rows)]
        found = pareto_front(rows, objectives, ())
        assert sorted(ids(found.best + found.equal)) == sorted(ids(unbeaten))
        values = [tuple(value(each, objective) for objective in objectives) for each in found.best]
        assert len(set(values)) == len(values) and len(found.beaten) == len(rows) - len(unbeaten)


def test_no_order_of_rows_changes_anything():
    rows = [row("d", 95, 3), row("a", 95, 3), row("c", 94, 2), row("b", 95, 9)]
    fronts = [pareto_front(list(each), [ACCURACY, GMACS], [CHEAP]) for each in itertools.permutations(rows)]
    assert {tuple(ids(each.best)) for each in fronts} == {("c", "a")}  # by cost, and of equals the lowest id
    assert all(ids(each.equal) == ["d"] and ids(each.infeasible) == ["b"] for each in fronts)


def test_constraints_come_first_and_a_bound_itself_is_kept():
    rows = [row("best", 99, 5.0000001), row("edge", 90, 5.0), row("beaten", 80, 5.0)]
    found = pareto_front(rows, [ACCURACY, GMACS], [CHEAP])
    assert (ids(found.best), ids(found.beaten), ids(found.infeasible)) == (["edge"], ["beaten"], ["best"])
    none = pareto_front(rows, [ACCURACY, GMACS], [Constraint(metric="val_accuracy", at_least=99.5)])
    assert not none.best and len(none.infeasible) == 3


@pytest.mark.parametrize("value", [None, float("nan"), float("inf")])
def test_rows_that_lack_a_figure_are_left_out_and_counted(value):
    rows = [row("a", 95, 3), row("b", 99, 1, ms=1.0)]
    rows[1]["metrics"]["ms"] = value
    found = pareto_front(rows, ALL, ())
    assert ids(found.best) == ["a"] and ids(found.incomplete) == ["b"]
    assert "lacking a figure and left out: 1" in front_section(found, rows, [], "front")[0]
    assert ids(pareto_front(rows, [ACCURACY, GMACS], ()).best) == ["b"]  # of which it lacks none


def test_the_table_goes_by_cost_below_the_unpruned_tower():
    rows = [row("a", 95, 4, keep_rate=0.7), row("b", 90, 2, ms=0.5, reducer="center"), row("c", 89, 3)]
    text = front_table(pareto_front(rows, [ACCURACY, GMACS], ()), ["pruning.reducer", "pruning.keep_rate"])
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]
    assert lines[0] == ["#", "ranked by", "kept", "accuracy, val", "cosine, val", "GMACs", "ms", "speed-up"]
    assert lines[2] == ["", "nothing pruned", "", "96.0", "1.0000", "17.5635", "2.000", "1.00"]
    assert lines[3] == ["1", "image centre", "60 %", "90.0", "0.9000", "2.0000", "0.500", "4.00"]
    assert lines[4][:4] == ["2", "predictor", "70 %", "95.0"] and len(lines) == 5


def test_a_section_says_what_became_of_all_trials_and_on_what_they_were_timed():
    rows = [row("a", 95, 4), row("b", 95, 4), row("c", 94, 4.5), row("d", 99, 9)]
    machine = {"system": "Linux", "cpu": "Some CPU", "threads": 2, "gpu": None, "torch": "2"}
    for each in rows:
        each["speed"] = {"hardware": machine, "benchmark": {"batch_size": 32, "repeats": 30}}
    markdown, pictures = front_section(pareto_front(rows, [ACCURACY, GMACS], [CHEAP]), rows, [], "pareto-front")
    assert "of val_accuracy (max), gmacs (min) among those that keep gmacs <= 5: 1 of 4 trials" in markdown
    assert "breaking gmacs <= 5: 1; with exactly the figures of one in it and not repeated: 1." in markdown
    assert "30 runs of 32 images on Some CPU (threads: 2), Linux, torch 2." in markdown
    assert list(pictures) == ["pareto-front.png"] and "(pareto-front.png)" in markdown
    assert pictures["pareto-front.png"].startswith(b"\x89PNG")
    markdown, pictures = front_section(
        pareto_front(rows, [ACCURACY, GMACS], [Constraint(metric="gmacs", at_most=1)]), rows, [], "x"
    )
    assert not pictures and "0 of 4 trials" in markdown


@pytest.fixture
def drawn(monkeypatch):
    """Draws a front and gives back the figure's panels."""

    def draw(rows, objectives, constraints=()):
        figures = []
        monkeypatch.setattr(pareto, "png", lambda figure: figures.append(figure) or b"")
        _, caption = draw_front(pareto_front(rows, objectives, constraints))
        assert isinstance(figures[0], Figure)
        return figures[0].axes, caption

    return draw


def test_a_panel_for_every_value_and_cost(drawn):
    rows = [row(f"{n}", 90 + n, n, 0.9 + n / 100, 5 - n / 10) for n in range(5)]
    panels, _ = drawn(rows, ALL)
    assert [(panel.get_xlabel(), panel.get_ylabel()) for panel in panels] == [
        ("GMACs", "accuracy, val"), ("ms", "accuracy, val"), ("GMACs", "cosine, val"), ("ms", "cosine, val"),
    ]  # fmt: skip
    assert [len(drawn(rows, pair)[0]) for pair in ([ACCURACY, GMACS], [ACCURACY, COSINE], [GMACS, MS])] == [1, 1, 1]


def test_a_panel_joins_what_nothing_beats_in_it_and_shows_all(drawn):
    rows = [row("a", 90, 1, ms=3), row("b", 91, 2, ms=1), row("c", 95, 3, ms=2), row("d", 80, 4, ms=4)]
    rows.append(row("hollow", 99, 9, ms=9, reducer="center"))
    (by_macs, by_ms), caption = drawn(rows, (ACCURACY, GMACS, MS), [CHEAP])
    joined = [panel.lines[0].get_xydata().tolist() for panel in (by_macs, by_ms)]
    assert joined == [[[1, 90], [2, 91], [3, 95]], [[1, 91], [2, 95]]]
    assert [text.get_text() for text in by_macs.texts] == ["1", "2", "3"]
    assert [text.get_text() for text in by_ms.texts] == ["2", "3"]  # the same numbers
    stars = [line.get_xydata().tolist() for line in by_macs.lines if line.get_marker() == "*"]
    assert stars == [[[17.5635, 96.0]]]
    faces = {tuple(map(tuple, dots.get_offsets())): dots.get_facecolors() for dots in by_macs.collections}
    assert len(faces[((9, 99),)]) == 0 and faces[((4, 80),)][0][3] == 0.35 and "hollow" in caption
    assert sum(len(dots) for dots in faces) == 5
    assert any(line.get_xdata()[0] == 5 for line in by_macs.lines)  # the bound


def test_numbers_do_not_cover_each_other(drawn):
    rows = [row(f"{n}", 90 + n / 1000, 1 + n / 1000) for n in range(20)] + [row("far", 95, 3)]
    (panel,), _ = drawn(rows, [ACCURACY, GMACS])
    assert [text.get_text() for text in panel.texts] == ["1", "21"]
