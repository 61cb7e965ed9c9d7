"""What commands say when they are done: a short table for people on stderr, and a row of JSON on stdout."""

from __future__ import annotations

import argparse
import json
import sys
import textwrap
from collections.abc import Iterable, Mapping

from patchrank.cli.saved_pruning import read_pruning
from patchrank.io import write_atomic
from patchrank.models.model_name import stable_name
from patchrank.models.pruning_cfg import canonical_pruning, lets_leave

WIDTH = 100  # columns

ACCURACIES = {
    "accuracy": "accuracy, pruned",
    "accuracy_zero_shot": "accuracy, pruned, without prompts",
    "accuracy_unpruned": "accuracy, unpruned",
    "accuracy_random": "accuracy, patches dropped at random",
    "accuracy_reversed": "accuracy, most important patches dropped",
    "agreement": "agreement with the unpruned answers",
}
KNN = {
    "knn_accuracy": "k-NN accuracy, pruned",
    "knn_accuracy_unpruned": "k-NN accuracy, unpruned",
    "knn_accuracy_random": "k-NN accuracy, patches dropped at random",
    "knn_accuracy_reversed": "k-NN accuracy, most important patches dropped",
    "knn_agreement": "agreement with the unpruned k-NN answers",
}
MATCHING = {
    "matching_rate": "matching of the golden top patches",
    "matching_prior": "matching by position alone (prior)",
    "matching_chance": "matching by chance",
}


def print_row(row: Mapping, title: str, figures: Iterable[tuple[str, str]], out: str | None = None) -> None:
    """Prints a row as one line of JSON on stdout, below a table on stderr; writes it to the file `out` as well.

    Args:
        title: what was measured, above the table.
        figures: label and value, with its unit, of each line of the table.

    Raises:
        UserError: `out` cannot be written to.
    """
    line = json.dumps(row)
    if out:
        write_atomic(out, line + "\n")
    print(table(title, figures), file=sys.stderr, flush=True)
    print(line)


def table(title: str, figures: Iterable[tuple[str, str]]) -> str:
    """A title and below it labels on the left and values on the right, in lines of at most `WIDTH` columns."""
    figures = list(figures)
    left = max(len(label) for label, _ in figures)
    lines = textwrap.wrap(title, WIDTH, subsequent_indent="  ")
    for label, value in figures:
        lines += textwrap.wrap(f"  {label:{left}}  {value}", WIDTH, subsequent_indent=" " * (left + 4))
    return "\n".join(lines)


def pruning_title(args: argparse.Namespace, where: str) -> str:
    """A table's title: the model, `where` it was measured ("on digits/val"), what leaves of its patches, and how."""
    pruning, model = read_pruning(args), stable_name(args.model)
    if not lets_leave(pruning):
        return f"{model} {where}: nothing pruned"
    merges = canonical_pruning(pruning)["leftovers"] != "drop"
    who = f"{pruning.reducer} at layer{'s' if len(pruning.locations) > 1 else ''} "
    who += ", ".join(map(str, pruning.locations))
    leave = f"{'merged' if merges else 'dropped'} by {who}"
    if pruning.drop_counts is not None:
        what = f"{', '.join(map(str, pruning.drop_counts))} patches {leave}"
    elif pruning.budget is not None:
        what = f"at most {100 * pruning.budget:g} % of MACs, patches {leave}"
    else:
        what = f"{100 * pruning.keep_rate:g} % of patches kept by {who}"
        what += ", the others merged" if merges else ""
    return f"{model} {where}: {what}" + ("; repaired" if args.repair else "")


def percentages(row: Mapping, labels: Mapping[str, str]) -> list[tuple[str, str]]:
    """A line for each of a row's percentages that has a label."""
    return [(label, f"{row[key]:.2f} %") for key, label in labels.items() if key in row]


def cosine_line(row: Mapping) -> tuple[str, str]:
    return "cosine to the unpruned embedding", f"{row['cosine']:.5f}"


def macs_line(row: Mapping) -> tuple[str, str]:
    """MACs of an image, beside those of the unpruned tower where the row has them."""
    used, whole = row["gmacs"], row.get("gmacs_unpruned")
    beside = "" if whole is None else f" of {_macs(whole)} ({100 * used / whole:.0f} %)"
    return "MACs of an image", _macs(used) + beside


def images_line(row: Mapping) -> tuple[str, str]:
    skipped = row.get("n_skipped")
    return "images", f"{row['n_images']:,}" + (f" (left out as broken: {skipped:,})" if skipped else "")


def _macs(giga: float) -> str:
    return f"{giga:.2f} G" if giga >= 1 else f"{1000 * giga:.1f} M"
