"""What all schemas have in common: unknown keys and wrong types are errors, and nothing changes once it is read."""

from __future__ import annotations

from typing import Annotated, Any, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapSerializer,
    WrapValidator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from patchrank.utils.plain import plain


def _ordered(value: Any) -> Any:
    """Refuses what has no order of its own, which YAML may write as `!!set`."""
    if isinstance(value, (set, frozenset)):
        raise PydanticCustomError("no_list", "should be a list, whose items have an order; try [a, b]")
    return value


Item = TypeVar("Item")
# A list in YAML, in records and in `model_dump()`, and a tuple in Python, so that configurations are hashable. Only the
# list itself is not strict: its items keep their types.
ListOf = Annotated[
    tuple[Item, ...],
    Field(strict=False),
    BeforeValidator(_ordered),
    WrapSerializer(lambda items, dump: list(dump(items))),
]


def _share(value: Any, read: ValidatorFunctionWrapHandler) -> float:
    """One rule in place of several, of which NaN or a truth value would break one that says little."""
    try:
        return read(value)
    except ValidationError as error:
        raise PydanticCustomError("share", "should be a number above 0 and at most 1") from error


Share = Annotated[float, Field(gt=0, le=1), WrapValidator(_share)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]  # what torch, NumPy and Optuna all take


class Strict(BaseModel):
    """A frozen, hashable mapping whose keys are all known; values keep their types, and numbers are finite."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _plain(cls, values: Any) -> Any:
        """NumPy's and torch's numbers count as the plain ones that they are."""
        return {key: plain(value) for key, value in values.items()} if isinstance(values, dict) else values

    def __hash__(self) -> int:
        return hash(_hashable(self.__dict__))


def _hashable(value: Any) -> Any:
    """Stands for a value that may hold free mappings and lists; equal values stay equal."""
    if isinstance(value, dict):
        return frozenset((key, _hashable(each)) for key, each in value.items())
    return tuple(map(_hashable, value)) if isinstance(value, (list, tuple)) else value
