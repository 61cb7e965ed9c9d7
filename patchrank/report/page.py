"""The report of one sweep: judged claims, table, pictures, and the paper's own figures beside."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from dataclasses import dataclass, replace

from patchrank.config import Claim, Constraint, Objective, ReportConfig
from patchrank.data.digits.scenes import CREDIT, STYLES
from patchrank.io import join, write_atomic, write_json
from patchrank.report.beside import Beside, read_beside, told_apart_by
from patchrank.report.claims import Judgement, details_table, judge
from patchrank.report.findings import answer, best_and_worst, brief_table, moved, question, verdicts
from patchrank.report.labels import labels
from patchrank.report.markdown import literal
from patchrank.report.markdown import table as markdown_table
from patchrank.report.paper import paper_rows, paper_section
from patchrank.report.pareto_section import FrontSection, front_section
from patchrank.report.plots import draw_sweep
from patchrank.report.plots.tokens import draw_tokens
from patchrank.report.prose import how_made, legend, what_was_measured, without_interval
from patchrank.report.results import Setting, read_settings
from patchrank.report.table import main_table
from patchrank.utils.errors import UserError

SUMMARY_SCHEMA = 2  # of claims.json
SMOKE = "**This is a smoke run on few images (`--quick`): its figures mean nothing.**"


@dataclass(frozen=True)
class Report:
    """Where a report was written, and its figures as a few lines of text that fit a terminal."""

    path: str
    table: str


@dataclass(frozen=True)
class _Sweep:
    """All that a page is about; rows are the sweep's own, settings those of other sweeps beside as well.

    own: settings with the sweep's own rows alone; names: what they are called in the table.
    """

    rows: Sequence[dict]
    beside: Sequence[Beside]
    config: ReportConfig
    axes: Sequence[str]
    command: str
    settings: list[Setting]
    own: list[Setting]
    names: list[str]
    judgements: list[Judgement]
    unfinished: int
    failures: Sequence[tuple[str, str]]
    stopped: int

    @property
    def is_quick(self) -> bool:
        return "--quick" in self.command.split()


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
) -> Report:
    """Writes `report.md`, `claims.json`, `<table>-accuracy.png` and `<table>-tokens.png` into `root`.

    With two objectives or more also `<table>-front.png`; without any row no picture at all. Where `config.beside` names
    roots of other sweeps, their rows stand in table and pictures too, and claims may compare with them.

    Args:
        rows: result rows in plan order; their arrays lie in `<root>/trials`.
        axes: dotted paths of the swept settings; rows that differ in seed and controls alone are merged.
        command: what was asked of `python -m patchrank.tune`.
        unfinished: trials of the sweep that have no row.
        objectives, constraints: of the search; several objectives make a Pareto front.
        failures: trials that failed, each its settings in words and the cause.
        stopped: trials that were ended early, since they fell behind others.

    Raises:
        UserError: a table that `paper.yaml` does not have.
    """
    paper, beside = paper_rows(config.paper), read_beside(config.beside, rows, root) if rows else []
    settings = read_settings(rows, root, [pair for each in beside for pair in each.rows])
    axes = told_apart_by(settings, axes) if beside else axes
    own = _own(rows, root, settings, axes) if beside else (settings, labels(settings, axes) if rows else [])
    judgements = [_judged(claim, settings, unfinished) for claim in config.claims]
    sweep = _Sweep(rows, beside, config, axes, command, settings, *own, judgements, unfinished, failures, stopped)
    table = main_table(settings, axes, paper) if rows else ""
    drawn = {"accuracy": draw_sweep(settings, axes), "tokens": draw_tokens(settings, axes)} if rows else {}
    pictures = {f"{config.table}-{kind}.png": picture for kind, picture in drawn.items()}
    front = FrontSection("", {})
    if len(objectives) > 1 and rows:
        front = front_section(rows, objectives, constraints, axes, f"{config.table}-front")
    for name, content in ({name: content for name, (content, _) in pictures.items()} | front.pictures).items():
        write_atomic(join(root, name), content)
    write_json(join(root, "claims.json"), _summary(sweep, [*front.pictures, *pictures]))
    captions = {name: caption for name, (_, caption) in pictures.items()}
    write_atomic(join(root, "report.md"), _page(sweep, table, front.markdown, captions, paper))
    return Report(join(root, "report.md"), brief_table(settings, axes) if rows else "")


def _own(
    rows: Sequence[dict], root: str, settings: Sequence[Setting], axes: Sequence[str]
) -> tuple[list[Setting], list[str]]:
    """The settings of a sweep's own rows, without seeds and controls from beside, and what the table calls them.

    A setting begins with its own rows, so those of the sweep come first, in the same order.
    """
    own = read_settings(rows, root)
    return own, labels(settings, axes)[: len(own)]


def _judged(claim: Claim, settings: list[Setting], unfinished: int) -> Judgement:
    """A claim that does not fit what was run is not measured; it must not cost a report that took hours.

    While trials are unfinished nobody knows whether those that a claim is about are all there: nothing is true yet.
    """
    try:
        judgement = judge(claim, settings)
        missing = [f"{unfinished} trials of the sweep"] * bool(unfinished)
        return replace(judgement, missing=judgement.missing + missing)
    except UserError as error:
        return Judgement(claim, [], [str(error)])


def _page(sweep: _Sweep, table: str, front: str, captions: dict[str, str], paper: dict | None) -> str:
    settings = sweep.settings
    parts = [f"# {sweep.config.table}", SMOKE if sweep.is_quick else "", _unfinished(sweep)]
    if settings:
        parts += [_question(sweep), _found(sweep), front, table, without_interval(settings)]
        parts += [" ".join(filter(None, [moved(sweep.own, sweep.names), legend(settings, table)]))]
        parts += [_claims(sweep.judgements)]
        made = [how_made(sweep.rows, sweep.command), *(each.note for each in sweep.beside)]
        parts += [" ".join(made), what_was_measured(settings, sweep.axes)]
    else:
        parts += [f"`python -m patchrank.tune {sweep.command}`: no trial has a result."]
    parts += [f"{caption}\n\n![{caption.split(',')[0]}]({name})" for name, caption in captions.items()]
    credit = CREDIT if _shows_digits(settings) else ""
    parts += [_failed(sweep.failures), _details(sweep.judgements), paper_section(paper), credit]
    return "\n\n".join(filter(None, parts)) + "\n"


def _question(sweep: _Sweep) -> str:
    return question(sweep.config.question, sweep.axes)


def _found(sweep: _Sweep) -> str:
    """What came out, in three short sentences: the best, the worst, and how many claims hold."""
    if not sweep.rows:
        return "No trial has a result."
    return f"{best_and_worst(sweep.own, sweep.names)} {verdicts(sweep.judgements)}"


def _shows_digits(settings: Sequence[Setting]) -> bool:
    """Whether any setting was evaluated or fitted on embedded scenes, whose makers are then to be named."""
    tasks = {task for setting in settings for task in setting.tasks}
    for setting in settings:
        fitted_on = setting.config["predictor"]["fit_on"]
        tasks |= set(fitted_on) if setting.is_fitted and fitted_on != "own" else set()
    return bool(tasks & set(STYLES))


def _unfinished(sweep: _Sweep) -> str:
    text = f"**{sweep.unfinished} trials of this sweep are not done.** " if sweep.unfinished else ""
    ended = f"{sweep.stopped} trials were ended early (ASHA), and are not shown." if sweep.stopped else ""
    return (text + ended).strip()


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
        "question": _question(sweep),
        "found": _found(sweep),
        **answer(sweep.own, sweep.names, sweep.judgements, pictures),
        "claims": [{"line": judgement.line(), **judgement.to_json()} for judgement in sweep.judgements],
    }


def _claims(judgements: Sequence[Judgement]) -> str:
    return "\n".join(["**Claims**", "", *(f"- {judgement.line()}" for judgement in judgements)]) if judgements else ""


def _details(judgements: Sequence[Judgement]) -> str:
    several = [judgement for judgement in judgements if len(judgement.comparisons) > 1]
    return "\n\n".join(f"Claim in detail: {each.claim.say}:\n\n{details_table(each)}" for each in several)
