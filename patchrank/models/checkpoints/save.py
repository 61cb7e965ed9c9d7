"""A tower as a local directory, from which `timm.create_model("local-dir:...", pretrained=True)` makes it again."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors.torch import save_file
from torch import nn

from patchrank.layers.predictors import create_predictor, name_and_settings
from patchrank.models.pruned_vit import PrunedVisionTransformer
from patchrank.utils.errors import UserError, one_line
from patchrank.utils.private_names import save_config_for_hf

CONFIG, WEIGHTS = "config.json", "model.safetensors"


def save_pretrained(model: nn.Module, directory: str | Path) -> None:
    """Writes an image tower with its predictor's weights and all pruning settings, whole or not at all.

    An unpruned tower is written without a predictor: `predictor_path` names a file of this machine. Prompts have a
    file of their own and are not written. A directory that holds an earlier tower is replaced.

    Args:
        model: made by `timm.create_model`.
        directory: local; `config.json` and `model.safetensors` will be all that is in it.

    Raises:
        UserError: another kind of model, one with arguments that JSON cannot hold, a predictor that cannot be made
            again by name, or a directory that holds other files or cannot be written to.
    """
    if not is_entry(model):
        raise UserError(
            f"save_pretrained takes a tower that timm.create_model made from a patchrank entry, but got a "
            f"{type(model).__name__}"
        )
    model.check_predictor()
    target = find_target(directory)
    if model.num_prompt_tokens:
        raise UserError(
            "prompts are no part of a tower that is saved: set_prompts(None) first; they stay in a file of their own, "
            "for prompts_path"
        )
    if model.repair is not None:
        raise UserError(
            "a repair is no part of a tower that is saved: set_pruning(repair_path=None) first; it stays in a file of "
            "its own, for repair_path"
        )
    settings = dict(model.pruning) | {"repair_path": None}
    settings |= {"predictor_path": None, "predictor_init": _record(model), "prompts_path": None}
    tensors = {key: value.detach().cpu().contiguous() for key, value in model.state_dict().items()}
    with staged_directory(target) as staged:
        save_file(tensors, staged / WEIGHTS, metadata={"format": "pt"})
        try:
            save_config_for_hf(model, staged / CONFIG, model_args=settings)
        except ValueError as error:  # timm's word for an argument that JSON cannot hold
            raise UserError(f"this tower cannot be saved: {error}") from error
        os.chmod(staged / WEIGHTS, 0o644)


def is_entry(model: nn.Module) -> bool:
    """Whether `timm.create_model` made a tower from an entry of ours, and can make it again."""
    return type(model) is PrunedVisionTransformer and hasattr(model, "pretrained_cfg")


@contextmanager
def staged_directory(target: Path) -> Iterator[Path]:
    """An empty directory to write to, which takes the place of `target` if the block ends without an error.

    Raises:
        UserError: what the file system raised; `target` is then as it was.
    """
    folder = target.parent / f".writing-{uuid.uuid4().hex}"
    new, old = folder / "new", folder / "old"
    try:
        new.mkdir(parents=True)
        yield new
        if target.exists():
            os.rename(target, old)
        os.rename(new, target)
    except OSError as error:
        raise UserError(f"cannot write {target}: {error.strerror or error}") from error
    finally:
        if old.exists() and not target.exists():
            os.rename(old, target)
        shutil.rmtree(folder, ignore_errors=True)


def find_target(directory: str | Path, names: Collection[str] = (CONFIG, WEIGHTS)) -> Path:
    """The path of a directory that may be written, and replaced if it exists.

    Args:
        names: the files that it may hold already.

    Raises:
        UserError: a URL, a file, a link, or a directory that holds other files.
    """
    if "://" in str(directory):
        raise UserError(f"cannot write {directory}: a tower is saved to a local directory")
    try:
        target = Path(directory).expanduser().absolute()
        target.lstat()  # raises for a NUL, which `exists` takes for a name that is free
    except (FileNotFoundError, NotADirectoryError):  # nothing is there; whether it can be made is seen when it is
        return target
    except (OSError, TypeError, RuntimeError, ValueError) as error:  # too long, no path, no such user, a NUL
        raise UserError(f"cannot write {directory!r}: it can be no directory ({one_line(error)})") from error
    if target.is_symlink() or not target.is_dir():
        raise UserError(f"cannot write {directory}: it exists and is no directory of its own")
    others = sorted({entry.name for entry in target.iterdir()} - set(names))
    if others:
        raise UserError(f"cannot write {directory}: it holds other files, such as {others[0]!r}; name a new directory")
    return target


def _record(model: PrunedVisionTransformer) -> dict | None:
    """What `Pruning.predictor_init` needs to build the predictor in use again; None where there is no predictor."""
    reducer = getattr(model.pruner, "reducer", None)
    if reducer is None or not reducer.fitted:
        return None
    if (about := dict(reducer.about)) and about.get("model"):  # of weights as they will be when they are loaded
        return about | {"model": about["model"] | {"sha256": model.float32_sha256()}}
    if about:
        return about
    name, kwargs = name_and_settings(reducer.predictor)
    grid, location = model.patch_embed.grid_size, model.pruning.locations[0]
    if _shapes(create_predictor(name, model.embed_dim, grid, **kwargs)) != _shapes(reducer.predictor):
        raise UserError(
            f"predictor {name!r} is not what its settings {kwargs} make, so it cannot be saved with a tower"
        )
    return {"name": name, "kwargs": kwargs, "grid": list(grid), "embed_dim": model.embed_dim, "location": location}


def _shapes(module: nn.Module) -> dict:
    return {key: value.shape for key, value in module.state_dict().items()}
