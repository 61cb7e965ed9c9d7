"""The report of one sweep: judged claims, table, pictures, and the paper's own figures beside."""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from patchrank.config import Claim, Constraint, Objective, ReportConfig
from patchrank.io import join, write_atomic, write_json
from patchrank.report import prose
from patchrank.report.beside import read_beside, told_apart_by
from patchrank.report.best_of_cells import best_of_cells, cells_section
from patchrank.report.claims import judge
from patchrank.report.judgement import Judgement
from patchrank.report.labels import labels
from patchrank.report.markdown import literal
from patchrank.report.markdown import table as markdown_table
from patchrank.report.paper import paper_rows, paper_section
from patchrank.report.pareto import front_section, pareto_front
from patchrank.report.plots.methods import draw_methods, has_methods
from patchrank.report.plots.sweep import draw_sweep, draw_tokens, is_crowded
from patchrank.report.results import Setting, read_settings, read_trial, worth_of
from patchrank.report.table import brief_table, main_table
from patchrank.utils.errors import UserError

SUMMARY_SCHEMA = 2  # of claims.json
WORTHS = ("val_accuracy", "val_knn_accuracy", "val_agreement", "val_cosine")  # of one objective's front, if it is there
SMOKE = "**This is a smoke run on few images (`--quick`): its figures mean nothing.**"


@dataclass(frozen=True)
class Report:
    """Where a report was written, and its figures as a few lines of text that fit a terminal."""

    path: str
    table: str


@dataclass(frozen=True)
class _Sweep:
    """All that a page is about. rows and changes are of the sweep's own trials.

    settings: the own ones, and those of other sweeps beside. notes: of the sweeps beside.
    """

    rows: Sequence[dict]
    axes: Sequence[str]
    settings: list[Setting]
    changes: list[prose.Change]
    notes: list[str]
    judgements: list[Judgement]


def write_report(
    rows: Sequence[dict],
    root: str,
    config: ReportConfig,
    axes: Sequence[str],
    command: str,
    unfinished: int = 0,
    objectives: Sequence[Objective] = (),
    constraints: Sequence[Constraint] = (),
    failures: Sequence[tuple[str, str]] = (),
    stopped: int = 0,
    credits: Mapping[str, str] = {},
    sampled: Sequence[str] = (),
) -> Report:
    """Writes `report.md`, `claims.json`, `<table>-accuracy.png` and `<table>-tokens.png` into `root`.

    With two objectives or more also `<table>-front.png`. Where settings are too many for the picture of accuracy, the
    front stands for it; of a sweep with one objective it is that of accuracy and GMACs. With three budgets or more, and
    where keep rates are swept for too many settings, also `<table>-curves.png`. Without any row no picture at all.
    Where `config.beside` names roots of other sweeps, their rows stand in table and pictures too, and claims may
    compare with them.

    Args:
        rows: result rows in plan order; their arrays lie in `<root>/trials`.
        axes: dotted paths of the swept settings; rows that differ in seed and controls alone are merged.
        command: what was asked of `python -m patchrank.tune`.
        unfinished: trials of the sweep that have no row.
        objectives, constraints: of the search; several objectives make a Pareto front.
        failures: trials that failed, each its settings in words and the cause.
        stopped: trials that were ended early, since they fell behind others.
        credits: what must be said of the images of a task, by its name.
        sampled: those of `axes` that a search draws. Where it does so around several points of a grid, the page is
            about the best trial around each of them.

    Raises:
        UserError: a table that `paper.yaml` does not have.
    """
    paper, cells = paper_rows(config.paper), ""
    if sampled and objectives:
        grid = [axis for axis in axes if axis not in sampled]
        best = best_of_cells(rows, grid, objectives, constraints)
        if len(best) > 1:
            cells, rows = cells_section(best, len(rows), axes, objectives), best
    sweep = _read(rows, root, config, axes, unfinished)
    front, captions, pictures = _draw(sweep, config.table, objectives, constraints) if rows else ("", [], {})
    for name, picture in pictures.items():
        write_atomic(join(root, name), picture)
    summary = _summary(sweep, config, command, unfinished, list(pictures))
    write_json(join(root, "claims.json"), summary)
    undone = f"**{unfinished} trials of this sweep are not done.** " if unfinished else ""
    undone += f"{stopped} trials were ended early (ASHA), and are not shown." if stopped else ""
    if failures:
        lines = [[literal(settings), literal(cause)] for settings, cause in failures]
        head = f"**Failed trials**: {len(failures)}; running the sweep again tries them again."
        captions.append(f"{head}\n\n{markdown_table(['settings', 'cause'], lines, texts=2)}")
    several = [judgement for judgement in sweep.judgements if len(judgement.comparisons) > 1]
    parts = [
        *(f"# {config.table}", SMOKE if summary["quick"] else "", undone.strip()),
        *_body(sweep, summary, front, paper, config.columns),
        cells,
        *captions,
        *(f"Claim in detail: {each.claim.say}:\n\n{each.details()}" for each in several),
        *(paper_section(paper), _credit(sweep.settings, credits)),
    ]
    write_atomic(join(root, "report.md"), "\n\n".join(filter(None, parts)) + "\n")
    return Report(join(root, "report.md"), brief_table(sweep.settings, sweep.axes) if rows else "")


