"""TorchScript archives, such as OpenAI's own CLIP files, read as data: no code in them is compiled or run.

An archive is a zip file: `data.pkl` is a pickled tree of modules, `data/` has their tensors' bytes, `code/` has the
program, which is not read. Every module is unpickled as an object of one class of ours, which does nothing.
"""

from __future__ import annotations

import io
import pickle
import pickletools
import sys
import zipfile
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import IO

import torch
from torch import Tensor

MAX_MODULES = 10_000  # a tree of more has a module inside itself
STORAGES = {
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
TYPED = ("build_intlist", "build_doublelist", "build_boollist", "build_tensorlist", "restore_type_tag")


def read_archive(file: str | IO[bytes]) -> dict[str, Tensor]:
    """Parameters and buffers of the module in a TorchScript archive, by dotted name.

    Views that share storage in the archive share it here. Beside what `state_dict` gives there are buffers that the
    module would not save, and plain tensor attributes.

    Raises:
        pickle.UnpicklingError: the archive asks for anything but tensors and modules, or has no tree of modules.
        Exception: anything that `zipfile`, `pickle` and `torch` raise on a damaged archive.
    """
    with zipfile.ZipFile(file) as archive:
        pickled = next(name for name in archive.namelist() if name.count("/") == 1 and name.endswith("/data.pkl"))
        root, names = pickled.removesuffix("data.pkl"), archive.namelist()
        order = archive.read(f"{root}byteorder").decode() if f"{root}byteorder" in names else "little"
        if order != sys.byteorder:
            raise pickle.UnpicklingError(f"its numbers are {order}-endian, this machine's are not")
        content = archive.read(pickled)
        for opcode, argument, _ in pickletools.genops(content):  # the unpickler would reserve gigabytes for them
            if opcode.name.endswith("PUT") and argument > len(content):
                raise pickle.UnpicklingError(f"it asks for {argument} places in the memo")
        tree = _Unpickler(io.BytesIO(content), lambda key: archive.read(f"{root}data/{key}")).load()
    return _named_tensors(tree)


class _Module:
    """An object of the archive: its attributes, and nothing that could run."""

    attributes: Mapping[str, object] = MappingProxyType({})

    def __setstate__(self, state: dict) -> None:
        self.attributes = dict(state)


class _Unpickler(pickle.Unpickler):
    """Replaces each name that torch's own writer puts into an archive by ours, and refuses all other names."""

    def __init__(self, file: IO[bytes], read_record: Callable[[str], bytes]):
        super().__init__(file)
        self.read_record = read_record
        self.storages: dict[str, Tensor] = {}

        def rebuild(flat: Tensor, offset: int, size: tuple, stride: tuple, *autograd: object) -> Tensor:
            return flat.as_strided(size, stride, offset)  # which checks that the view lies within the storage

        # functions made for this archive alone, since a pickle may set attributes of what it is given
        self.known: dict[tuple[str, str], object] = {
            ("collections", "OrderedDict"): dict,
            ("torch._utils", "_rebuild_tensor_v2"): rebuild,
            **{("torch", name): dtype for name, dtype in STORAGES.items()},
            **{("torch.jit._pickle", name): lambda value, *_: value for name in TYPED},
        }

    def find_class(self, module: str, name: str) -> object:
        if module.split(".")[0] == "__torch__":
            return _Module
        if (module, name) not in self.known:
            raise pickle.UnpicklingError(f"GLOBAL {module}.{name} was not expected in an archive of weights")
        return self.known[module, name]

    def persistent_load(self, pid: tuple) -> Tensor:
        """All elements of a storage as one flat tensor."""
        _, dtype, key, *_ = pid
        if key not in self.storages:
            content = bytearray(self.read_record(key))
            flat = torch.frombuffer(content, dtype=torch.uint8) if content else torch.empty(0, dtype=torch.uint8)
            self.storages[key] = flat
        return self.storages[key].view(dtype)


def _named_tensors(tree: object) -> dict[str, Tensor]:
    if not isinstance(tree, _Module):
        raise pickle.UnpicklingError(f"it holds a {type(tree).__name__}, not a module")
    named: dict[str, Tensor] = {}
    left = [("", tree)]
    for _ in range(MAX_MODULES):
        if not left:
            return named
        prefix, module = left.pop()
        for name, value in module.attributes.items():
            if not isinstance(name, str):
                raise pickle.UnpicklingError(f"it has an attribute whose name is a {type(name).__name__}")
            if isinstance(value, Tensor):
                named[f"{prefix}{name}"] = value
            elif isinstance(value, _Module):
                left.append((f"{prefix}{name}.", value))
    raise pickle.UnpicklingError(f"it has more than {MAX_MODULES} modules, or one inside itself")
