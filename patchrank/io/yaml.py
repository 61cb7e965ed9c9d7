"""YAML without its traps: `1e-3` is a number, `on` and `no` are words, and no key may stand twice."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from patchrank.io import read_text
from patchrank.utils.errors import UserError

_BOOL, _FLOAT = "tag:yaml.org,2002:bool", "tag:yaml.org,2002:float"
_NUMBER = r"[0-9]+\.[0-9]*(?:[eE][-+]?[0-9]+)?|\.[0-9]+(?:[eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+|\.(?:inf|nan)"


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in rules if tag not in (_BOOL, _FLOAT)]
        for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for n, (key_node, _) in enumerate(node.value):
            if keys[n] in keys[:n]:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {keys[n]!r} stands twice", key_node.start_mark
                )
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(_BOOL, re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF"))
_Loader.add_implicit_resolver(_FLOAT, re.compile(rf"^[-+]?(?:{_NUMBER})$"), list("-+0123456789."))


def parse_yaml(text: str, where: str) -> Any:
    """YAML text as plain values. Raises `UserError` with file, line and reason."""
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        reason = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise UserError(f"{where}{line}: not readable as YAML ({reason})") from error


def read_yaml(path: str | Path) -> Any:
    """A YAML file, local or behind a URL, as plain values. Raises `UserError` that names it, and the line."""
    return parse_yaml(read_text(path), str(path))
