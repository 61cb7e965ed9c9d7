"""YAML without its traps: `1e-3` is a number, `on` and `no` are words, and no key may stand twice."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from patchrank.io import read_text
from patchrank.utils.errors import UserError

_BOOL, _FLOAT, _MERGE = (f"tag:yaml.org,2002:{name}" for name in ("bool", "float", "merge"))
_NUMBER = r"[0-9]+\.[0-9]*(?:[eE][-+]?[0-9]+)?|\.[0-9]+(?:[eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+|\.(?:inf|nan)"


MOST_VALUES = 1_000_000  # of a file, with those that an alias stands for counted each time


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in rules if tag not in (_BOOL, _FLOAT)]
        for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_document(self, node: yaml.Node) -> Any:
        if _count(node, {}) > MOST_VALUES:
            raise yaml.constructor.ConstructorError(
                None, None, f"its aliases stand for more than {MOST_VALUES:,} values", node.start_mark
            )
        return super().construct_document(node)

    def construct_scalar(self, node: yaml.ScalarNode) -> str:
        value = super().construct_scalar(node)
        value.encode()  # raises where half of a surrogate pair was escaped, which nothing could be written with
        return value

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        key_nodes = [key for key, _ in node.value if key.tag != _MERGE]  # what is merged may be written anew
        keys = [self.construct_object(key, deep=True) for key in key_nodes]
        for n, key_node in enumerate(key_nodes):
            if keys[n] in keys[:n]:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {keys[n]!r} stands twice", key_node.start_mark
                )
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(_BOOL, re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF"))
_Loader.add_implicit_resolver(_FLOAT, re.compile(rf"^[-+]?(?:{_NUMBER})$"), list("-+0123456789."))


def _count(node: yaml.Node, counts: dict[int, int]) -> int:
    """How many values a node stands for; `counts` has those of nodes that were counted already."""
    if id(node) not in counts:
        counts[id(node)] = MOST_VALUES + 1  # of a node that is met again before its end, since it holds itself
        inner = node.value if isinstance(node, yaml.CollectionNode) else ()
        parts = [part for each in inner for part in (each if isinstance(each, tuple) else (each,))]
        counts[id(node)] = 1 + sum(_count(part, counts) for part in parts)
    return counts[id(node)]


def parse_yaml(text: str, where: str) -> Any:
    """YAML text as plain values. Raises `UserError` with file, line and reason."""
    try:
        return yaml.load(text, _Loader)
    except Exception as error:  # of any kind: a date that does not exist, a tag on a wrong value, lists without end
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        reason = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise UserError(f"{where}{line}: not readable as YAML ({reason})") from error


def read_yaml(path: str | Path) -> Any:
    """A YAML file, local or behind a URL, as plain values. Raises `UserError` that names it, and the line."""
    return parse_yaml(read_text(path), str(path))
