"""Weights from a file: safetensors, torch's own formats and TorchScript archives, told apart by their content.

Pickles are read only by readers that know tensors and refuse everything else.
"""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError

from safetensors import safe_open
from safetensors.torch import load_file
from timm.models.vision_transformer import checkpoint_filter_fn as vit_checkpoint_filter_fn
from torch import Tensor, nn

from patchrank.io import local_copy
from patchrank.io.tensor_file import KEY
from patchrank.models.checkpoints.families import naming_family
from patchrank.models.checkpoints.filter import check_keys, tower_weights, with_predictor
from patchrank.models.checkpoints.key_maps import to_pair
from patchrank.models.checkpoints.pickled import load_pickled
from patchrank.models.checkpoints.sharded import Part, find_parts
from patchrank.models.checkpoints.torchscript import read_archive
from patchrank.models.checkpoints.unwrap import unwrap
from patchrank.utils.errors import UserError

MAX_HEADER = 100_000_000  # bytes, of a safetensors file by its specification
MAX_REASON = 160  # characters
TORCH_SAVE = b"\x8a\n"  # after a pickle's protocol: a number of ten bytes, by which torch knows its own files
SAVE_ALONE = "try torch.save(model.state_dict(), FILE) or torch.save(checkpoint['state_dict'], FILE) where it was made"
HINTS = {  # by a file's first bytes
    b"\x80": f"a pickle that torch.save did not write, and none of it was run; {SAVE_ALONE}",
    b"PK": "a zip archive that torch.save did not write; try the file of weights in it",
    b"version https://": "a pointer of Git LFS; try git lfs pull",
    b"GGUF": "a GGUF file; try the file that it was made from",
    b"\x89HDF": "an HDF5 file, such as Keras writes; try the weights for PyTorch",
    b"<": "a web page; try to download the file again",
    b"{": "a JSON file; try the file of weights beside it",
}
OURS = {"predictor": "--predictor or predictor_path=", "prompts": "--prompts or prompts="}  # by the kind of a file


