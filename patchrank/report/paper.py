"""The paper's own figures, to stand beside ours: never in one column but where setting and rate are the same."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import numpy as np
import yaml

from patchrank.config import leaves
from patchrank.report.labels import plain
from patchrank.report.markdown import table
from patchrank.utils.errors import UserError, near


def paper_rows(key: str | None) -> dict | None:
    """A table of the paper. Raises `UserError` for a key that `paper.yaml` does not have."""
    tables = _tables()
    if key is not None and key not in tables:
        raise UserError(f"report.paper {key!r} is not in paper.yaml; {near(key, tables)}")
    return None if key is None else tables[key]


@lru_cache(maxsize=1)
def _tables() -> dict:
    return yaml.safe_load((Path(__file__).parent / "paper.yaml").read_text())


def papers_figure(paper: dict | None, config: dict) -> str:
    """The paper's average for the same setting; "" where its table has none."""
    if paper is None or config["pruning"]["drop_counts"]:
        return ""
    found = {"prompt.mode": "none", "prompt.loss": "cross_entropy", "prompt.norm_gains": False} | leaves(config)
    same = (row for row in paper["rows"] if _settings(paper, row) and _settings(paper, row).items() <= found.items())
    return next((f"{row['values'][-1]:.1f}" for row in same), "")


def _settings(paper: dict, row: dict) -> dict:
    """What settings of ours a row of the paper is for, by path."""
    axis = {paper["axis"]: row["key"]} if "axis" in paper else {}
    return paper.get("settings", {}) | row.get("settings", {}) | axis


def paper_section(paper: dict | None) -> str:
    """The table as printed, and below it our means over what `mean_over` names."""
    if paper is None:
        return ""
    heads = paper.get("heads") or [paper["axis"].rsplit(".", 1)[-1]]
    lines = [[*_key(paper, row), *_values(row["values"])] for row in paper["rows"]]
    lines += [[*key, *_values(values)] for key, values in _means(paper).items()]
    text = table([*heads, *paper["columns"]], lines, texts=len(heads))
    return f"The paper's own figures ({paper['title']}; {paper['what']}), not comparable to ours:\n\n{text}"


def _key(paper: dict, row: dict) -> list[str]:
    return row["key"] if "heads" in paper else [plain(row["key"])]


def _values(values: list[float]) -> list[str]:
    return [f"{value:.1f}" for value in values]


def _means(paper: dict) -> dict[tuple[str, ...], np.ndarray]:
    """Means over the head that `mean_over` names, one for each of the rest of the key, in bold: they are ours."""
    if "mean_over" not in paper:
        return {}
    place = paper["heads"].index(paper["mean_over"])
    groups: dict[tuple[str, ...], list[list[float]]] = {}
    for row in paper["rows"]:
        key = list(row["key"])
        key[place] = "**mean, by us**"
        groups.setdefault(tuple(key), []).append(row["values"])
    return {key: np.mean(values, axis=0) for key, values in groups.items()}
