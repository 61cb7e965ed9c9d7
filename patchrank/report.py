"""Result rows and the arrays that trials saved, turned into a Markdown table, a plot and a picture. Runs no model."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import yaml

from patchrank.config import ReportConfig
from patchrank.data.digits import CREDIT
from patchrank.errors import UserError, near
from patchrank.files import join, read_bytes, write_atomic

CONTROLS = {"random": "at random (control)", "reversed": "reversed (control)"}
MATCHING = ("matching_rate", "matching_prior", "matching_chance")
DROPPED, VEIL = 128, 0.85  # grey level that covers dropped patches in pictures, and how much of it


@dataclass(frozen=True)
class Report:
    path: str
    table: str


def write_report(rows: Sequence[dict], root: str, config: ReportConfig, axes: Sequence[str], command: str) -> Report:
    """Writes `report.md`, `<table>-accuracy.png` and `<table>-tokens.png` into `root`.

    Args:
        rows: result rows in plan order, at least one.
        axes: dotted paths of the swept settings; rows are named by their values.
        command: what was asked of `python -m patchrank.tune`.
    """
    names = [_name(row, axes) for row in rows]
    table = results_table(rows, names, paper_rows(config.paper), axes)
    pictures = {
        f"{config.table}-accuracy.png": plot_accuracy(rows, names),
        f"{config.table}-tokens.png": draw_tokens([_arrays(root, row) for row in rows], names),
    }
    for name, content in pictures.items():
        write_atomic(join(root, name), content)
    text = _markdown(rows, config, table, list(pictures), command)
    write_atomic(join(root, "report.md"), text)
    return Report(join(root, "report.md"), table)


def paper_rows(key: str | None) -> dict | None:
    """A table of the paper. Raises `UserError` for a key that `paper.yaml` does not have."""
    tables = yaml.safe_load((Path(__file__).parent / "paper.yaml").read_text())
    if key is not None and key not in tables:
        raise UserError(f"report.paper {key!r} is not in paper.yaml; {near(key, tables)}")
    return None if key is None else tables[key]


def results_table(rows: Sequence[dict], names: Sequence[str], paper: dict | None, axes: Sequence[str]) -> str:
    """One row for the unpruned tower, and for each trial its own and its controls'; the paper's average beside."""
    head = [", ".join(axis.rsplit(".", 1)[-1] for axis in axes) or "setting", "ranked by"]
    head += ["accuracy", "change", "agreement", "cosine", "matching, prior, chance", "GMACs"]
    head += ["paper (see below)"] if paper else []
    first = rows[0]["metrics"]
    unpruned, gmacs = f"{first['accuracy_unpruned']:.1f}", _gmacs(first, "_unpruned")
    lines = [["none", "nothing pruned", unpruned, "", "", "", "", gmacs]]
    for row, name in zip(rows, names):
        lines.append(_trial_line(row, name) + [_paper_average(paper, row)] * bool(paper))
        lines += [_control_line(row, name, control) for control in CONTROLS if f"accuracy_{control}" in row["metrics"]]
    return _table(head, lines)


def _trial_line(row: dict, name: str) -> list[str]:
    m, config = row["metrics"], row["config"]
    reducer = config["pruning"]["reducer"]
    fitted = f"**{config['predictor']['name']}**, {config['golden']['metric']}"
    matching = ", ".join(f"{m[key]:.1f}" for key in MATCHING if key in m)
    change = f"{m['accuracy'] - m['accuracy_unpruned']:+.1f}"
    accuracy, agreement, cosine = f"**{m['accuracy']:.1f}**", f"{m['agreement']:.1f}", f"{m['cosine']:.4f}"
    return [
        name,
        fitted if reducer == "predictor" else reducer,
        accuracy,
        change,
        agreement,
        cosine,
        matching,
        _gmacs(m),
    ]


def _control_line(row: dict, name: str, control: str) -> list[str]:
    m = row["metrics"]
    accuracy = m[f"accuracy_{control}"]
    return [name, CONTROLS[control], f"{accuracy:.1f}", f"{accuracy - m['accuracy_unpruned']:+.1f}"]


def _gmacs(metrics: dict, which: str = "") -> str:
    return f"{metrics[f'gmacs{which}']:.4f}"


def _paper_average(paper: dict, row: dict) -> str:
    """The paper's figure for the same setting, if tokens are kept at the paper's rate."""
    pruning = row["config"]["pruning"]
    if pruning["keep_rate"] != paper["keep_rate"] or pruning["drop_counts"]:
        return ""
    value = row["config"]
    for part in paper["axis"].split("."):
        value = value[part]
    return next((f"{theirs['values'][-1]:.1f}" for theirs in paper["rows"] if theirs["key"] == value), "")


def _table(head: list[str], lines: Sequence[list[str]]) -> str:
    padded = [line + [""] * (len(head) - len(line)) for line in lines]
    rules = ["---" if n < 2 else "--:" for n in range(len(head))]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [head, rules, *padded])


def _name(row: dict, axes: Sequence[str]) -> str:
    parts = []
    for axis in axes:
        value = row["config"]
        for part in axis.split("."):
            value = value[part]
        parts.append(", ".join(map(str, value)) if isinstance(value, list) else str(value))
    return "; ".join(parts) or "the sweep's trial"


def _arrays(root: str, row: dict) -> dict[str, np.ndarray]:
    with np.load(io.BytesIO(read_bytes(join(root, "trials", f"{row['id']}.npz"))), allow_pickle=False) as arrays:
        return dict(arrays)


def _markdown(rows: Sequence[dict], config: ReportConfig, table: str, pictures: list[str], command: str) -> str:
    first = rows[0]
    task, m, trial, env = first["config"]["data"]["tasks"][0], first["metrics"], first["config"], first["env"]
    smoke = "--quick" in command
    warning = "**This is a smoke run on few images (`--quick`): its figures mean nothing.**\n\n" if smoke else ""
    days = sorted({row["date"] for row in rows})
    return f"""# {config.table}

