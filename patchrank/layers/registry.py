"""Components by name: what YAML says is the name under which a class was registered."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from torch import nn

from patchrank.utils.errors import UserError, near

Class = TypeVar("Class", bound=type[nn.Module])


class Registry(dict[str, type[nn.Module]]):
    """Module classes of one kind by name.

    kind: what messages call them, such as "predictor".
    always: names of the arguments that every class of this kind is given, which messages do not list as settings.
    """

    def __init__(self, kind: str, always: Sequence[str] = ()):
        super().__init__()
        self.kind, self.always = kind, always

    def register(self, name: str) -> Callable[[Class], Class]:
        """A decorator that files a class under `name`, in place of any other of that name."""

        def decorate(cls: Class) -> Class:
            self[name] = cls
            return cls

        return decorate

    def find(self, name: str) -> type[nn.Module]:
        """The class of that name. Raises `UserError` where there is none."""
        if name not in self:
            raise UserError(f"{self.kind} {name!r} is not registered; {near(name, self)}")
        return self[name]

    def create(self, name: str, **settings: Any) -> Any:
        """Builds a module of the class `name`. Raises `UserError` for an unknown name, or a setting that it lacks."""
        kind = self.find(name)
        try:
            inspect.signature(kind).bind(**settings)
        except TypeError as error:
            known = [key for key in inspect.signature(kind).parameters if key not in self.always]
            raise UserError(f"{self.kind} {name!r} {error}; its settings: {', '.join(known) or 'none'}") from error
        return kind(**settings)

    def name_of(self, module: nn.Module) -> str:
        """The name of a module's class. Raises `UserError` where the class is not registered."""
        for name, kind in self.items():
            if type(module) is kind:
                return name
        raise UserError(
            f"{self.kind} of class {type(module).__name__} is not registered: register_{self.kind} makes it so"
        )
