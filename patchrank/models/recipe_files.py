"""A recipe: a folder that says how one model is pruned, with the predictor and the repair that belong to it.

`recipe.json` names the model, the settings and the files beside it. Nothing outside of the folder is read.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from patchrank.config.validation import validate
from patchrank.io import exists, join, read_text, write_atomic
from patchrank.models.pruning_cfg import Pruning
from patchrank.utils.errors import UserError, near, one_line
from patchrank.utils.plain import plain

NAME, KIND, SCHEMA = "recipe.json", "recipe", 1
FILES = {"predictor": "predictor_path", "repair": "repair_path"}  # keys of files, by the settings that take them
FIELDS = tuple(
    name for name in Pruning.model_fields if name not in ("cls_only_last", "predictor_init", *FILES.values())
)
KEYS = ("schema", "kind", "model", "pruning", *FILES)
SCHEDULE = ("keep_rate", "budget", "drop_counts")  # ways to say how many tokens leave, of which one beats the others


class Recipe(NamedTuple):
    """What a recipe says.

    name, sha256: of the model that it was made for, and of its weights without the head.
    pruning: all fields of `FIELDS`, at their defaults where it says nothing.
    files: paths by the settings `predictor_path` and `repair_path`; None for one that there is not.
    source: how messages name it.
    img_size: height and width in pixels of the images that it was made with; None where it does not say.
    """

    name: str
    sha256: str
    pruning: dict
    files: dict[str, str | None]
    source: str
    img_size: tuple[int, int] | None = None

    def settings(self, given: Mapping[str, object], has_predictor: bool) -> dict:
        """Settings for `set_pruning`: what is given wins.

        Args:
            given: settings of the caller; one on how many tokens leave takes the place of all that the recipe says of
                it.
            has_predictor: whether the caller also hands over a predictor, in place of the file.
        """
        found = self.pruning | self.files | {"predictor_init": None}
        if any(given.get(name) is not None for name in SCHEDULE):
            found |= {name: Pruning.model_fields[name].default for name in SCHEDULE}
        if has_predictor:
            found = {name: value for name, value in found.items() if name not in ("predictor_path", "predictor_init")}
        return found | dict(given)


def read_recipe(folder: str | Path) -> Recipe:
    """The recipe in a folder, or at a URL.

    Raises:
        UserError: there is none, it is no recipe, it names settings that do not exist or files outside the folder, or
            its images' size is none.
    """
    path = join(folder, NAME)
    if not exists(path):
        raise UserError(f"{folder}: holds no {NAME}; try a folder that python -m patchrank.recipe wrote")
    found = _parse(read_text(path), path)
    model, pruning = found["model"], found["pruning"]
    if not isinstance(model, dict) or not all(isinstance(model.get(key), str) for key in ("name", "sha256")):
        raise UserError(f"{path}: model must hold a name and a sha256, but is {model!r:.80}")
    settings = _checked(pruning, f"{path}: pruning")
    files = {setting: _file(found[key], key, folder, path) for key, setting in FILES.items()}
    img_size = _img_size(found.get("img_size"), path)
    return Recipe(model["name"], model["sha256"], settings, files, f"recipe {path}", img_size)


def write_recipe(
    folder: str | Path,
    model: Mapping[str, str],
    pruning: Mapping[str, object],
    predictor: str | None = None,
    repair: str | None = None,
    **about: object,
) -> None:
    """Writes `recipe.json`, whole or not at all.

    Args:
        model: `name` and `sha256` of the weights without the head (`tower.blocks_sha256()`).
        pruning: fields of `FIELDS`; others of `Pruning` say nothing of a recipe, and are left out.
        predictor, repair: names of files in the folder.
        **about: what else a reader may like to know, as plain values. `img_size`, height and width of the images in
            pixels, is read again.

    Raises:
        UserError: settings that do not exist, a file outside of the folder, or an impossible size.
    """
    path = join(folder, NAME)
    left = {name: plain(value) for name, value in pruning.items() if name not in {*Pruning.model_fields} - {*FIELDS}}
    _checked(left, f"{path}: pruning")
    for key, name in (("predictor", predictor), ("repair", repair)):
        _file(name, key, folder, path)
    _img_size(about.get("img_size"), path)
    content = about | {"schema": SCHEMA, "kind": KIND, "model": dict(model), "pruning": left}
    content |= {"predictor": predictor, "repair": repair}
    write_atomic(path, json.dumps(content, indent=1) + "\n")


def _parse(text: str, path: str) -> dict:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: is not JSON ({one_line(error)[:160]})") from error
    if not isinstance(found, dict) or found.get("kind") != KIND:
        raise UserError(f"{path}: is no recipe; try a folder that python -m patchrank.recipe wrote")
    if found.get("schema") != SCHEMA:
        raise UserError(
            f"{path}: has schema {found.get('schema')!r}, but this version reads {SCHEMA}; try to make it anew"
        )
    lacking = [key for key in KEYS if key not in found]
    if lacking:
        raise UserError(f"{path}: lacks {lacking[0]!r}; a recipe has {', '.join(KEYS)}")
    return found


def _checked(pruning: object, where: str) -> dict:
    """All settings of a recipe's pruning, as plain values. Raises `UserError` for one that it cannot have."""
    for name in pruning if isinstance(pruning, dict) else ():
        if name not in FIELDS:
            raise UserError(f"{where}: key {name!r} does not exist; {near(name, FIELDS)}")
    settings = validate(Pruning, pruning, where)
    return {name: getattr(settings, name) for name in FIELDS}


def _file(name: object, key: str, folder: str | Path, path: str) -> str | None:
    """The path of a file in the folder. Raises `UserError` for a name that leads elsewhere."""
    if name is None:
        return None
    if not isinstance(name, str) or name in ("", ".", "..") or any(sign in name for sign in "/\\:\0"):
        raise UserError(f"{path}: {key} must name a file in the same folder, without a path, but is {name!r:.80}")
    return join(folder, name)


def _img_size(size: object, path: str) -> tuple[int, int] | None:
    """Height and width in pixels, if a recipe says them. Raises `UserError` for anything else."""
    if size is None:
        return None
    size = plain(size)
    if not isinstance(size, list | tuple) or len(size) != 2 or any(type(side) is not int or side < 1 for side in size):
        raise UserError(f"{path}: img_size must be height and width in pixels, such as [224, 224], but is {size!r:.80}")
    return tuple(size)
