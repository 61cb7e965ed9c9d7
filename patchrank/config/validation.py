"""Plain values against a schema, in one line for whatever does not fit it; and places inside both."""

from __future__ import annotations

from contextlib import suppress
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
    problem, place, value = error.errors()[0], (), raw
    if problem["type"] == "missing":
        return f"key {'.'.join(map(str, problem['loc']))!r} is missing"
    with suppress(KeyError, IndexError, TypeError):  # where the place ends that the user wrote
        for part in problem["loc"]:  # to which pydantic adds which allowed type it tried
            value = value[part]
            place += (part,)
    path = ".".join(map(str, place))
    if problem["type"] == "extra_forbidden":
        return f"key {path!r} does not exist; {near(str(place[-1]), known_keys(schema, place[:-1]))}"
    if problem["type"] == "value_error" and isinstance(value, dict):  # of keys that do not fit each other
        return f"{path}: {problem['ctx']['error']}".removeprefix(": ")
    return f"{path} is {value!r}, but {rule_of(error, place)}"


def rule_of(error: ValidationError, place: tuple = ()) -> str:
    """The rules that the value at a place broke, as in "should be a valid integer"."""
    rules = []
    for each in error.errors():
        if each["loc"][: len(place)] == place:  # what is a tuple to pydantic is a list in the file
            words = each["msg"].removeprefix("Input ").removeprefix("Tuple ").replace("valid tuple", "valid list")
            rules.append(words.split(" after validation")[0].split(", unable to parse")[0])
    return ", or ".join(dict.fromkeys(rules))


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