{warning}Made by `python -m patchrank.tune {command}`; trials run on {" to ".join({days[0]: 0, days[-1]: 0})} \
(patchrank {env["patchrank"]}, torch {env["torch"]}, {env["device"]}, {env["threads"]} threads a trial).

Ours: zero-shot accuracy in percent of `{trial["model"]["name"]}` on {m["n_images"]} test images of `{task}`, \
{_kept(rows)}, leftovers {trial["pruning"]["leftovers"]}ped, seed {trial["seed"]}. {_fitted_on(rows)}Agreement and \
cosine compare with the unpruned answer and embedding. Controls drop as many tokens, at random or the most important \
first.

{table}

![Accuracy by {config.table}]({pictures[0]})

Which tokens survive, on the first test images; dropped patches are veiled in grey:

![Surviving tokens]({pictures[1]})

{_paper_section(paper_rows(config.paper))}{CREDIT}
"""


def _kept(rows: Sequence[dict]) -> str:
    """How many patch tokens are left after the last location."""
    shares = sorted({(row["metrics"]["n_kept"], row["metrics"]["n_tokens"]) for row in rows})
    return (
        " or ".join(f"{kept} of {total} patch tokens ({100 * kept / total:.0f} %)" for kept, total in shares) + " kept"
    )


def _fitted_on(rows: Sequence[dict]) -> str:
    reducers = {row["config"]["pruning"]["reducer"] for row in rows}
    text = ""
    if "predictor" in reducers:
        m = next(row["metrics"] for row in rows if row["config"]["pruning"]["reducer"] == "predictor")
        text += f"Predictors were fitted on {m['n_train']} other images; matching rates are measured on {m['n_val']} "
        text += "validation images, beside the position prior and chance. "
    if "golden" in reducers:
        text += "Rows by `golden` are oracles: they were scored on the very test images, and could not be deployed. "
    return text


def _paper_section(paper: dict | None) -> str:
    if paper is None:
        return ""
    lines = [[", ".join(map(str, row["key"])), *[f"{value:.1f}" for value in row["values"]]] for row in paper["rows"]]
    table = _table([paper["axis"].rsplit(".", 1)[-1], *paper["columns"]], lines)
    return f"The paper's own figures ({paper['title']}; {paper['what']}), not comparable to ours:\n\n{table}\n\n"


def plot_accuracy(rows: Sequence[dict], names: Sequence[str]) -> bytes:
    """Accuracy of every trial and its controls, beside the unpruned tower, as PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1.6 * len(rows) + 2.4, 3.6), layout="constrained")
    axis = figure.add_subplot()
    places = np.arange(len(rows))
    series = {"accuracy": ("by trained ranking", "#1b6ca8"), "accuracy_random": ("at random", "#b0b0b0")}
    series["accuracy_reversed"] = ("ranking reversed", "#d98b5f")
    for n, (key, (label, colour)) in enumerate(series.items()):
        values = [row["metrics"].get(key, np.nan) for row in rows]
        bars = axis.bar(places + 0.27 * (n - 1), values, 0.25, label=label, color=colour)
        axis.bar_label(bars, fmt="%.1f", fontsize=7, padding=1)
    unpruned = rows[0]["metrics"]["accuracy_unpruned"]
    axis.axhline(unpruned, color="black", lw=0.8, ls="--", label=f"unpruned, {unpruned:.1f}")
    axis.set_xticks(places, names, fontsize=8)
    axis.set_ylabel("zero-shot accuracy, %")
    axis.set_ylim(0, 108)
    axis.legend(fontsize=7, ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False)
    axis.spines[["top", "right"]].set_visible(False)
    return _png(figure)


def draw_tokens(arrays: Sequence[dict[str, np.ndarray]], names: Sequence[str]) -> bytes:
    """Test images (columns) with the patches that survive in every trial (rows), as PNG."""
    from matplotlib.figure import Figure

    pictures, grid = arrays[0]["pictures"], arrays[0]["grid"]
    strips = [pictures] + [veil_dropped(pictures, trial["pictures_kept"], grid) for trial in arrays]
    count = len(pictures)
    figure = Figure(figsize=(1.1 * count + 1.3, 1.1 * len(strips)), layout="constrained")
    axes = figure.subplots(len(strips), count, squeeze=False)
    for row, (strip, name) in enumerate(zip(strips, ["image", *names])):
        for column in range(count):
            axes[row, column].imshow(strip[column], interpolation="nearest")
            axes[row, column].set(xticks=[], yticks=[])
        axes[row, 0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=8)
    return _png(figure)


def veil_dropped(pictures: np.ndarray, kept: np.ndarray, grid: np.ndarray) -> np.ndarray:
    """Images (n, S, S, 3) with every patch veiled in grey that is not among the kept places (n, K)."""
    veil = np.full((len(pictures), grid.prod()), VEIL)
    np.put_along_axis(veil, kept, 0.0, axis=1)
    scale = pictures.shape[1] // grid[0], pictures.shape[2] // grid[1]
    veil = veil.reshape(-1, *grid).repeat(scale[0], axis=1).repeat(scale[1], axis=2)[..., None]
    return (pictures * (1 - veil) + DROPPED * veil).astype(np.uint8)


def _png(figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    return buffer.getvalue()
