"""Plain values against a schema, in one line for whatever does not fit it; and places inside both."""

from __future__ import annotations

from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from patchrank.config.trial import TrialConfig
from patchrank.utils.errors import UserError, near


def validate(schema: type[BaseModel], value: Any, where: str) -> Any:
    """A model from plain values. Raises `UserError`: one line with file, key, value, rule and the near alternative."""
    if not isinstance(value, dict):
        raise UserError(f"{where}: must hold a mapping of keys to values, but holds {type(value).__name__}")
    try:
        return schema.model_validate(value)
    except ValidationError as error:
        raise UserError(f"{where}: {_first_problem(schema, value, error)}") from error


def _first_problem(schema: type[BaseModel], raw: dict, error: ValidationError) -> str:
    problems = error.errors()
    loc = problems[0]["loc"]
    if problems[0]["type"] == "missing":
        return f"key {'.'.join(map(str, loc))!r} is missing"
    place, value = _written(loc, raw)
    path = ".".join(map(str, place))
    if problems[0]["type"] == "extra_forbidden":
        return f"key {path!r} does not exist; {near(str(place[-1]), known_keys(schema, place[:-1]))}"
    if problems[0]["type"] == "value_error" and isinstance(value, dict):  # of keys that do not fit each other
        return f"{path}: {problems[0]['ctx']['error']}".removeprefix(": ")
    return f"{path} is {value!r}, but {rule_of(error, place)}"


def rule_of(error: ValidationError, place: tuple = ()) -> str:
    """The rules that the value at a place broke, as in "should be a valid integer"."""
    messages = [each["msg"] for each in error.errors() if each["loc"][: len(place)] == place]
    return ", or ".join(dict.fromkeys(map(_plain, messages)))


def _plain(message: str) -> str:
    """pydantic's own words; what is a tuple to it is a list in the file."""
    message = message.removeprefix("Input ").removeprefix("Tuple ").replace("valid tuple", "valid list")
    return message.split(" after validation")[0].split(", unable to parse")[0]


def _written(loc: tuple, raw: Any) -> tuple[tuple, Any]:
    """The part of a problem's place that the user wrote, and its value; pydantic adds which allowed type it tried."""
    for n, part in enumerate(loc):
        try:
            raw = raw[part]
        except (KeyError, IndexError, TypeError):
            return loc[:n], raw
    return loc, raw


def value_at(config: dict, path: str) -> object:
    """The value at a dotted path of a trial's plain settings; None inside of a section that is null.

    A setting that is left out is at its default: records leave out those that are newer than their ids.
    """
    schema = TrialConfig
    for part in path.split("."):
        if config is None:
            return None
        if part not in config:
            return schema.model_fields[part].get_default()
        config, schema = config[part], section_at(schema, part)
    return config


def section_at(schema: type[BaseModel], key: str) -> type[BaseModel] | None:
    """The schema of the section `key`, which may also be null or a list of sections; None for another setting."""
    annotation = schema.model_fields[key].annotation if key in schema.model_fields else None
    annotation = next(iter(get_args(annotation)), annotation)
    return annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None


def known_keys(schema: type[BaseModel], path: tuple) -> list[str]:
    """The keys that may stand at a place inside a schema."""
    for part in path:
        if isinstance(part, int):  # a place in a list of mappings
            continue
        schema = section_at(schema, part)
        if schema is None:
            return []
    return [field.alias or name for name, field in schema.model_fields.items()]


def leaves(mapping: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one from dotted paths to values that are no mappings."""
    flat: dict[str, Any] = {}
    for key, value in mapping.items():
        flat |= leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
