"""Files of `torch.save`, read so that nothing in them can run.

torch's restricted unpickler knows tensors and plain containers. Training checkpoints hold more beside their weights:
NumPy's learning rates, the arguments of a command, paths. Each of these is replaced by an object of ours that keeps
nothing and does nothing. Every other name in a pickle is refused.
"""

from __future__ import annotations

import warnings
from threading import Lock
from typing import IO

import torch


class LeftOut:
    """Stands in for an object that is no tensor: takes whatever its pickle hands over, and keeps none of it."""

    __slots__ = ()

    def __new__(cls, *args: object) -> LeftOut:
        return super().__new__(cls)

    def __init__(self, *args: object):
        pass

    def __setstate__(self, state: object) -> None:
        pass


class _PlainDict:
    """Stands in for kinds of dictionaries, since weights may lie in them: makes an ordinary one."""

    def __new__(cls, *args: object) -> dict:
        return {}


# What the training scripts of open_clip, timm, DeiT, DINO, CoOp and Lightning put beside the weights. NumPy 2 calls
# `numpy.core` `numpy._core`; Python 3.13 calls `pathlib` `pathlib._local`, and later versions do not.
_LEFT_OUT = (
    *("numpy.core.multiarray.scalar", "numpy.core.multiarray._reconstruct"),
    *("numpy._core.multiarray.scalar", "numpy._core.multiarray._reconstruct"),
    *("numpy.dtype", "numpy.ndarray"),
    *("argparse.Namespace", "types.SimpleNamespace", "torch.torch_version.TorchVersion"),
    *("pathlib.PosixPath", "pathlib.WindowsPath", "pathlib._local.PosixPath", "pathlib._local.WindowsPath"),
    *(f"builtins.{name}" for name in ("dict", "list", "int", "float")),  # what a `defaultdict` makes
    *("omegaconf.dictconfig.DictConfig", "omegaconf.listconfig.ListConfig", "typing.Any"),
    *("omegaconf.base.ContainerMetadata", "omegaconf.base.Metadata", "omegaconf.nodes.AnyNode"),
)
_DICTS = (
    "collections.defaultdict",
    "pytorch_lightning.utilities.parsing.AttributeDict",
    "lightning_fabric.utilities.data.AttributeDict",
    "lightning.fabric.utilities.data.AttributeDict",
)
_STAND_INS = [*((LeftOut, name) for name in _LEFT_OUT), *((_PlainDict, name) for name in _DICTS)]
_LOCK = Lock()  # torch keeps the names that it allows for the whole process


def load_pickled(file: str | IO[bytes], mmap: bool = False) -> object:
    """What `torch.save` wrote, on the CPU. Objects that are no tensors come back as stand-ins without content.

    Args:
        file: local path, or a file opened for reading bytes.
        mmap: map the file into memory; for a path of torch's zip format.

    Raises:
        pickle.UnpicklingError: the pickle asks for a name that is not known. Nothing of it was called.
        Exception: anything that torch raises on a damaged file.
    """
    with _LOCK, torch.serialization.safe_globals(_STAND_INS), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what torch says of a protocol or a kind of tensor, an error of ours says too
        return torch.load(file, map_location="cpu", weights_only=True, mmap=mmap)
