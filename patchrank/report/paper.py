"""The paper's own figures, which stand beside ours. They share a column only where setting and rate are the same."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import yaml

from patchrank.config import leaves
from patchrank.report.labels import plain
from patchrank.report.markdown import table
from patchrank.utils.errors import UserError, near


def paper_rows(key: str | None) -> dict | None:
    """A table of the paper. Raises `UserError` for a key that `paper.yaml` does not have."""
    if key is None:
        return None
    tables = yaml.safe_load((Path(__file__).parent / "paper.yaml").read_text())
    if key not in tables:
        raise UserError(f"report.paper {key!r} is not in paper.yaml; {near(key, tables)}")
    return tables[key]


def papers_figure(paper: dict | None, config: dict) -> str:
    """The paper's average for the same setting; "" where its table has none."""
    if paper is None or config["pruning"]["drop_counts"]:
        return ""
    found = {"prompt.mode": "none", "prompt.loss": "cross_entropy", "prompt.norm_gains": False} | leaves(config)
    for row in paper["rows"]:
        settings = paper.get("settings", {}) | row.get("settings", {})  # of ours, by path
        if "axis" in paper:
            settings |= {paper["axis"]: row["key"]}
        if settings and settings.items() <= found.items():
            return f"{row['values'][-1]:.1f}"
    return ""


def paper_section(paper: dict | None) -> str:
    """The table as printed, and below it our means over the head that `mean_over` names, which bold type marks."""
    if paper is None:
        return ""
    heads = paper.get("heads") or [paper["axis"].rsplit(".", 1)[-1]]
    rows, groups = [], {}
    for row in paper["rows"]:
        key = row["key"] if "heads" in paper else [plain(row["key"])]
        rows.append((key, row["values"]))
        if "mean_over" in paper:
            parts = ["**mean, by us**" if head == paper["mean_over"] else part for head, part in zip(heads, key)]
            groups.setdefault(tuple(parts), []).append(row["values"])
    rows += [(key, np.mean(values, axis=0)) for key, values in groups.items()]
    lines = [[*key, *(f"{value:.1f}" for value in values)] for key, values in rows]
    text = table([*heads, *paper["columns"]], lines, texts=len(heads))
    return f"The paper's own figures ({paper['title']}; {paper['what']}), not comparable to ours:\n\n{text}"
