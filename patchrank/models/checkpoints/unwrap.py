"""The weights among all that a training checkpoint holds."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from timm.models import clean_state_dict
from torch import Tensor

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
        key = next((key for key in WRAPPERS if isinstance(loaded, Mapping) and _is_filled(loaded.get(key))), None)
        if key is None:
            break
        _tell_of_averages(loaded, key, source)
        loaded = loaded[key]
    if not isinstance(loaded, Mapping):
        raise UserError(f"{source}: holds a {type(loaded).__name__}, not weights by name")
    named = {key: value for key, value in loaded.items() if isinstance(key, str) and isinstance(value, Tensor)}
    if not named:
        raise UserError(f"{source}: {_what_it_holds(loaded)}")
    for key, value in named.items():
        if not key.isprintable() or len(key) > MAX_NAME:
            raise UserError(f"{source}: {key[:40]!r} is not the name of a weight")
        if value.layout != torch.strided or value.is_quantized or value.is_meta:
            raise UserError(f"{source}: {key} is sparse, quantised or without content")
    return clean_state_dict({key: value.detach() for key, value in named.items()})


def _is_filled(value: object) -> bool:
    """Whether a wrapper's value can hold weights. Some trainers write an empty EMA before the first is computed."""
    return isinstance(value, Mapping) and len(value) > 0


def _tell_of_averages(wrapper: Mapping, taken: str, source: str) -> None:
    """One line on stderr where a checkpoint holds both raw and averaged weights: which of them are taken."""
    filled = [key for key in WRAPPERS if _is_filled(wrapper.get(key))]
    averaged, others = (*EMA, *OTHER_EMA), [key for key in filled if key != taken]
    if taken in averaged:
        beside = f"; the weights under {others[0]!r} are not used" if others else ""
        write_line(f"{source}: takes the averaged weights (EMA) under {taken!r}, as timm does{beside}")
    elif left := [key for key in others if key in averaged]:
        write_line(
            f"{source}: takes the weights under {taken!r}, as timm does, and not the averaged ones under {left[0]!r}"
        )


def _what_it_holds(loaded: Mapping) -> str:
    """What a mapping without weights by name holds instead, and what to do about it."""
    if "param_groups" in loaded and "state" in loaded:
        return "holds the state of an optimizer, not weights; try the file of the model"
    inner = sorted(str(key) for key, value in loaded.items() if _holds_tensors(value))
    if inner:
        shown = ", ".join(repr(key[:40]) for key in inner[:4])
        example = f"torch.save(checkpoint[{inner[-1][:40]!r}], FILE)"
        return f"holds weights under {shown}, but under no key that is known; try {example} for those that you mean"
    keys = ", ".join(repr(str(key)[:40]) for key in list(loaded)[:4])
    return f"holds no weights by name{f': there is no tensor under {keys}' if keys else ''}"


def _holds_tensors(value: object) -> bool:
    """Whether something is a mapping of weights, or of mappings of weights."""
    below = list(value.values()) if isinstance(value, Mapping) else []
    below += [tensor for inner in below if isinstance(inner, Mapping) for tensor in inner.values()]
    return any(isinstance(tensor, Tensor) for tensor in below)