def _read(rows: Sequence[dict], root: str, config: ReportConfig, axes: Sequence[str], unfinished: int) -> _Sweep:
    trials = [read_trial(root, row) for row in rows]
    own = settings = read_settings(trials)
    notes: list[str] = []
    if rows and config.beside:
        beside, notes = read_beside(config.beside, trials)
        settings = read_settings(trials + beside)
        axes = told_apart_by(settings, axes)
    # a setting begins with its own rows, so the sweep's own come first
    changes = prose.changes_of(own, labels(settings, axes))
    return _Sweep(rows, axes, settings, changes, notes, [_judged(each, settings, unfinished) for each in config.claims])


def _judged(claim: Claim, settings: list[Setting], unfinished: int) -> Judgement:
    """A claim that does not fit what was run is not measured. It must not cost a report of trials that took hours.

    While trials are unfinished nobody knows whether those that a claim is about are all there: nothing is true yet.
    """
    try:
        found = judge(claim, settings)
    except UserError as error:
        return Judgement(claim, [], [str(error)])
    unknown = [f"{unfinished} trials of the sweep"] if unfinished else []
    return replace(found, missing=found.missing + unknown)


def _draw(
    sweep: _Sweep, table: str, objectives: Sequence[Objective], constraints: Sequence[Constraint]
) -> tuple[str, list[str], dict[str, bytes]]:
    """Markdown of the front ("" where there is to be none) and of each other picture; and all pictures by file name."""
    front, captions, pictures = "", [], {}
    crowded = is_crowded(sweep.settings, sweep.axes)
    if crowded or len(objectives) > 1:
        objectives = objectives if len(objectives) > 1 else _worth_and_cost(sweep.rows)
        best = pareto_front(sweep.rows, objectives, constraints)
        front, pictures = front_section(best, sweep.rows, sweep.axes, f"{table}-front")
    drawn = {} if crowded else {f"{table}-accuracy.png": draw_sweep(sweep.settings, sweep.axes)}
    if has_methods(sweep.settings, sweep.axes, crowded):
        drawn[f"{table}-curves.png"] = draw_methods(sweep.settings, sweep.axes)
    drawn[f"{table}-tokens.png"] = draw_tokens(sweep.settings, sweep.axes)
    for name, (picture, caption) in drawn.items():
        pictures[name] = picture
        captions.append(f"{caption}\n\n![{caption.split(',')[0]}]({name})")
    return front, captions, pictures


def _worth_and_cost(rows: Sequence[dict]) -> tuple[Objective, Objective]:
    """The objectives of a front where a sweep has no two: the first worth that any row has, and GMACs."""
    worth = next((name for name in WORTHS if any(name in row["metrics"] for row in rows)), WORTHS[0])
    return Objective(metric=worth, mode="max"), Objective(metric="gmacs", mode="min")


def _body(sweep: _Sweep, summary: dict, front: str, paper: dict | None, columns: Sequence[str]) -> list[str]:
    """What was asked, what was found, the table, the claims, and how all of it was made."""
    if not sweep.rows:
        return [f"`python -m patchrank.tune {summary['command']}`: no trial has a result."]
    table = main_table(sweep.settings, sweep.axes, paper, columns)
    claims = ["**Claims**\n", *(f"- {claim['line']}" for claim in summary["claims"])]
    return [
        *(summary["question"], summary["found"], front, table, prose.without_interval(sweep.settings)),
        " ".join(filter(None, [prose.moved(sweep.changes), prose.legend(sweep.settings, table)])),
        prose.budgets(sweep.settings),
        "\n".join(claims) if summary["claims"] else "",
        " ".join([prose.how_made(sweep.rows, summary["command"]), *sweep.notes]),
        prose.what_was_measured(sweep.settings, sweep.axes),
    ]


def _credit(settings: Sequence[Setting], credits: Mapping[str, str]) -> str:
    """What must be said of the images that any setting was evaluated on, or its ranking fitted to."""
    tasks = []
    for setting in settings:
        tasks += setting.tasks
        fit_on = setting.config["predictor"]["fit_on"]
        tasks += fit_on if setting.is_fitted and not isinstance(fit_on, str) else []
    return " ".join(dict.fromkeys(credits[task] for task in tasks if task in credits))


def _summary(
    sweep: _Sweep, config: ReportConfig, command: str, unfinished: int, pictures: Sequence[str]
) -> dict[str, Any]:
    """What an index of sweeps says of this one, as plain JSON; `pictures` are its pictures, the telling one first."""
    found = prose.NO_RESULT
    if sweep.rows:
        found = f"{prose.best_and_worst(sweep.changes)} {prose.verdicts(sweep.judgements)}"
    return {
        "schema": SUMMARY_SCHEMA,
        "sweep": sweep.rows[0]["sweep"] if sweep.rows else config.table,
        "table": config.table,
        "quick": "--quick" in command.split(),
        "unfinished": unfinished,
        "command": command,
        "date": max([row["date"] for row in sweep.rows] or [f"{datetime.date.today()}"]),
        "question": prose.question(config.question, sweep.axes, worth_of(sweep.settings)),
        "found": found,
        **prose.answer(sweep.changes, sweep.judgements, pictures),
        "claims": [{"line": judgement.line(), **judgement.to_json()} for judgement in sweep.judgements],
    }
