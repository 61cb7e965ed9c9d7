"""What all schemas have in common: unknown keys and wrong types are errors, and nothing changes once it is read."""

from __future__ import annotations

from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, WrapSerializer

Item = TypeVar("Item")
# A list in YAML, in records and in `model_dump()`, and a tuple in Python, so that configurations are hashable. Only the
# list itself is not strict: its items keep their types.
ListOf = Annotated[tuple[Item, ...], Field(strict=False), WrapSerializer(lambda items, dump: list(dump(items)))]


class Strict(BaseModel):
    """A frozen, hashable mapping whose keys are all known; values keep their types."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    def __hash__(self) -> int:
        return hash(_hashable(self.__dict__))


def _hashable(value: Any) -> Any:
    """Stands for a value that may hold free mappings and lists; equal values stay equal."""
    if isinstance(value, dict):
        return frozenset((key, _hashable(each)) for key, each in value.items())
    return tuple(map(_hashable, value)) if isinstance(value, (list, tuple)) else value
