"""Class names and prompt templates from a vocabulary file (YAML)."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

from pydantic import Field

from patchrank.config import ListOf, Strict, validate
from patchrank.data.image_split import ImageSplit
from patchrank.io import nfc
from patchrank.io.yaml import read_yaml
from patchrank.utils.errors import UserError, near


class _File(Strict):
    classes: ListOf[Any] | dict[str | int, Any] | None = Field(None, min_length=1)
    templates: ListOf[str] | None = Field(None, min_length=1)


@dataclass(frozen=True)
class Vocabulary:
    """The content of a vocabulary file.

    classes: all names in label order, or a mapping from some classes to their new names; None: the data's own names.
    templates: sentences with `{}` for a name; None: the data's own.
    """

    path: str
    classes: tuple[str, ...] | dict[str, str] | None
    templates: tuple[str, ...] | None

    def apply(self, split: ImageSplit) -> ImageSplit:
        """The split with these names and templates in place of its own.

        A list must have as many names as there are classes, or gives classes to data that has none. A mapping renames
        some classes, whose names it may have in another of Unicode's normal forms; where labels are numbers without
        names, it names all numbers from 0 on. Two classes may have the same name, as in ImageNet, though no text can
        tell them apart.

        Raises:
            UserError: names that do not fit the split.
        """
        if self.templates is not None:
            split = replace(split, templates=self.templates)
        if self.classes is None:
            return split
        if not split.classes:
            return replace(split, classes=self._of_numbers(split))
        if isinstance(self.classes, tuple):
            if len(split.classes) != len(self.classes):
                raise UserError(
                    f"{self.path}: classes: holds {len(self.classes)} names, but {split.task} has "
                    f"{len(split.classes)} classes, from {split.classes[0]!r} to {split.classes[-1]!r}"
                )
            return replace(split, classes=self.classes)
        known = {nfc(name) for name in split.classes}
        for key in self.classes:
            if nfc(key) not in known:
                raise UserError(
                    f"{self.path}: classes.{key}: {split.task} has no such class; {near(key, split.classes)}"
                )
        names = {nfc(key): name for key, name in self.classes.items()}
        return replace(split, classes=tuple(names.get(nfc(name), name) for name in split.classes))

    def _of_numbers(self, split: ImageSplit) -> tuple[str, ...]:
        """Names for data whose labels are numbers, or that has no labels: a list, or a mapping from "0", "1", ..."""
        names = self.classes
        if isinstance(names, dict):
            if split.labels is None:
                raise UserError(
                    f"{self.path}: classes: is a mapping, but {split.task} has no classes to rename; try a list"
                )
            numbers = [str(number) for number in range(len(names))]
            for number in numbers:
                if number not in names:
                    raise UserError(
                        f"{self.path}: classes.{number}: is missing; numbered labels need every name from 0 on"
                    )
            names = tuple(names[number] for number in numbers)
        worst = max(split.labels or [0])
        if worst >= len(names):
            first = split.ids[split.labels.index(worst)]
            raise UserError(f"{self.path}: classes: holds {len(names)} names, but the label of {first} is {worst}")
        return names


def read_vocabulary(path: str) -> Vocabulary:
    """A vocabulary file: `classes` (a list, or a mapping from folder or label to the name shown) and `templates`.

    Raises:
        UserError: no such file, no mapping, an unknown key, an empty name, or a template without exactly one `{}`.
    """
    file = validate(_File, read_yaml(path), path)
    named = file.classes if isinstance(file.classes, dict) else dict(enumerate(file.classes or ()))
    for key, name in named.items():
        if not isinstance(name, str) or not name.strip():
            raise UserError(f"{path}: classes.{key} is {name!r}, but must be a name, in quotes where it is a number")
    for n, template in enumerate(file.templates or ()):
        if template.count("{}") != 1 or set("{}") & set(template.replace("{}", "")):
            raise UserError(
                f"{path}: templates.{n} is {template!r}, but must hold exactly one {{}} and no other braces"
            )
    twice = [str(key) for key, many in Counter(nfc(str(key)) for key in named).items() if many > 1]
    if twice:
        raise UserError(f"{path}: classes.{twice[0]}: stands twice, written in two ways; remove one")
    classes = {str(key): name for key, name in named.items()} if isinstance(file.classes, dict) else file.classes
    return Vocabulary(path, classes, file.templates)
