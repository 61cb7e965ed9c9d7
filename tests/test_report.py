import numpy as np
import pytest

from patchrank.errors import UserError
from patchrank.report import paper_rows, results_table, veil_dropped


def row(locations, accuracy, keep_rate=0.6):
    metrics = {"accuracy": accuracy, "accuracy_unpruned": 96.0, "accuracy_random": 70.0, "agreement": 98.0}
    metrics |= {"cosine": 0.99, "matching_rate": 80.0, "matching_prior": 70.0, "matching_chance": 51.5625}
    metrics |= {"gmacs": 0.034, "gmacs_unpruned": 0.0456}
    pruning = {"locations": locations, "reducer": "predictor", "keep_rate": keep_rate, "drop_counts": None}
    config = {"pruning": pruning, "predictor": {"name": "mix_mlp"}}
    return {"metrics": metrics, "config": config | {"golden": {"metric": "preservation"}}}


def test_the_table_has_the_papers_average_beside_ours_and_controls_below():
    rows = [row([2, 3, 4, 5], 95.5), row([4, 6, 8, 10], 96.25), row([3], 96)]
    table = results_table(rows, ["2, 3, 4, 5", "4, 6, 8, 10", "3"], paper_rows("table7"), ["pruning.locations"])
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    assert len({len(line) for line in lines}) == 1
    assert lines[2][:3] == ["none", "nothing pruned", "96.0"]
    assert lines[3][2:4] == ["**95.5**", "-0.5"] and lines[3][-1] == "78.6"
    assert lines[4][:4] == ["2, 3, 4, 5", "at random (control)", "70.0", "-26.0"]
    assert lines[5][-1] == "79.2" and lines[7][-1] == ""
    at_half = results_table([row([2, 3, 4, 5], 95, 0.5)], ["x"], paper_rows("table7"), ["pruning.locations"])
    assert "78.6" not in at_half  # the paper's figure is for 60 %


def test_papers_table_7_was_copied_right():
    """Its averages are the means of its rows, up to the paper's own slips of 0.13 and 0.17 in the last two."""
    for line in paper_rows("table7")["rows"]:
        assert np.mean(line["values"][:-1]) == pytest.approx(line["values"][-1], abs=0.18)


def test_unknown_paper_table_is_refused():
    with pytest.raises(UserError, match="did you mean 'table7'"):
        paper_rows("tabel7")


def test_dropped_patches_are_veiled_and_kept_ones_untouched():
    pictures = np.full((1, 8, 8, 3), 200, np.uint8)
    veiled = veil_dropped(pictures, np.array([[0, 3]]), np.array([2, 2]))
    assert (veiled[0, :4, :4] == 200).all() and (veiled[0, 4:, 4:] == 200).all()
    assert (veiled[0, :4, 4:] < 150).all() and (veiled[0, 4:, :4] < 150).all()
