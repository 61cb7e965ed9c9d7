"""The report of one sweep: judged claims, table, pictures, and the paper's own figures beside."""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from patchrank.config import Claim, Constraint, Objective, ReportConfig
from patchrank.io import join, write_atomic, write_json
from patchrank.report.beside import read_beside, told_apart_by
from patchrank.report.claims import judge
from patchrank.report.findings import answer, best_and_worst, brief_table, moved, question, verdicts
from patchrank.report.judgement import Judgement
from patchrank.report.labels import labels
from patchrank.report.markdown import literal
from patchrank.report.markdown import table as markdown_table
from patchrank.report.paper import paper_rows, paper_section
from patchrank.report.pareto_section import FrontSection, front_section
from patchrank.report.plots import draw_sweep, is_crowded
from patchrank.report.plots.tokens import draw_tokens
from patchrank.report.prose import how_made, legend, what_was_measured, without_interval
from patchrank.report.results import Setting, read_settings
from patchrank.report.table import main_table
from patchrank.utils.errors import UserError

SUMMARY_SCHEMA = 2  # of claims.json
WORTH_AND_COST = (Objective(metric="val_accuracy", mode="max"), Objective(metric="gmacs", mode="min"))
SMOKE = "**This is a smoke run on few images (`--quick`): its figures mean nothing.**"


@dataclass(frozen=True)
class Report:
    """Where a report was written, and its figures as a few lines of text that fit a terminal."""

    path: str
    table: str


@dataclass(frozen=True)
class _Sweep:
    """All that a page is about. rows and own are the sweep's own, settings have those of other sweeps beside as well.

    names: what the table calls the own settings. notes: of the sweeps beside.
    """

    rows: Sequence[dict]
    config: ReportConfig
    axes: Sequence[str]
    command: str
    unfinished: int
    own: list[Setting]
    settings: list[Setting]
    names: list[str]
    notes: list[str]
    judgements: list[Judgement]

    @property
    def is_quick(self) -> bool:
        return "--quick" in self.command.split()

    @property
    def question(self) -> str:
        return question(self.config.question, self.axes)

    @property
    def found(self) -> str:
        """What came out, in three short sentences: the best, the worst, and how many claims hold."""
        if not self.rows:
            return "No trial has a result."
        return f"{best_and_worst(self.own, self.names)} {verdicts(self.judgements)}"


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
) -> Report:
    """Writes `report.md`, `claims.json`, `<table>-accuracy.png` and `<table>-tokens.png` into `root`.

    With two objectives or more also `<table>-front.png`. Where settings are too many for the picture of accuracy, the
    front stands for it; of a sweep with one objective it is that of accuracy and GMACs. Without any row no picture at
    all. Where `config.beside` names roots of other sweeps, their rows stand in table and pictures too, and claims may
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

    Raises:
        UserError: a table that `paper.yaml` does not have.
    """
    paper = paper_rows(config.paper)
    sweep = _read(rows, root, config, axes, command, unfinished)
    front, pictures = _draw(sweep, objectives, constraints) if rows else (FrontSection("", {}), {})
    for name, picture in (front.pictures | {name: picture for name, (picture, _) in pictures.items()}).items():
        write_atomic(join(root, name), picture)
    write_json(join(root, "claims.json"), _summary(sweep, [*front.pictures, *pictures]))
    undone = f"**{unfinished} trials of this sweep are not done.** " if unfinished else ""
    undone += f"{stopped} trials were ended early (ASHA), and are not shown." if stopped else ""
    parts = [f"# {config.table}", SMOKE if sweep.is_quick else "", undone.strip()]
    parts += _body(sweep, front.markdown, paper)
    parts += [f"{caption}\n\n![{caption.split(',')[0]}]({name})" for name, (_, caption) in pictures.items()]
    several = [judgement for judgement in sweep.judgements if len(judgement.comparisons) > 1]
    parts += [_failed(failures), *(f"Claim in detail: {each.claim.say}:\n\n{each.details()}" for each in several)]
    parts += [paper_section(paper), _credit(sweep.settings, credits)]
    write_atomic(join(root, "report.md"), "\n\n".join(filter(None, parts)) + "\n")
    return Report(join(root, "report.md"), brief_table(sweep.settings, sweep.axes) if rows else "")


