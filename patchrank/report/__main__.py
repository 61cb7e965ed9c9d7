"""`python -m patchrank.report runs/scores runs/locations --out docs/ablations`: an index of finished sweeps."""

from __future__ import annotations

import datetime
import re
import shlex
import sys
from collections.abc import Sequence

from patchrank.io import join, read_bytes, read_json, write_atomic
from patchrank.report.page import SUMMARY_SCHEMA
from patchrank.utils.command import create_parser, run_command
from patchrank.utils.errors import UserError

HEAD = "## ["  # what a section begins with
ROW = "| ["  # and a row of the table
KEYS = {"table", "quick", "unfinished", "command", "date", "question", "answer", "figure", "found", "claims"}  # we read
COLUMNS = "| sweep | question | answer | figure |\n| --- | --- | --- | --- |"


def main(argv: Sequence[str] | None = None) -> None:
    parser = create_parser("report", __doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN_DIR", help="folder or URL that a sweep was written to")
    parser.add_argument("--out", required=True, help="folder of the copies and their README.md")
    args = parser.parse_args(argv)
    command = shlex.join(["python", "-m", "patchrank.report", *(sys.argv[1:] if argv is None else argv)])
    print(f"index: {write_index(args.runs, args.out, command)}")


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
    for name, content in _files(runs, summaries).items():
        write_atomic(join(out, name), content)
    rows, sections = _earlier(join(out, "README.md"))
    for each in summaries:
        table, lines = each["table"], "\n".join(f"- {claim['line']}" for claim in each["claims"])
        how = f"By `python -m patchrank.tune {each['command']}`, {each['date']}."
        rows[table] = _row(table, each["question"], each["answer"], each["figure"])
        parts = [f"{HEAD}{table}]({table}.md)", each["found"], lines, how]
        sections[table] = "\n\n".join(filter(None, parts))
    made = (
        f"Last brought up to date by `{command}` on {datetime.date.today()}. Each section says what it was made by; "
        "pages of sweeps that were not run again since keep their earlier layout."
    )
    # an earlier version wrote sections without rows
    table = "\n".join([COLUMNS, *(rows.get(name, _row(name, "", "see below", "")) for name in sections)])
    text = "\n\n".join(["# Ablations", made, table, *sections.values()])
    write_atomic(join(out, "README.md"), text + "\n")
    return join(out, "README.md")


def _summary(run: str) -> dict:
    summary = read_json(join(run, "claims.json"))
    if summary is None:
        raise UserError(f"{run}: holds no claims.json, so no finished report; try python -m patchrank.tune <sweep>")
    if summary.get("schema") != SUMMARY_SCHEMA:
        raise UserError(f"{run}: its report is of another version; run its sweep again, which writes it anew")
    if not KEYS <= summary.keys():
        raise UserError(f"{run}: its claims.json is damaged; run its sweep again, which writes it anew")
    if summary["unfinished"]:
        raise UserError(f"{run}: {summary['unfinished']} trials of its sweep are not done; run it again to finish them")
    if summary["quick"]:
        raise UserError(f"{run}: is a smoke run on few images (--quick), whose figures mean nothing")
    return summary


def _files(runs: Sequence[str], summaries: Sequence[dict]) -> dict[str, bytes]:
    """Name in the index's folder -> content: the report of each run, and every picture that it shows."""
    files: dict[str, bytes] = {}
    for run, table in zip(runs, (summary["table"] for summary in summaries)):
        if f"{table}.md" in files:
            raise UserError(f"two of the folders hold a report named {table!r}; one of them would overwrite the other")
        try:
            page = read_bytes(join(run, "report.md"))
            pictures = re.findall(r"^!\[.*\]\((\S+\.png)\)$", page.decode(), re.MULTILINE)
            files |= {f"{table}.md": page} | {name: read_bytes(join(run, name)) for name in pictures}
        except FileNotFoundError as error:
            raise UserError(f"{run}: its report is not whole; try its sweep again, which writes all of it") from error
    return files


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


if __name__ == "__main__":
    run_command(main)
