"""The weights among all that a training checkpoint holds."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from timm.models import clean_state_dict
from torch import Tensor

from patchrank.models.checkpoints.pickled import LeftOut
from patchrank.utils.errors import UserError
from patchrank.utils.progress import write_line

MAX_NAME = 200  # characters, so that errors stay short
MAX_DEPTH = 5  # of wrappers in one another; a pickle can also hold itself
# Averaged weights (EMA). timm's doors take the first two before any others, so ours do too.
EMA = ("state_dict_ema", "model_ema")
OTHER_EMA = ("model_ema_state_dict", "ema_state_dict", "params_ema", "ema_model", "ema")
# Keys of weights, the first of which is taken: timm's, in its order; then those of other trainers, such as DeepSpeed's
# `module`, and `model_state_dict` of torch's tutorials.
WRAPPERS = (
    *EMA,
    *("state_dict", "model"),
    *OTHER_EMA,
    *("model_state_dict", "module", "model_state", "net", "network", "params", "weights"),
)


def unwrap(loaded: object, source: str = "weights") -> dict[str, Tensor]:
    """The tensors of a state dict or of a training checkpoint around one, without the prefixes of wrapped modules.

    Of raw and averaged weights (EMA) the averaged ones are taken, where timm would take them, and stderr is told.

    Args:
        loaded: what a file holds; wrappers such as `{"model": {"module": {...}}}` may lie in one another.
        source: what messages call the weights.

    Raises:
        UserError: there are no tensors, only some under keys that are not known, which are named; or one of the
            tensors is sparse, quantised or without content.
    """
    for _ in range(MAX_DEPTH):
        wrappers = _wrappers_in(loaded)
        if not wrappers:
            break
        _tell_of_averages(wrappers, source)
        loaded = loaded[wrappers[0]]
    if not isinstance(loaded, Mapping):
        what = "an object that is no tensor" if isinstance(loaded, LeftOut) else f"a {type(loaded).__name__}"
        raise UserError(f"{source}: holds {what}, not weights by name")
    named = {key: value for key, value in loaded.items() if isinstance(key, str) and isinstance(value, Tensor)}
    if not named:
        raise UserError(f"{source}: {_what_it_holds(loaded)}")
    for key, value in named.items():
        if not key.isprintable() or len(key) > MAX_NAME:
            raise UserError(f"{source}: {key[:40]!r} is not the name of a weight")
        if value.layout != torch.strided or value.is_quantized or value.is_meta:
            raise UserError(f"{source}: {key} is sparse, quantised or without content")
    # by the class, since a pickle may give a tensor attributes of such names, which `detach` also leaves behind
    return clean_state_dict({key: Tensor.detach(value) for key, value in named.items()})


def _wrappers_in(loaded: object, depth: int = MAX_DEPTH) -> list[str]:
    """The known keys under which weights lie, directly or in a further wrapper; the first is the one to take.

    Some trainers write an empty EMA before the first is computed, or settings under the same names.
    """
    if not isinstance(loaded, Mapping) or depth == 0:
        return []
    inner = {key: loaded[key] for key in WRAPPERS if isinstance(loaded.get(key), Mapping)}
    return [key for key, value in inner.items() if _has_tensors(value) or _wrappers_in(value, depth - 1)]


def _tell_of_averages(wrappers: list[str], source: str) -> None:
    """One line on stderr where a checkpoint holds averaged weights: which weights are taken.

    Args:
        wrappers: keys of weights, the first of which is taken.
    """
    taken, *others = wrappers
    averages = [key for key in others if key in (*EMA, *OTHER_EMA)]
    if taken in (*EMA, *OTHER_EMA):
        like = ", as timm does" if taken in EMA else ""
        beside = f"; the weights under {', '.join(map(repr, others))} are not used" if others else ""
        write_line(f"{source}: takes the averaged weights (EMA) under {taken!r}{like}{beside}")
    elif averages:
        left = f"and not the averaged ones under {averages[0]!r}"
        write_line(f"{source}: takes the weights under {taken!r}, as timm does, {left}")


def _what_it_holds(loaded: Mapping) -> str:
    """What a mapping without weights by name holds instead, and what to do about it."""
    if "param_groups" in loaded and "state" in loaded:
        return "holds the state of an optimizer, not weights; try the file of the model"
    mappings = {str(key): value for key, value in loaded.items() if isinstance(value, Mapping)}
    inner = sorted(
        key for key, value in mappings.items() if _has_tensors(value) or any(map(_has_tensors, value.values()))
    )
    if inner:
        shown = ", ".join(repr(key[:40]) for key in inner[:4])
        example = f"torch.save(checkpoint[{inner[-1][:40]!r}], FILE)"
        return f"holds weights under {shown}, but under no key that is known; try {example} for those that you mean"
    keys = ", ".join(repr(str(key)[:40]) for key in list(loaded)[:4])
    return f"holds no weights by name{f': there is no tensor under {keys}' if keys else ''}"


def _has_tensors(value: object) -> bool:
    """Whether something is a mapping with tensors in it."""
    return isinstance(value, Mapping) and any(isinstance(tensor, Tensor) for tensor in value.values())
