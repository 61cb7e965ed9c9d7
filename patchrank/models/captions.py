"""From class names and templates to captions, as people hand them over; and sets of templates by name."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from typing import Any

from patchrank.utils.errors import UserError, near

Template = str | Callable[[str], str]  # "a photo of a {}.", or open_clip's `lambda c: f"a photo of a {c}."`


def check_texts(texts: str | Iterable[str]) -> list[str]:
    """Several texts, or one, as a list.

    Raises:
        UserError: none at all, something that has no order, or what is no text.
    """
    found = [texts] if isinstance(texts, str) else list(_several(texts, "texts", "['a cat', 'a dog']"))
    for n, text in enumerate(found):
        if not isinstance(text, str):
            raise UserError(f"texts: the one at place {n} is {str(text)[:80]!r}, and must be text")
    return found


def check_classes(classes: Iterable[str]) -> tuple[str, ...]:
    """Names of classes in their order; several may be alike, as in ImageNet.

    Raises:
        UserError: one name instead of a list, none at all, something that has no order, or what is no name.
    """
    names = _several(classes, "classes", "['cat', 'dog']")
    for n, name in enumerate(names):
        if not isinstance(name, str) or not name.strip():
            raise UserError(f"classes: the one at place {n} is {name!r}, and must be a name, as in ['cat', 'dog']")
    return names


def check_templates(templates: Iterable[Template]) -> tuple[Template, ...]:
    """Templates: sentences with one `{}` for a name, or functions from a name to a sentence.

    Raises:
        UserError: one template instead of a list, none at all, or one without exactly one place for a name.
    """
    found = _several(templates, "templates", "['a photo of a {}.']")
    for n, template in enumerate(found):
        if isinstance(template, str):
            is_sound = template.count("{}") == template.count("{") == template.count("}") == 1
        else:
            is_sound = callable(template) and not isinstance(template, type)
        if not is_sound:
            rule = "must have one place for the class name, {}, and no other braces; try 'a photo of a {}.'"
            raise UserError(f"templates: the one at place {n} is {template!r}, but {rule}")
    return found


def fill(template: Template, classes: Sequence[str]) -> tuple[str, ...]:
    """A template's captions, one for each class. Underscores of names are spaces.

    Raises:
        UserError: a function that gives something else than text.
    """
    names = [name.replace("_", " ") for name in classes]
    texts = tuple(template.format(name) if isinstance(template, str) else template(name) for name in names)
    for name, text in zip(names, texts):
        if not isinstance(text, str):
            raise UserError(f"templates: {template!r} gives {text!r} for {name!r}, and must give a sentence")
    return texts


def template_set(name: str | None) -> tuple[str, ...] | None:
    """Prompts with one place for the class name: OpenAI's 80 for ImageNet, the 7 that do best there, or the plain one.

    None stands for each task's own, and gives None.

    Raises:
        UserError: an unknown name.
    """
    if name is None:
        return None
    if name == "plain":
        return ("a photo of a {}.",)
    if name not in ("openai7", "openai80"):
        raise UserError(f"templates {name!r} do not exist; {near(name, ('plain', 'openai7', 'openai80'))}")
    from open_clip.zero_shot_metadata import OPENAI_IMAGENET_TEMPLATES, SIMPLE_IMAGENET_TEMPLATES

    chosen = OPENAI_IMAGENET_TEMPLATES if name == "openai80" else SIMPLE_IMAGENET_TEMPLATES
    return tuple(template("{}") for template in chosen)


def _several(given: Any, what: str, example: str) -> tuple:
    """What can be iterated over in an order of its own, as a tuple."""
    try:
        found = None if isinstance(given, str | bytes | Mapping | Set) else tuple(given)
    except TypeError:
        found = None
    if found is None:
        raise UserError(f"{what} must be a list, as in {example}, but is {str(given)[:80]!r} ({type(given).__name__})")
    if not found:
        raise UserError(f"{what} must hold one or more, as in {example}, but there are none")
    return found
