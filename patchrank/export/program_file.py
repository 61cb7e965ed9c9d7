"""A traced tower as a `.pt2` archive of torch.export, and its way back without running anything that it brings.

`torch.export.load` unpickles parts of an archive, evaluates its sizes as expressions and makes code of its names. So an
archive is looked through first: one that holds more than `save` puts into it is refused. What is loaded are the parts
that were looked through, written anew, since another reader of the same file might find other parts in it.
"""

from __future__ import annotations

import io
import json
import re
import warnings
import zipfile
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram

from patchrank.export.choices import Step
from patchrank.export.metadata import EXTRA, check_graph, read_archive
from patchrank.utils.errors import UserError, one_line

MEMBERS = re.compile(  # what `save` writes, below the archive's one folder
    r"data/weights/(weight_\d+|model_weights_config\.json)|data/constants/((constant|tensor)_\d+|model_constants_config\.json)"
    r"|models/model\.json|data/sample_inputs/model\.pt|extra/patchrank\.json"
    r"|archive_format|archive_version|byteorder|version|\.data/(version|serialization_id)"
)
OPERATORS = re.compile(  # what a graph may call: torch's own operators on tensors, but those that read or write files
    r"torch\.ops\.aten\.((?!__|from_file|save|warn|_print)\w+|__(and|or|xor|lshift|rshift)__)\.(?!_)\w+"
    r"|_operator\.(add|sub|mul|floordiv|mod|pow|neg|getitem|eq|ne|[gl][et])"
)
SIZE = re.compile(r"(Mul|Add|Max|Min|Integer|Symbol|FloorDiv|[\d\s(),-]|'s\d+'|positive=True|integer=True)*")
TREE = re.compile(r'([\d\s\[\]{},:"]|builtins\.(tuple|list|dict)|type|context|children_spec|null)*')
WORD = re.compile(r"[\w\s.,>-]*")  # "tanh", "ij,jk->ik"
WORDS = {"expr_str": SIZE, "in_spec": TREE, "out_spec": TREE, "as_string": WORD, "as_strings": WORD}
NAME = re.compile(r"[\w.+]*")  # strings by all other keys, and keys


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
        with zipfile.ZipFile(path) as archive, warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The given buffer is not writable")  # torch 2.9, of what it read itself
            module = torch.export.load(_looked_through(archive)).module(check_guards=False)
        (images,) = module.graph.find_nodes(op="placeholder")
        check_graph(read_archive(path), images.meta["val"].shape, len(module.graph.output_node().args[0]), path)
        return module
    except UserError:
        raise
    except _Strange as error:
        raise UserError(f"{path}: holds {error}, so it is not loaded; try to export it anew") from error
    except Exception as error:  # damaged archives make torch stumble over anything
        raise UserError(f"{path}: cannot be loaded ({one_line(error)[:200]}); try to export it anew") from error


class _Strange(ValueError):
    """An archive holds what `save` would not have put into it; the message says what."""


def _looked_through(archive: zipfile.ZipFile) -> io.BytesIO:
    """The same archive, written anew. Raises `_Strange`, or anything where it is damaged."""
    names, buffer = archive.namelist(), io.BytesIO()
    if len({name.partition("/")[0] for name in names}) != 1 or len(set(names)) != len(names):
        raise _Strange("two parts of one name, or more than one folder")
    with zipfile.ZipFile(buffer, "w") as anew:
        for name in names:
            anew.writestr(name, _part(name, archive.read(name)))
    buffer.seek(0)
    return buffer


def _part(name: str, content: bytes) -> bytes:
    """The content of one part as it may be loaded."""
    part = name.partition("/")[2]
    if not MEMBERS.fullmatch(part):
        raise _Strange(f"the part {name[:80]!r}")
    if part.startswith("data/sample_inputs/"):
        torch.load(io.BytesIO(content), weights_only=True)  # raises for all but tensors
    elif part.startswith("models/"):
        return json.dumps(_words("", json.loads(content))).encode()
    elif part.endswith("_config.json"):
        found = _words("", json.loads(content))
        if any(entry["use_pickle"] for entry in found["config"].values()):
            raise _Strange(f"pickled tensors ({part})")
        return json.dumps(found).encode()
    return content


def _words(key: str, value: Any) -> Any:
    """A value of an archive's JSON, by its key, without notes. Raises `_Strange` for what no graph of ours has."""
    if isinstance(value, dict):
        target = value.get("target")
        if isinstance(target, str) and not OPERATORS.fullmatch(target):
            raise _Strange(f"the operator {target[:80]}")
        for name in value:
            _check_word("", name)
        return {name: {} if name == "metadata" else _words(name, part) for name, part in value.items()}
    if isinstance(value, list):
        return [_words(key, part) for part in value]
    if isinstance(value, str):
        _check_word(key, value)
    return value


def _check_word(key: str, word: str) -> None:
    if not WORDS.get(key, NAME).fullmatch(word):
        raise _Strange(f"the {'size' if key == 'expr_str' else 'name'} {word[:80]!r}")


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
