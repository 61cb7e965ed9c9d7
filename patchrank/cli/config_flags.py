"""Flags made from the fields of the schemas in `config/`: their type, choices, default and description."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from types import UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from patchrank.config import Strict, rule_of, validate

Config = TypeVar("Config", bound=Strict)


def add_config_flags(parser: argparse.ArgumentParser, schema: type[Strict], *fields: str, **renamed: str) -> None:
    """Adds a flag for each field that is named: `--keep-rate` for "keep_rate", `--model` for `model="name"`."""
    flags = {name: flag for flag, name in renamed.items()} | {name: name for name in fields}
    for name, flag in flags.items():
        parser.add_argument(f"--{flag.replace('_', '-')}", **_argument(schema.model_fields[name]))
    others = parser.get_default(schema.__name__) or {}
    parser.set_defaults(**{schema.__name__: others | flags})  # for `read_config`


def read_config(args: argparse.Namespace, schema: type[Config]) -> Config:
    """What the flags say that `add_config_flags` made for a schema; fields without a flag have their defaults.

    Raises:
        UserError: values that do not fit each other.
    """
    flags = getattr(args, schema.__name__)
    return validate(schema, {name: getattr(args, flag) for name, flag in flags.items()}, "flags")


def reader(kind: Any) -> Callable[[str], Any]:
    """What makes a value of a type from a flag's text, for argparse, which tells what does not fit in one line."""
    adapter = TypeAdapter(kind, config=ConfigDict(allow_inf_nan=False))

    def read(text: str) -> Any:
        try:
            found = adapter.validate_python(text)
        except ValidationError as error:
            raise argparse.ArgumentTypeError(f"{rule_of(error)}, but is {text!r}") from error
        if isinstance(found, int) and found.bit_length() > 63:  # which neither torch nor NumPy could take
            raise argparse.ArgumentTypeError(f"should be a number of at most 63 bits, but is {text[:80]!r}")
        return found

    return read


positive = reader(Annotated[int, Field(ge=1)])
thread_count = reader(Annotated[int, Field(ge=1, le=4096)])
positive_float = reader(Annotated[float, Field(gt=0)])


def several(read: Callable[[str], Any]) -> Callable[[str], list]:
    """A reader of values that stand between commas, for argparse; a value that stands there twice counts once."""
    return lambda text: list(dict.fromkeys(read(part) for part in text.split(",")))


def _argument(field: FieldInfo) -> dict[str, Any]:
    """What argparse is to know of a field; where several types may stand, a flag takes the first."""
    kind, default = field.annotation, field.default
    if get_origin(kind) in (Union, UnionType):
        kind = get_args(kind)[0]
    if get_origin(kind) is Annotated and get_origin(get_args(kind)[0]) is tuple:
        kind = get_args(kind)[0]
    told, shown = (field.description or "").replace("%", "%%"), default
    if isinstance(default, tuple):
        shown = " ".join(map(str, default))
    if default is not None and default is not False and default != ():
        told += f" (default: {str(shown).removesuffix('.0')})"
    made = {"default": default, "help": told}
    if kind is bool:
        return made | {"action": "store_true" if default is False else argparse.BooleanOptionalAction}
    if get_origin(kind) is tuple:
        kind, field = get_args(kind)[0], Field()
        made["nargs"] = "*" if default == () else "+"
    if get_origin(kind) is Literal:
        return made | {"choices": get_args(kind)}
    return made | {"type": reader(Annotated[kind, field])}
