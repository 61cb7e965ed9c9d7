"""Names of models: entries of ours, and models of other libraries behind a prefix that says whose they are.

`timm:NAME` is one of timm's vision transformers, with or without a tag. `hf:REPO` is a repository of transformers on
the Hugging Face hub, `hf:FOLDER` the same as a folder, `local-dir:FOLDER` a folder as timm writes it, of one of its
models or of an entry of ours. `open_clip:CONFIG.json` is a file in open_clip's own format, `open_clip:NAME` a config
that open_clip knows, `open_clip:NAME/TAG` the same with weights that open_clip knows. None of them is imported here.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

from patchrank.io import content_id, read_bytes, resolve
from patchrank.utils.errors import UserError, one_line

OPEN_CLIP, TIMM, HF, LOCAL = PREFIXES = "open_clip:", "timm:", "hf:", "local-dir:"
FORMS = "open_clip:CONFIG.json, open_clip:NAME or open_clip:NAME/TAG"
OTHERS = f"timm:NAME, hf:REPO_OR_FOLDER, local-dir:FOLDER, {FORMS}"
NEEDED = ("embed_dim", "vision_cfg", "text_cfg")  # keys of every config of open_clip
REPO = re.compile(r"(\w[\w.-]*/)?\w[\w.-]*(@[\w./-]+)?")  # of the hub: owner/name or name, perhaps with a revision
SHOWN = 8  # characters of a config's fingerprint in a name
STABLE = re.compile(rf"[^/\\]+@[0-9a-f]{{{SHOWN}}}")  # behind its prefix, what `stable_name` calls a folder
CONFIG, IMAGES, PROCESSOR = "config.json", "preprocessor_config.json", "processor_config.json"
WRITERS = ("transformers_version", "_name_or_path")  # keys of a config that only tell who wrote it
# Files of a folder that decide, beside its weights, what embeddings are; of tokenizers those that any of them has
JSON_FILES = (CONFIG, IMAGES, PROCESSOR)
TEXT_FILES = ("tokenizer.json", "vocab.json", "merges.txt", "vocab.txt", "spiece.model", "tokenizer.model")


def prefix_of(name: object) -> str:
    """The prefix of a name, such as `timm:`, that says whose model it is; "" for entries of ours and all else."""
    return next((prefix for prefix in PREFIXES if isinstance(name, str) and name.startswith(prefix)), "")


def is_open_clip(name: object) -> bool:
    """Whether a name means a model of open_clip's."""
    return prefix_of(name) == OPEN_CLIP


def config_file(name: str) -> str | None:
    """The path or URL of the config that a name holds; None for all but models of open_clip by their config's file."""
    stated = name.removeprefix(OPEN_CLIP)
    return stated if is_open_clip(name) and stated.lower().endswith(".json") else None


def folder_of(name: str) -> str | None:
    """The path of the folder that a name holds; None for a repository of the hub, and for all other kinds of names.

    `hf:` is followed by a folder if there is one of that name, or if no repository could be called so.
    """
    prefix = prefix_of(name)
    stated = name.removeprefix(prefix)
    if prefix == LOCAL:
        return stated
    is_folder = prefix == HF and stated and (Path(stated).expanduser().is_dir() or not REPO.fullmatch(stated))
    return stated if is_folder else None


def local_folder(name: str) -> Path:
    """The folder that a name holds, for which `folder_of` is not None. Raises `UserError` where it is not there."""
    stated = folder_of(name)
    if "://" in stated:
        raise UserError(f"model {name}: must be a folder of this machine; try to copy it here")
    folder = Path(resolve(stated))
    if not stated or not folder.is_dir():
        raise UserError(f"model {name}: there is no such folder; try {prefix_of(name)}FOLDER with one that is there")
    return folder


def with_absolute_path(name: str) -> str:
    """The name, with the path that it holds made absolute, if it holds one: workers may run in another folder."""
    place = config_file(name) or folder_of(name)
    return name if not place else f"{prefix_of(name)}{resolve(place)}"


def stable_name(name: str) -> str:
    """What results, shards, predictors and prompts call a model, and what ids are made of.

    A file or folder is called by its stem and by the fingerprint of what it says beside its weights,
    `open_clip:cifar10-clip@1a2b3c4d`: it may lie anywhere, and one that says something else has another name. All other
    names stay as they are.

    Raises:
        UserError: the config cannot be read.
    """
    if (stated := folder_of(name)) is not None:
        if STABLE.fullmatch(stated) and not Path(stated).exists():
            return name
        folder = local_folder(name)
        return f"{prefix_of(name)}{folder.name}@{_folder_id(name, folder)[:SHOWN]}"
    file = config_file(name)
    if file is None:
        return name
    stem = file.replace("\\", "/").rpartition("/")[2].rpartition(".")[0]
    return f"{OPEN_CLIP}{stem}@{content_id(read_config(file))[:SHOWN]}"


def _folder_id(name: str, folder: Path) -> str:
    """Names a folder by its settings of model, images and text, without what only tells who wrote it."""
    found: dict[str, object] = {CONFIG: read_settings(folder / CONFIG, f"model {name}")}
    for file in JSON_FILES[1:]:
        if (folder / file).is_file():
            found[file] = read_settings(folder / file, f"model {name}")
    for file in TEXT_FILES:
        if (folder / file).is_file():
            found[file] = hashlib.sha256(read_bytes(folder / file)).hexdigest()
    found[CONFIG] = {key: value for key, value in found[CONFIG].items() if key not in WRITERS}
    return content_id(found)


def read_config(file: str) -> dict[str, dict]:
    """`model_cfg` and `preprocess_cfg` ({} where it has none) of a config in open_clip's format.

    The file holds the model's settings alone, or both by these keys, as open_clip writes it to hubs.

    Raises:
        UserError: the file is missing, unreadable, not JSON, or no config of open_clip.
    """
    source = f"model {OPEN_CLIP}{file}"
    found = _parsed(file, source)
    parts = found if isinstance(found, dict) and "model_cfg" in found else {"model_cfg": found}
    model, images = parts["model_cfg"], parts.get("preprocess_cfg") or {}
    lacking = [key for key in NEEDED if not isinstance(model, dict) or key not in model]
    if lacking:
        needed = f"{', '.join(NEEDED)}, but {lacking[0]!r} is missing"
        raise UserError(f"{source}: is no config of open_clip, which has {needed}; try a file of its model_configs")
    if not isinstance(images, dict):
        raise UserError(f"{source}: preprocess_cfg must hold a mapping, but holds {type(images).__name__}")
    return {"model_cfg": model, "preprocess_cfg": images}


def read_settings(file: Path, source: str) -> dict:
    """The mapping in a JSON file of a model's folder. Raises `UserError`, which begins with `source`, if it is none."""
    found = _parsed(str(file), f"{source}: {file.name}")
    if not isinstance(found, dict):
        raise UserError(f"{source}: {file.name} must hold a mapping, but holds {type(found).__name__}")
    return found


def _parsed(file: str, source: str) -> object:
    """What is in a JSON file."""
    try:
        return json.loads(read_bytes(resolve(file)))
    except FileNotFoundError as error:
        raise UserError(f"{source}: there is no such file") from error
    except UserError:  # of a store that fails, or a URL with credentials
        raise
    except OSError as error:
        raise UserError(f"{source}: cannot be read ({error.strerror or one_line(error)})") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{source}: is not JSON ({one_line(error)[:160]})") from error
