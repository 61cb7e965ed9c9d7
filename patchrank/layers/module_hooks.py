"""What people hang on modules, and what we hang on them for the length of one call.

Hooks run only where a module is called. Code that computes with a module's weights asks here first whether a call
would do more than its class's own `forward`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from patchrank.utils.private_names import has_global_hooks, has_hooks

# Modules of others may do anything: count their calls, or look at all tokens at once.
_KNOWN = ("torch.nn.modules.", "timm.", "open_clip.", "transformers.")

_REGISTERING = threading.Lock()  # torch numbers hooks without one, and of two with the same number one is lost


def is_hooked(module: nn.Module) -> bool:
    """Whether a hook of any kind hangs on a module itself, or it got a `forward` of its own."""
    return "forward" in vars(module) or has_hooks(module)


def are_untouched(modules: Iterable[nn.Module]) -> bool:
    """Whether a call of each of these modules runs the `forward` that its author wrote, and nothing else.

    False where one is hooked (pruned, weight-normalised and offloaded layers are), where its class comes from elsewhere
    (LoRA, quantised or parametrised layers), and where hooks hang on all modules.
    """
    for module in modules:
        if is_hooked(module) or not type(module).__module__.startswith(_KNOWN):
            return False
    return not has_global_hooks()


def is_own_forward(kind: type[nn.Module]) -> bool:
    """Whether a class still has the `forward` of its own file; some tools put another into the class itself."""
    return kind.forward.__globals__["__name__"] == kind.__module__


@contextmanager
def listening(hooks: Iterable[tuple[nn.Module, Callable[[Tensor], Tensor | None]]]) -> Iterator[None]:
    """Hangs forward hooks on modules, for the calls that this thread makes inside the block.

    Args:
        hooks: modules, and what each one's output is handed to. What that returns takes the output's place, unless it
            is None. It comes after all hooks that hang there already.
    """
    with _REGISTERING:
        handles = [module.register_forward_hook(_of_this_thread(hook)) for module, hook in hooks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _of_this_thread(hook: Callable[[Tensor], Tensor | None]) -> Callable:
    own = _thread()
    return lambda module, args, output: hook(output) if _thread() == own else None


def _thread() -> int:
    return 0 if torch.compiler.is_compiling() else threading.get_ident()
