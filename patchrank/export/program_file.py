"""A traced tower as a `.pt2` archive of torch.export, and its way back without running anything that it brings.

`torch.export.load` unpickles parts of an archive and evaluates its sizes as expressions. So archives are looked through
first: one that holds more than `save` puts into it is refused.
"""

from __future__ import annotations

import io
import json
import re
import warnings
import zipfile
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram

from patchrank.export.choices import Step
from patchrank.export.metadata import EXTRA
from patchrank.utils.errors import UserError, one_line

MEMBERS = re.compile(  # what `save` writes, below the archive's one folder
    r"data/weights/(weight_\d+|model_weights_config\.json)|data/constants/((constant|tensor)_\d+|model_constants_config\.json)"
    r"|models/model\.json|data/sample_inputs/model\.pt|extra/patchrank\.json"
    r"|archive_format|archive_version|byteorder|version|\.data/(version|serialization_id)"
)
OPERATORS = re.compile(  # what a graph may call: torch's own operators on tensors, but the one that maps files
    r"torch\.ops\.aten\.((?!__|from_file)\w+|__(and|or|xor|lshift|rshift)__)\.(?!_)\w+"
    r"|_operator\.(add|sub|mul|floordiv|mod|pow|neg|getitem|eq|ne|[gl][et])"
)
SIZE = re.compile(r"(Mul|Add|Pow|Max|Min|Integer|Symbol|FloorDiv|[\d\s(),]|'s\d+'|positive=True|integer=True)*")


def save(program: ExportedProgram, about: str) -> bytes:
    """The bytes of an archive, with metadata."""
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of weights that are views, whose whole storage it writes
        torch.export.save(program, buffer, extra_files={EXTRA: about})
    return buffer.getvalue()


def load(path: str) -> fx.GraphModule:
    """The module of an archive: images to a tuple of outputs.

    Raises:
        UserError: it cannot be read, or holds pickles, or names that a file of ours does not have.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            for strange in _strange_parts(archive):
                raise UserError(f"{path}: holds {strange}, so it is not loaded; try to export it anew")
        return torch.export.load(path).module(check_guards=False)
    except UserError:
        raise
    except Exception as error:  # damaged archives make torch stumble over anything
        raise UserError(f"{path}: cannot be loaded ({one_line(error)[:200]}); try to export it anew") from error


def _strange_parts(archive: zipfile.ZipFile) -> Iterator[str]:
    """What an archive holds that `save` would not have put into it."""
    names = archive.namelist()
    if len({name.partition("/")[0] for name in names}) != 1 or len(set(names)) != len(names):
        yield "two parts of one name, or more than one folder"
    for name in names:
        part = name.partition("/")[2]
        if not MEMBERS.fullmatch(part):
            yield f"the part {name[:80]!r}"
        elif part.startswith("data/sample_inputs/"):
            torch.load(io.BytesIO(archive.read(name)), weights_only=True)  # raises for all but tensors
        elif part.startswith("models/"):
            yield from _strange_words(json.loads(archive.read(name)))
        elif part.endswith("_config.json"):
            entries = json.loads(archive.read(name))["config"].values()
            if any(entry.get("use_pickle") for entry in entries):
                yield f"pickled tensors ({part})"


def _strange_words(value: Any) -> Iterator[str]:
    """Operators and sizes in the JSON of a graph that no graph of ours has."""
    if isinstance(value, dict):
        target, size = value.get("target"), value.get("expr_str")
        if isinstance(target, str) and "inputs" in value and not OPERATORS.fullmatch(target):
            yield f"the operator {target[:80]}"
        if size is not None and not SIZE.fullmatch(str(size)):
            yield f"the size {str(size)[:80]!r}"
        value = list(value.values())
    if isinstance(value, list):
        for part in value:
            yield from _strange_words(part)


class LaidOpen(fx.Interpreter):
    """Runs a module of `load` and notes what it ranks and chooses by.

    Attributes:
        steps: of the last run.
    """

    def __init__(self, module: fx.GraphModule):
        super().__init__(module)
        self.steps: list[Step] = []

    def run(self, *images: Tensor) -> Sequence[Tensor]:
        self.steps = []
        return super().run(*images)

    def run_node(self, node: fx.Node) -> Any:
        found = super().run_node(node)
        packet = getattr(node.target, "overloadpacket", None)
        looked_at = self.env[node.args[0]] if node.args and isinstance(node.args[0], fx.Node) else None
        if (step := Step.of(getattr(packet, "__name__", ""), looked_at, found)) is not None:
            self.steps.append(step)
        return found