def read_checkpoint(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a file by name, on the CPU and in the precision in which they were written.

    Formats are safetensors, all that `torch.save` ever wrote, and TorchScript archives; of a training checkpoint
    the weights are taken as in `unwrap`. Of shards, of an index of shards and of a folder all files are read, as in
    `find_parts`. Files are mapped into memory where their format allows it; a file behind a URL is first copied to the
    user's cache, once.

    Args:
        path: local path or fsspec URL.

    Raises:
        UserError: the file is missing, damaged, no checkpoint, or a pickle of anything but tensors.
    """
    source = f"checkpoint {path}"
    try:
        parts = find_parts(path, source)
        if len(parts) == 1 and parts[0].names is None:
            return unwrap(_read(parts[0].path, source), source)
        return unwrap(_merged(parts, source), source)
    except FileNotFoundError as error:
        raise UserError(f"{source}: there is no such file") from error
    except OSError as error:
        raise UserError(f"{source}: cannot be read ({error.strerror or error})") from error


def load_tower(model: nn.Module, path: str | Path) -> None:
    """Loads an image tower from a file of any layout that `to_pair` knows; a text tower in it is not used.

    fp16 and bf16 weights are upcast to the tower's precision. If anything does not fit, the tower stays as it was.

    Raises:
        UserError: the file cannot be read or holds another tower, or the tower's predictor or prompts were made for
            other weights.
    """
    source = f"checkpoint {path}"
    tensors = read_checkpoint(path)
    with naming_family(tensors, model.state_dict(), source):
        weights = tower_weights(to_pair(tensors, source).visual, model, source)
    _load(model, weights)


def load_vit(model: nn.Module, tensors: Mapping[str, Tensor], source: str) -> None:
    """Loads weights into a vision transformer of timm's or ours, by timm's names or those that timm turns into them.

    Positions and patch embeddings are resampled where sizes differ, as timm does. Nothing changes if anything does not
    fit.

    Raises:
        UserError: names the first key that does not fit, or the tower's predictor was made for other weights.
    """
    weights = vit_checkpoint_filter_fn(tensors, model)
    if model.attn_pool is None:  # timm's towers of averages are made of SigLIP's, whose pooling they leave out
        weights = {key: value for key, value in weights.items() if not key.startswith("attn_pool.")}
    is_ours = hasattr(model, "pruner")
    weights = with_predictor(weights, model, source) if is_ours else weights
    check_keys(weights, model.state_dict(), source)
    if is_ours:
        _load(model, weights)
    else:
        model.load_state_dict(weights)


def load_pair(clip: nn.Module, path: str | Path, called: Mapping[str, str] = {}) -> None:
    """Loads both towers of a pair and its temperature, as `load_tower` does.

    Args:
        clip: with `visual`, `text` and `logit_scale`, such as a `patchrank.models.clip.Clip`.
        called: what errors call weights of the image tower, in place of timm's names.

    Raises:
        UserError: as for `load_tower`, or the file has no text tower.
    """
    source = f"checkpoint {path}"
    tensors = read_checkpoint(path)
    with naming_family(tensors, clip.visual.state_dict(), source):
        pair = to_pair(tensors, source)
        visual = tower_weights(pair.visual, clip.visual, source, called=called)
        if not pair.text:
            raise UserError(f"{source}: holds an image tower alone, and a pair needs a text tower too")
        check_keys(pair.text, clip.text.state_dict(), f"{source}: text tower")
    scale = {} if pair.logit_scale is None else {"logit_scale": pair.logit_scale}
    check_keys(scale, {"logit_scale": clip.logit_scale}, source)
    _load(clip.visual, visual)
    rest = {f"text.{key}": value for key, value in pair.text.items()} | scale
    clip.load_state_dict({f"visual.{key}": value for key, value in clip.visual.state_dict().items()} | rest)


def _load(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Loads weights of the right shapes; undoes that if the predictor or prompts in use are for other weights."""
    tied = getattr(getattr(model.pruner, "reducer", None), "fitted", False) or model.num_prompt_tokens > 0
    before = {key: value.clone() for key, value in model.state_dict().items()} if tied else {}
    model.load_state_dict(weights)
    try:
        model.check_predictor()
        model.check_prompts()
    except UserError:
        model.load_state_dict(before)
        raise


def _merged(parts: list[Part], source: str) -> dict[str, object]:
    """What several files hold together. Raises `UserError` for one that is missing or lacks what its index promises."""
    merged: dict[str, object] = {}
    for path, names in parts:
        name = path.rpartition("/")[2]
        try:
            held = _read(path, f"{source}: {name}")
        except FileNotFoundError as error:
            says = f"{name}, one of its {len(parts)} shards, is not there"
            raise UserError(f"{source}: {says}; try to put all of them into one folder") from error
        if not isinstance(held, Mapping):
            raise UserError(f"{source}: {name} holds a {type(held).__name__}, not weights by name")
        for key in [key for key in held if isinstance(key, str)] if names is None else sorted(names):
            if key not in held or key in merged:
                says = "does not hold" if key not in held else "holds once more"
                raise UserError(f"{source}: {name} {says} {key[:80]!r}; try to download its shards again")
            merged[key] = held[key]
    return merged


def _read(path: str, source: str) -> object:
    """What one file holds. Raises `UserError` for a file of no known format, `OSError` where it cannot be read."""
    file = local_copy(path)
    with open(file, "rb") as opened:
        head = opened.read(16)
    try:
        loaded = _loaded(file, head)
    except UserError as error:
        raise UserError(f"{source}: {error}") from error
    except Exception as error:  # a damaged file may make a reader stumble over anything
        raise UserError(f"{source}: {_reason(error)}") from error
    if loaded is None:
        what = f"it begins with {head!r}" if head else "it is empty"
        hint = next((f"; {hint}" for start, hint in HINTS.items() if head.startswith(start)), "")
        raise UserError(f"{source}: no safetensors file, no torch file and no TorchScript archive: {what}{hint}")
    return loaded


def _loaded(file: str, head: bytes) -> object | None:
    """What is in a file that begins with the bytes `head`; None where it is of no known format."""
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= MAX_HEADER:
        return _of_safetensors(file)
    zipped = head.startswith(b"PK\x03\x04")
    if zipped:
        with zipfile.ZipFile(file) as archive:
            members = {name.rpartition("/")[2] for name in archive.namelist()}
        if "data.pkl" not in members:
            return None
        if "constants.pkl" in members:
            return read_archive(file)
        if not file.endswith(".safetensors"):  # a suffix that torch itself goes by
            return load_pickled(file, mmap=True)
    if not zipped and head[2:4] != TORCH_SAVE:
        return None
    with open(file, "rb") as stream:
        return load_pickled(stream)


def _of_safetensors(file: str) -> dict[str, Tensor]:
    """Raises `UserError` for the files of tensors that we write ourselves and that are no weights of a model."""
    with safe_open(file, framework="pt") as opened:
        about = (opened.metadata() or {}).get(KEY)
    if about is not None:
        kind = json.loads(about)["kind"]
        hint = f"; try {OURS[kind]}" if kind in OURS else ""
        raise UserError(f"holds the {kind} of a model and not its weights{hint}")
    return load_file(file)


def _reason(error: Exception) -> str:
    """A reader's error in one line."""
    text = re.sub(r"\x1b\[\d*m", "", str(error))
    asked = re.search(r"GLOBAL (\S+) (?:was|whose)", text)
    if asked:
        name = asked[1][:MAX_REASON]
        return f"a pickle that asks for {name}, which is no tensor: refused, and none of it was run; {SAVE_ALONE}"
    kind = "a pickle of more than tensors, or a damaged one" if isinstance(error, UnpicklingError) else "damaged"
    lines = [line.strip() for line in text.splitlines() if line.strip() and "weights_only" not in line]
    return f"{kind}, or no checkpoint: {type(error).__name__}, {lines[0][:MAX_REASON] if lines else 'without details'}"
