"""Names of models: entries of ours, and open_clip's models by their configs.

`open_clip:CONFIG.json` is a file in open_clip's own format, `open_clip:NAME` a config that open_clip knows, and
`open_clip:NAME/TAG` the same with weights that open_clip knows. open_clip itself is not imported here.
"""

from __future__ import annotations

import json

from patchrank.io import content_id, read_bytes, resolve
from patchrank.utils.errors import UserError, one_line

OPEN_CLIP = "open_clip:"
FORMS = "open_clip:CONFIG.json, open_clip:NAME or open_clip:NAME/TAG"
NEEDED = ("embed_dim", "vision_cfg", "text_cfg")  # keys of every config of open_clip
SHOWN = 8  # characters of a config's fingerprint in a name


def is_open_clip(name: object) -> bool:
    """Whether a name means a model of open_clip's; others are entries of ours."""
    return isinstance(name, str) and name.startswith(OPEN_CLIP)


def config_file(name: str) -> str | None:
    """The path or URL of the config that a name holds; None for an entry of ours and a name that open_clip knows."""
    stated = name.removeprefix(OPEN_CLIP)
    return stated if is_open_clip(name) and stated.lower().endswith(".json") else None


def with_absolute_path(name: str) -> str:
    """The name, with the path of its config made absolute, if it holds one: workers may run in another folder."""
    file = config_file(name)
    return name if file is None else f"{OPEN_CLIP}{resolve(file)}"


def stable_name(name: str) -> str:
    """What results, shards, predictors and prompts call a model, and what ids are made of.

    A config's file is called by its stem and by the fingerprint of its content, `open_clip:cifar10-clip@1a2b3c4d`: it
    may lie anywhere, and a config that says something else has another name. All other names stay as they are.

    Raises:
        UserError: the config cannot be read.
    """
    file = config_file(name)
    if file is None:
        return name
    stem = file.replace("\\", "/").rpartition("/")[2].rpartition(".")[0]
    return f"{OPEN_CLIP}{stem}@{content_id(read_config(file))[:SHOWN]}"


def read_config(file: str) -> dict[str, dict]:
    """`model_cfg` and `preprocess_cfg` ({} where it has none) of a config in open_clip's format.

    The file holds the model's settings alone, or both by these keys, as open_clip writes it to hubs.

    Raises:
        UserError: the file is missing, unreadable, not JSON, or no config of open_clip.
    """
    source = f"model {OPEN_CLIP}{file}"
    try:
        found = json.loads(read_bytes(resolve(file)))
    except FileNotFoundError as error:
        raise UserError(f"{source}: there is no such file") from error
    except UserError:  # of a store that fails, or a URL with credentials
        raise
    except OSError as error:
        raise UserError(f"{source}: cannot be read ({error.strerror or one_line(error)})") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{source}: is not JSON ({one_line(error)[:160]})") from error
    parts = found if isinstance(found, dict) and "model_cfg" in found else {"model_cfg": found}
    model, images = parts["model_cfg"], parts.get("preprocess_cfg") or {}
    lacking = [key for key in NEEDED if not isinstance(model, dict) or key not in model]
    if lacking:
        needed = f"{', '.join(NEEDED)}, but {lacking[0]!r} is missing"
        raise UserError(f"{source}: is no config of open_clip, which has {needed}; try a file of its model_configs")
    if not isinstance(images, dict):
        raise UserError(f"{source}: preprocess_cfg must hold a mapping, but holds {type(images).__name__}")
    return {"model_cfg": model, "preprocess_cfg": images}
