"""What commands show: bars on a terminal, few plain lines in a log, a table on stderr and one row on stdout."""

import io
import json
import re
import sys
from pathlib import Path

import pytest

from patchrank import benchmark, evaluate, retrieval
from patchrank.cli.summary import WIDTH, print_row, table
from patchrank.utils import progress
from patchrank.utils.progress import write_line

PACKAGE = Path(progress.__file__).parents[1]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def log(monkeypatch, capsys):
    """Reads what was written to stderr, which is no terminal here; all states of a bar are looked at."""
    for name in ("LOOK", "SOON"):
        monkeypatch.setattr(progress, name, 0.0)
    return lambda: capsys.readouterr().err


def work(steps: int = 20, **how) -> None:
    with progress.progress(total=steps, desc="count", unit="step", **how) as bar:
        for _ in range(steps):
            bar.set_postfix({"loss": 0.5}, refresh=False)
            bar.update()


def test_a_log_gets_the_first_state_and_the_last(log):
    work()
    said = log()
    first, last = said.splitlines()
    assert first.startswith("count: 0 of 20 steps, 00:00 gone") and last.startswith("count: 20 of 20 steps, ")
    assert last.endswith("loss=0.5") and "\r" not in said


def test_a_log_gets_a_line_as_often_as_is_wanted(log, monkeypatch):
    monkeypatch.setattr(progress, "EVERY", 0.0)
    work()
    said = log()
    assert len(said.splitlines()) == 21 and "\r" not in said


def test_what_is_done_soon_leaves_no_line(log, monkeypatch):
    monkeypatch.setattr(progress, "SOON", 60.0)
    work()
    assert log() == ""
    work(delay=0)  # unless its first unit may take long
    assert log().startswith("count: 0 of 20 steps")


@pytest.mark.parametrize("disable", [True, None])
def test_some_work_shows_nothing_in_a_log(log, disable):
    work(disable=disable)
    assert log() == ""


def test_bars_within_bars_and_lines_between_them_stay_apart(log):
    for _ in progress.progress(range(2), desc="outer", unit="part"):
        work(1)
        write_line("a note")
    lines = log().splitlines()
    assert lines.count("a note") == 2 and all(line.startswith(("outer: ", "count: ", "a note")) for line in lines)


def test_a_count_without_an_end(log):
    with progress.progress(desc="timing", unit="step") as bar:
        bar.update(3)
    assert log().splitlines()[-1].startswith("timing: 3 steps, ")


def test_a_terminal_gets_a_bar(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    work(disable=None)
    assert "\rcount: 100%|" in terminal.getvalue() and "20/20" in terminal.getvalue()


def test_everything_else_shows_progress_through_that_file():
    users = [file for file in PACKAGE.rglob("*.py") if re.search(r"^\s*(import|from) tqdm\b", file.read_text(), re.M)]
    assert users == [PACKAGE / "utils" / "progress.py"]


def test_a_table_fits_and_a_row_is_one_line(capsys, tmp_path):
    row, out = {"a": [1, 2.5], "b": None}, tmp_path / "row.json"
    print_row(row, "a title " * 30, [("short", "1.00 %"), ("label " * 6, "value " * 40)], str(out))
    said, told = capsys.readouterr()
    assert said == out.read_text() == json.dumps(row) + "\n"
    assert max(map(len, told.splitlines())) <= WIDTH == 100
    assert "".join(told.split()).count("value") == 40


def test_labels_stand_left_and_values_below_each_other():
    assert table("title", [("a", "1 %"), ("long", "2 %")]) == "title\n  a     1 %\n  long  2 %"


@pytest.mark.parametrize(
    "main, flags, shown",
    [
        (evaluate.main, ["--controls", "random"], ["accuracy, pruned", "accuracy, unpruned", "at random", "images"]),
        (retrieval.main, [], ["recall of the image itself", "k = 1, 5", "drift", "images"]),
        (benchmark.main, ["--batch-size", "2", "--repeats", "3"], ["ms (quartiles", "speed-up", "measured on"]),
    ],
)
def test_commands_print_a_table_and_a_row(main, flags, shown, capsys):
    limit = [] if main is benchmark.main else ["--limit", "8"]
    main([*limit, "--keep-rate", "0.6", *flags])
    said, told = capsys.readouterr()
    assert json.loads(said)["keep_rate"] == 0.6 and len(said.splitlines()) == 1
    assert all(part in told for part in [*shown, "60 % of patches kept by predictor", "33.9 M of 45.6 M (74 %)"])
    assert max(map(len, told.splitlines())) <= WIDTH