def _read(
    rows: Sequence[dict], root: str, config: ReportConfig, axes: Sequence[str], command: str, unfinished: int
) -> _Sweep:
    beside = read_beside(config.beside, rows, root) if rows else []
    own = settings = read_settings(rows, root)
    if beside:
        settings = read_settings(rows, root, [pair for each in beside for pair in each.rows])
        axes = told_apart_by(settings, axes)
    names = labels(settings, axes)[: len(own)]  # a setting begins with its own rows, so the sweep's own come first
    judgements = [_judged(claim, settings, unfinished) for claim in config.claims]
    notes = [each.note for each in beside]
    return _Sweep(rows, config, axes, command, unfinished, own, settings, names, notes, judgements)


def _draw(
    sweep: _Sweep, objectives: Sequence[Objective], constraints: Sequence[Constraint]
) -> tuple[FrontSection, dict[str, tuple[bytes, str]]]:
    """The front, if there is to be one, and all other pictures with their captions, by file name."""
    front, pictures, table = FrontSection("", {}), {}, sweep.config.table
    crowded = is_crowded(sweep.settings, sweep.axes)
    if crowded or len(objectives) > 1:
        objectives = objectives if len(objectives) > 1 else WORTH_AND_COST
        front = front_section(sweep.rows, objectives, constraints, sweep.axes, f"{table}-front")
    if not crowded:
        pictures[f"{table}-accuracy.png"] = draw_sweep(sweep.settings, sweep.axes)
    return front, pictures | {f"{table}-tokens.png": draw_tokens(sweep.settings, sweep.axes)}


def _judged(claim: Claim, settings: list[Setting], unfinished: int) -> Judgement:
    """A claim that does not fit what was run is not measured. It must not cost a report of trials that took hours.

    While trials are unfinished nobody knows whether those that a claim is about are all there: nothing is true yet.
    """
    try:
        judgement = judge(claim, settings)
    except UserError as error:
        return Judgement(claim, [], [str(error)])
    if not unfinished:
        return judgement
    return replace(judgement, missing=[*judgement.missing, f"{unfinished} trials of the sweep"])


def _body(sweep: _Sweep, front: str, paper: dict | None) -> list[str]:
    """What was asked, what was found, the table, the claims, and how all of it was made."""
    settings = sweep.settings
    if not settings:
        return [f"`python -m patchrank.tune {sweep.command}`: no trial has a result."]
    table = main_table(settings, sweep.axes, paper)
    explained = " ".join(filter(None, [moved(sweep.own, sweep.names), legend(settings, table)]))
    claims = ["**Claims**\n", *(f"- {judgement.line()}" for judgement in sweep.judgements)]
    return [
        *(sweep.question, sweep.found, front, table, without_interval(settings), explained),
        "\n".join(claims) if sweep.judgements else "",
        " ".join([how_made(sweep.rows, sweep.command), *sweep.notes]),
        what_was_measured(settings, sweep.axes),
    ]


def _credit(settings: Sequence[Setting], credits: Mapping[str, str]) -> str:
    """What must be said of the images that any setting was evaluated on, or its ranking fitted to."""
    tasks = []
    for setting in settings:
        tasks += setting.tasks
        fit_on = setting.config["predictor"]["fit_on"]
        tasks += fit_on if setting.is_fitted and fit_on != "own" else []
    return " ".join(dict.fromkeys(credits[task] for task in tasks if task in credits))


def _failed(failures: Sequence[tuple[str, str]]) -> str:
    """Every trial that failed, and why."""
    if not failures:
        return ""
    lines = [[literal(settings), literal(cause)] for settings, cause in failures]
    text = markdown_table(["settings", "cause"], lines, texts=2)
    return f"**Failed trials**: {len(failures)}; running the sweep again tries them again.\n\n{text}"


def _summary(sweep: _Sweep, pictures: Sequence[str]) -> dict:
    """What an index of sweeps says of this one, as plain JSON; `pictures` are its pictures, the telling one first."""
    return {
        "schema": SUMMARY_SCHEMA,
        "sweep": sweep.rows[0]["sweep"] if sweep.rows else sweep.config.table,
        "table": sweep.config.table,
        "quick": sweep.is_quick,
        "unfinished": sweep.unfinished,
        "command": sweep.command,
        "date": max([row["date"] for row in sweep.rows] or [f"{datetime.date.today()}"]),
        "question": sweep.question,
        "found": sweep.found,
        **answer(sweep.own, sweep.names, sweep.judgements, pictures),
        "claims": [{"line": judgement.line(), **judgement.to_json()} for judgement in sweep.judgements],
    }
