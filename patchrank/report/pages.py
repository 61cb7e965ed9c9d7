"""The report of one sweep: judged claims, table, pictures, and the paper's own figures beside."""

from __future__ import annotations

import datetime
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from patchrank.config import Claim, Constraint, Objective, ReportConfig
from patchrank.data.digits import CREDIT
from patchrank.errors import UserError
from patchrank.files import join, write_atomic, write_json
from patchrank.report.claims import Judgement, details_table, judge
from patchrank.report.compare import change
from patchrank.report.front import FrontSection, front_section
from patchrank.report.markdown import literal
from patchrank.report.markdown import table as markdown_table
from patchrank.report.measured import how_made, legend, what_was_measured
from patchrank.report.names import labels
from patchrank.report.paper import paper_rows, paper_section
from patchrank.report.plots import draw_sweep
from patchrank.report.results import Setting, read_settings
from patchrank.report.tables import main_table
from patchrank.report.tokens import draw_tokens

SMOKE = "**This is a smoke run on few images (`--quick`): its figures mean nothing.**"


@dataclass(frozen=True)
class Report:
    path: str
    table: str


@dataclass(frozen=True)
class _Sweep:
    """All that a page is about."""

    rows: Sequence[dict]
    config: ReportConfig
    axes: Sequence[str]
    command: str
    settings: list[Setting]
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

    With two objectives or more also `<table>-front.png`; without any row no picture at all.

    Args:
        rows: result rows in plan order; their arrays lie in `<root>/trials`.
        axes: dotted paths of the swept settings; rows that differ in their seed alone are merged.
        command: what was asked of `python -m patchrank.tune`.
        unfinished: trials of the sweep that have no row.
        objectives, constraints: of the search; several objectives make a Pareto front.
        failures: trials that failed, each its settings in words and the cause.
        stopped: trials that were ended early, since they fell behind others.

    Raises:
        UserError: a table that `paper.yaml` does not have.
    """
    paper, settings = paper_rows(config.paper), read_settings(rows, root)
    judgements = [_judged(claim, settings, unfinished) for claim in config.claims]
    sweep = _Sweep(rows, config, axes, command, settings, judgements, unfinished, failures, stopped)
    table = main_table(settings, axes, paper) if rows else ""
    drawn = {"accuracy": draw_sweep(settings, axes), "tokens": draw_tokens(settings, axes)} if rows else {}
    pictures = {f"{config.table}-{kind}.png": picture for kind, picture in drawn.items()}
    front = FrontSection("", {})
    if len(objectives) > 1 and rows:
        front = front_section(rows, objectives, constraints, axes, f"{config.table}-front")
    for name, content in ({name: content for name, (content, _) in pictures.items()} | front.pictures).items():
        write_atomic(join(root, name), content)
    write_json(join(root, "claims.json"), _summary(sweep))
    captions = {name: caption for name, (_, caption) in pictures.items()}
    write_atomic(join(root, "report.md"), _page(sweep, table, front.markdown, captions, paper))
    return Report(join(root, "report.md"), table)


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
        parts += [how_made(sweep.rows, sweep.command), what_was_measured(settings, sweep.axes)]
        parts += [_claims(sweep.judgements), front, table, legend(settings, table)]
    else:
        parts += [f"`python -m patchrank.tune {sweep.command}`: no trial has a result."]
    parts += [f"{caption}\n\n![{caption.split(',')[0]}]({name})" for name, caption in captions.items()]
    parts += [_failed(sweep.failures), _details(sweep.judgements), paper_section(paper), CREDIT]
    return "\n\n".join(filter(None, parts)) + "\n"


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


def _summary(sweep: _Sweep) -> dict:
    """What an index of sweeps says of this one, as plain JSON."""
    return {
        "schema": 1,
        "sweep": sweep.rows[0]["sweep"] if sweep.rows else sweep.config.table,
        "table": sweep.config.table,
        "quick": sweep.is_quick,
        "unfinished": sweep.unfinished,
        "command": sweep.command,
        "date": max([row["date"] for row in sweep.rows] or [f"{datetime.date.today()}"]),
        "found": f"{_moves(sweep)}{_verdicts(sweep.judgements)}" if sweep.rows else "No trial has a result.",
        "claims": [{"line": judgement.line(), **judgement.to_json()} for judgement in sweep.judgements],
    }


def _moves(sweep: _Sweep) -> str:
    """In how many settings accuracy moved, and how far; oracles aside."""
    names = labels(sweep.settings, sweep.axes)
    named = [pair for pair in zip(sweep.settings, names) if not pair[0].is_oracle] or [*zip(sweep.settings, names)]
    changes = sorted([(change(setting), name) for setting, name in named], key=lambda pair: pair[0].estimate)
    fall = sum(each.high < 0 for each, _ in changes)
    rise = sum(each.low > 0 for each, _ in changes)
    ends = " to ".join(f"{each.estimate:+.1f} ({name})" for each, name in (changes[0], changes[-1]))
    what = "Accuracy on val" if sweep.settings[0].on_val else "Accuracy"
    return (
        f"{what} falls in {fall} and rises in {rise} of {len(changes)} settings (95 % interval excludes 0); its "
        f"change goes from {ends}."
    )


def _verdicts(judgements: Sequence[Judgement]) -> str:
    counts = Counter(judgement.verdict.replace("open", "not told apart") for judgement in judgements)
    return f" Claims: {', '.join(f'{count} {verdict}' for verdict, count in counts.items())}." if counts else ""


def _claims(judgements: Sequence[Judgement]) -> str:
    return "\n".join(["**Claims**", "", *(f"- {judgement.line()}" for judgement in judgements)]) if judgements else ""


def _details(judgements: Sequence[Judgement]) -> str:
    several = [judgement for judgement in judgements if len(judgement.comparisons) > 1]
    return "\n\n".join(f"Claim in detail: {each.claim.say}:\n\n{details_table(each)}" for each in several)
