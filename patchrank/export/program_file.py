"""A traced tower as a `.pt2` archive of torch.export, and its way back without running anything that it brings.

`torch.export.load` unpickles parts of an archive and evaluates its sizes as expressions. So archives are looked through
first: one that holds more than `save` puts into it is refused.
"""

from __future__ import annotations

import io
import json
import re
import zipfile
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram

from patchrank.export.choices import CHOOSING, Step
from patchrank.export.metadata import EXTRA
from patchrank.utils.errors import UserError, one_line

OPERATORS = ("torch.ops.aten.", "_operator.")  # what a graph of ours calls
SIZE = re.compile(r"(Mul|Add|Pow|Max|Min|Integer|Symbol|FloorDiv|[\d\s(),]|'s\d+'|positive=True|integer=True)*")
CONSTANTS = re.compile(r"(weight|constant|tensor)_\d+")


def save(program: ExportedProgram, about: str) -> bytes:
    """The bytes of an archive, with metadata."""
    buffer = io.BytesIO()
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
    for name in archive.namelist():
        folder, _, part = name.partition("/")[2].rpartition("/")
        if folder == "data/sample_inputs":
            torch.load(io.BytesIO(archive.read(name)), weights_only=True)  # raises for all but tensors
        elif folder in ("data/weights", "data/constants"):
            if part.endswith("_config.json"):
                config = json.loads(archive.read(name))["config"]
                if any(entry.get("use_pickle") for entry in config.values()):
                    yield f"pickled tensors ({part})"
            elif not CONSTANTS.fullmatch(part):
                yield f"something that is no tensor ({part[:80]})"
        elif folder == "models":
            yield from _strange_words(json.loads(archive.read(name)))


def _strange_words(value: Any) -> Iterator[str]:
    """Operators and sizes in the JSON of a graph that no graph of ours has."""
    if isinstance(value, dict):
        target, size = value.get("target"), value.get("expr_str")
        if isinstance(target, str) and "inputs" in value and not target.startswith(OPERATORS):
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
        if packet is not None and packet.__name__ in CHOOSING:
            looked_at = self.env[node.args[0]]
            if (step := Step.of(looked_at, found)) is not None:
                self.steps.append(step)
        return found
