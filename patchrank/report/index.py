"""Reports of finished sweeps, copied into one folder with an index that says what each found."""

from __future__ import annotations

import datetime
import re
from collections.abc import Sequence

from patchrank.io import join, read_bytes, read_json, write_atomic
from patchrank.report.page import SUMMARY_SCHEMA
from patchrank.utils.errors import UserError

HEAD = "## ["  # what a section begins with
ROW = "| ["  # and a row of the table
COLUMNS = "| sweep | question | answer | figure |\n| --- | --- | --- | --- |"


def write_index(runs: Sequence[str], out: str, command: str) -> str:
    """Copies each run's report and pictures into `out`, and writes `README.md` there; returns its path.

    It begins with a table, one row a sweep, whose answer is the claim that answers the sweep's question. All claims
    stand below. What an earlier index says of other tables stays, so that one sweep may be run anew alone.

    Args:
        runs: folders or fsspec URLs that `python -m patchrank.tune` wrote.
        command: what was asked of `python -m patchrank.report`.

    Raises:
        UserError: a folder without a report, a smoke run, or two runs of one table; nothing has been written then.
    """
    summaries = [_summary(run) for run in runs]
    files: dict[str, bytes] = {}
    for run, summary in zip(runs, summaries):
        table = summary["table"]
        if f"{table}.md" in files:
            raise UserError(f"two of the folders hold a report named {table!r}; one of them would overwrite the other")
        files |= _files(run, table)
    for name, content in files.items():
        write_atomic(join(out, name), content)
    rows, sections = _earlier(join(out, "README.md"))
    rows |= {each["table"]: _row(each["table"], each["question"], each["answer"], each["figure"]) for each in summaries}
    sections |= {each["table"]: _section(each) for each in summaries}
    made = (
        f"Last brought up to date by `{command}` on {datetime.date.today()}. Each section says what it was made by; "
        "pages of sweeps that were not run again since keep their earlier layout."
    )
    # an earlier version wrote sections without rows
    table = "\n".join([COLUMNS, *(rows.get(name, _row(name, "", "see below", "")) for name in sections)])
    text = "\n\n".join(["# Ablations", made, table, *sections.values()])
    write_atomic(join(out, "README.md"), text + "\n")
    return join(out, "README.md")


def _earlier(path: str) -> tuple[dict[str, str], dict[str, str]]:
    """Rows and sections of an earlier index by their tables, in its order; none where there is no index yet."""
    try:
        top, *sections = read_bytes(path).decode().split(HEAD)
    except FileNotFoundError:
        return {}, {}
    rows = [line for line in top.splitlines() if line.startswith(ROW)]
    by_table = {section.partition("]")[0]: (HEAD + section).strip() for section in sections}
    return {row.removeprefix(ROW).partition("]")[0]: row for row in rows}, by_table


def _row(table: str, *cells: str) -> str:
    return " | ".join([f"| [{table}]({table}.md)", *(cell.replace("|", "\\|") for cell in cells)]) + " |"


def _summary(run: str) -> dict:
    summary = read_json(join(run, "claims.json"))
    if summary is None:
        raise UserError(f"{run}: holds no claims.json, so no finished report; try python -m patchrank.tune <sweep>")
    if summary["schema"] != SUMMARY_SCHEMA:
        raise UserError(f"{run}: its report is of another version; run its sweep again, which writes it anew")
    if summary["unfinished"]:
        raise UserError(f"{run}: {summary['unfinished']} trials of its sweep are not done; run it again to finish them")
    if summary["quick"]:
        raise UserError(f"{run}: is a smoke run on few images (--quick), whose figures mean nothing")
    return summary


def _files(run: str, table: str) -> dict[str, bytes]:
    """Name in the index's folder -> content: the report, and every picture that it shows."""
    try:
        page = read_bytes(join(run, "report.md"))
        pictures = re.findall(r"^!\[.*\]\((\S+\.png)\)$", page.decode(), re.MULTILINE)
        return {f"{table}.md": page} | {name: read_bytes(join(run, name)) for name in pictures}
    except FileNotFoundError as error:
        raise UserError(f"{run}: its report is not whole; running its sweep again writes what is missing") from error


def _section(summary: dict) -> str:
    head = f"{HEAD}{summary['table']}]({summary['table']}.md)\n\n{summary['found']}"
    how = f"By `python -m patchrank.tune {summary['command']}`, {summary['date']}."
    return "\n\n".join(filter(None, [head, "\n".join(f"- {claim['line']}" for claim in summary["claims"]), how]))
