"""Private names of other packages that we cannot do without: all of them stand here, each with its reason.

Their owners may change them in any release. `tests/repo/test_private_names.py` says which package did, and finds
private names that are used anywhere else. Where a package gets a public way, take that and strike its name off here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import timm
import torch
from torch import Tensor, nn
from torch.nn.modules import module as _module
from torch.utils.module_tracker import ModuleTracker

from patchrank.utils.plain import plain

try:
    # How timm's own towers read `indices` of `forward_intermediates`; ours must read them alike, in later releases too.
    from timm.models._features import feature_take_indices as feature_take_indices

    # Writes `config.json`. The public `timm.models.save_for_hf` writes weights too, but refuses those that are not
    # contiguous, and leaves out the note on their format that other readers ask for.
    from timm.models._hub import save_config_for_hf as save_config_for_hf

    # Changes what `timm.models.get_model_args` reads, which nothing public does. Without it a tower whose pruning was
    # changed would be saved with the settings that it was made with.
    from timm.models._input import update_model_args as update_model_args
except ImportError as error:
    raise ImportError(
        f"timm {timm.__version__} has moved a private name that patchrank needs ({error}); try pip install timm==1.0.31"
    ) from error

# Checks a shape in a way that `torch.fx` can trace; a plain `if` ends the tracing, and nothing public does the same.
traceable_assert = torch._assert

# Private methods that our towers override, and the classes that call them.
OVERRIDDEN = {
    "_apply": "torch.nn.Module",  # all changes of precision go through it, also those of a module around ours
    "_load_from_state_dict": "torch.nn.Module",  # torch's public hook cannot report a missing key by open_clip's name
    "_pos_embed": "timm.models.vision_transformer.VisionTransformer",  # all that runs between patches and first norm
}


def version_of(weight: Tensor) -> int:
    """How often a tensor was changed in place: torch counts it for autograd, under a private name alone.

    Comparing values instead would read all weights of a text tower again and again.
    """
    return weight._version


def is_compiled(module: nn.Module) -> bool:
    """Whether `module.compile()` was called: torch then runs what it compiled, and not the layers that are there."""
    return vars(module).get("_compiled_call_impl") is not None


def has_hooks(module: nn.Module, before: bool = False) -> bool:
    """Whether hooks hang on a module, forward or backward; with `before`, such as may change what it is given.

    A parametrised module has none, but is of a class of its own. Torch has public ways to add hooks, but none to ask.
    """
    if before:
        return bool(module._forward_pre_hooks)
    return bool(
        module._forward_pre_hooks or module._forward_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def share_weights(module: nn.Module, other: nn.Module) -> None:
    """Makes `module` look at the parameters and buffers of `other` itself, whatever takes their place there later."""
    vars(module).update(_parameters=other._parameters, _buffers=other._buffers)


def has_others_hooks(module: nn.Module, known: str) -> bool:
    """Whether a hook hangs on a module that was not written in a package, whose name with a dot is `known`."""
    hooks = (module._forward_pre_hooks, module._forward_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(not getattr(hook, "__module__", "").startswith(known) for each in hooks for hook in each.values())


def has_global_hooks(before: bool = False) -> bool:
    """Whether somebody hung hooks on all modules; `before` as in `has_hooks`.

    Those of torch's own counter of FLOPs do not count: it changes nothing, and must see what runs without it.
    """
    hooks = [*_module._global_forward_pre_hooks.values()]
    if not before:
        hooks += _module._global_forward_hooks.values()
        hooks += _module._global_backward_hooks.values()
        hooks += _module._global_backward_pre_hooks.values()
    return any(not isinstance(getattr(hook, "__self__", None), ModuleTracker) for hook in hooks)


def has_model_args(model: nn.Module) -> bool:
    """Whether timm made a model, and so noted the arguments it is saved with.

    The public `timm.models.get_model_args` gives a few for any model.
    """
    return hasattr(model, "_model_args")


def with_plain_model_args(cls: type[nn.Module]) -> type[nn.Module]:
    """A class decorator: timm's note of the arguments of such a model holds plain values, not NumPy's.

    timm notes what `create_model` was given only when the model is made, so no constructor could do this.
    """

    name = "_model_args"

    def set_args(model: nn.Module, args: Mapping[str, object]) -> None:
        vars(model)[name] = {key: plain(value) for key, value in args.items()}

    def get_args(model: nn.Module) -> dict[str, object]:
        if name not in vars(model):  # as for any attribute that is not there
            raise AttributeError(name)
        return vars(model)[name]

    setattr(cls, name, property(get_args, set_args))
    return cls


@contextmanager
def keeping_model_args(model: nn.Module) -> Iterator[None]:
    """Lets timm's note of a model's arguments come back after a block, whatever changes it meanwhile.

    `update_model_args` puts a new note in the place of the old one, but takes no argument out of it again.
    """
    noted = vars(model).get("_model_args")
    try:
        yield
    finally:
        if noted is not None:
            vars(model)["_model_args"] = noted


def hold_the_same(module: nn.Module, other: nn.Module, without: str) -> None:
    """Makes `module` hold the parameters, buffers and child modules of `other`, but for the child `without`.

    The public `register_*` methods refuse a name that is a plain attribute so far, and make every buffer persistent.
    """
    module._parameters.update(other._parameters)
    module._buffers.update(other._buffers)
    module._modules.update({name: child for name, child in other._modules.items() if name != without})
