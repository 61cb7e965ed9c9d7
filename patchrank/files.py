"""Reading and writing: paths or fsspec URLs, whole files at a time, never half-written."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from contextlib import suppress
from pathlib import Path

import fsspec
import torch
from fsspec.implementations.local import LocalFileSystem
from torch import nn

from patchrank.errors import UserError


def resolve(path: str | Path, base: str | Path = ".") -> str:
    """An absolute path, or the URL as it is: relative paths would break inside Ray's workers."""
    path = str(path)
    return path if "://" in path else str((Path(base).resolve() / Path(path).expanduser()).resolve())


def join(root: str | Path, *parts: str) -> str:
    """`root/part/part`, for paths and URLs alike."""
    return "/".join([str(root).rstrip("/"), *parts])


def filesystem_of(path: str | Path) -> tuple[fsspec.AbstractFileSystem, str]:
    """fsspec's file system of a path or URL, and the name in it. Raises `UserError` for a protocol it lacks."""
    try:
        return fsspec.core.url_to_fs(str(path))
    except (ImportError, ValueError) as error:
        raise UserError(f"{path}: fsspec cannot open this kind of URL ({error})") from error


def read_bytes(path: str | Path) -> bytes:
    """The whole of a file. Raises `FileNotFoundError` where there is none."""
    filesystem, name = filesystem_of(path)
    return filesystem.cat_file(name)


def read_json(path: str | Path) -> dict | None:
    """What a JSON file says; None where there is no such file or it is damaged (it will be made again)."""
    try:
        return json.loads(read_bytes(path))
    except (FileNotFoundError, NotADirectoryError, json.JSONDecodeError, UnicodeDecodeError):
        return None


def exists(path: str | Path) -> bool:
    filesystem, name = filesystem_of(path)
    return filesystem.exists(name)


def list_names(folder: str | Path) -> list[str]:
    """Names of the files in a folder, sorted; none where there is no folder."""
    filesystem, name = filesystem_of(folder)
    filesystem.invalidate_cache(name)  # object stores remember listings, and workers have written since
    if not filesystem.isdir(name):
        return []
    return sorted(str(entry).rstrip("/").rsplit("/", 1)[-1] for entry in filesystem.ls(name, detail=False))


def remove(path: str | Path) -> None:
    """Removes a file if it is there."""
    filesystem, name = filesystem_of(path)
    with suppress(FileNotFoundError):
        filesystem.rm_file(name)


def write_atomic(path: str | Path, content: bytes | str) -> None:
    """Writes a whole file or nothing: beside its place and then renamed; on object stores in one put.

    Raises:
        UserError: the place cannot be written to.
    """
    content = content.encode() if isinstance(content, str) else content
    filesystem, name = filesystem_of(path)
    try:
        filesystem.makedirs(filesystem._parent(name) or ".", exist_ok=True)
        if isinstance(filesystem, LocalFileSystem):
            _replace(name, content)
        else:
            filesystem.pipe_file(name, content)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error


def check_writable(folder: str | Path) -> None:
    """Raises `UserError` if nothing can be written into a folder; leaves no trace of having tried."""
    probe = join(folder, ".writable")
    filesystem, name = filesystem_of(folder)
    local = isinstance(filesystem, LocalFileSystem)
    absent = [path for path in (Path(name), *Path(name).parents) if not path.exists()] if local else []
    try:
        write_atomic(probe, b"")
        remove(probe)
    finally:
        for path in absent:
            with suppress(OSError):
                path.rmdir()


def _replace(name: str, content: bytes) -> None:
    handle, temporary = tempfile.mkstemp(dir=os.path.dirname(name), prefix=".writing-")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, name)
    except BaseException:
        os.unlink(temporary)
        raise


def write_json(path: str | Path, value: object) -> None:
    write_atomic(path, json.dumps(value, indent=1, sort_keys=True) + "\n")


def content_id(value: object) -> str:
    """sha256 of a JSON value's canonical form; the name of whatever that value determines."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _unusual(model: nn.Module, without: tuple[str, ...]) -> list[str]:
    """Kinds of activation and of epsilon, other than the usual ones, that a model has."""
    found = set()
    for name, module in model.named_modules():
        if not name.startswith(without or ("\0",)):
            if name.endswith((".act", ".gelu")):
                found.add(f"{type(module).__name__} {getattr(module, 'approximate', 'none')}\n")
            if isinstance(module, nn.LayerNorm):
                found.add(f"eps {module.eps}\n")
    return sorted(found - {"GELU none\n", "eps 1e-05\n"})


def weights_sha256(model: nn.Module, without: tuple[str, ...] = ()) -> str:
    """sha256 over names, types, shapes and bytes of a model's tensors, but for names that start with `without`.

    What weights do not show counts as well, where it is not CLIP's plain GELU and 1e-5: activations and norms' epsilon.
    """
    digest = hashlib.sha256("".join(_unusual(model, without)).encode())
    for key, value in sorted(model.state_dict().items()):
        if not key.startswith(without):
            value = value.detach().cpu().contiguous()
            digest.update(f"{key} {value.dtype} {tuple(value.shape)}\n".encode())
            digest.update(value.view(torch.uint8).numpy().tobytes() if value.ndim else value.numpy().tobytes())
    return digest.hexdigest()
