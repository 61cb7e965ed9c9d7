"""Reports of finished sweeps, copied into one folder with an index that says what each found."""

from __future__ import annotations

import datetime
from collections.abc import Sequence

from patchrank.errors import UserError
from patchrank.files import join, read_bytes, read_json, write_atomic


def write_index(runs: Sequence[str], out: str, command: str) -> str:
    """Copies each run's report and pictures into `out`, and writes `README.md` there; returns its path.

    Args:
        runs: folders or fsspec URLs that `python -m patchrank.tune` wrote.
        command: what was asked of `python -m patchrank.report`.

    Raises:
        UserError: a folder without a report, a smoke run, or two runs of one table; nothing has been written then.
    """
    summaries = [_summary(run) for run in runs]
    tables = [summary["table"] for summary in summaries]
    if twice := next((table for n, table in enumerate(tables) if table in tables[:n]), None):
        raise UserError(f"two of the folders hold a report named {twice!r}; one of them would overwrite the other")
    files = {name: content for run, table in zip(runs, tables) for name, content in _files(run, table).items()}
    for name, content in files.items():
        write_atomic(join(out, name), content)
    sections = [_section(summary) for summary in summaries]
    text = "\n\n".join([f"# Ablations\n\nMade by `{command}` on {datetime.date.today()}.", *sections])
    write_atomic(join(out, "README.md"), text + "\n")
    return join(out, "README.md")


def _summary(run: str) -> dict:
    summary = read_json(join(run, "claims.json"))
    if summary is None:
        raise UserError(f"{run}: holds no claims.json, so no finished report; near: python -m patchrank.tune <sweep>")
    if summary["unfinished"]:
        raise UserError(f"{run}: {summary['unfinished']} trials of its sweep are not done; run it again to finish them")
    if summary["quick"]:
        raise UserError(f"{run}: is a smoke run on few images (--quick), whose figures mean nothing")
    return summary


def _files(run: str, table: str) -> dict[str, bytes]:
    """Name in the index's folder -> content."""
    pictures = [f"{table}-accuracy.png", f"{table}-tokens.png"]
    names = {f"{table}.md": "report.md", **dict(zip(pictures, pictures))}
    try:
        return {name: read_bytes(join(run, source)) for name, source in names.items()}
    except FileNotFoundError as error:
        raise UserError(f"{run}: its report is not whole; running its sweep again writes what is missing") from error


def _section(summary: dict) -> str:
    head = f"## [{summary['table']}]({summary['table']}.md)\n\n{summary['found']}"
    how = f"By `python -m patchrank.tune {summary['command']}`, {summary['date']}."
    return "\n\n".join(filter(None, [head, "\n".join(f"- {claim['line']}" for claim in summary["claims"]), how]))
