"""Where a host's own call meets the repair of the tower inside: hooks behind the pooled embedding.

They hang there from the first repair on until the model is unpruned, and do nothing while no repair is in force.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


class Entering:
    """A pre-hook of a head or classifier: what enters it is repaired.

    Args:
        tower: ours, which knows the repair in force.
        always: also where the repair would take the place of the tower's own head, which this one is not.
    """

    def __init__(self, tower: nn.Module, always: bool = False):
        self.tower, self.always = tower, always

    def __call__(self, module: nn.Module, args: tuple) -> tuple | None:
        repair = self.tower.repair
        if repair is None or not (self.always or self.tower.repair_leads):
            return None
        return repair(args[0]), *args[1:]


class InPlace:
    """A forward hook of a head: it gives what the repair makes of its input, where that takes its place."""

    def __init__(self, tower: nn.Module):
        self.tower = tower

    def __call__(self, module: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
        repair = self.tower.repair
        return None if repair is None or self.tower.repair_leads else repair(args[0])


class OfPooled:
    """A forward hook of a model of transformers: its `pooler_output`, the second of what it gives, is repaired."""

    def __init__(self, tower: nn.Module):
        self.tower = tower

    def __call__(self, module: nn.Module, args: tuple, output):
        if (repair := self.tower.repair) is None:
            return None
        if isinstance(output, tuple):  # return_dict=False
            return output[0], repair(output[1]), *output[2:]
        output.pooler_output = repair(output.pooler_output)
        return output


class FirstToken:
    """A pre-hook of a pooler that reads the first token alone: that token is repaired, and none of the others."""

    def __init__(self, tower: nn.Module):
        self.tower = tower

    def __call__(self, module: nn.Module, args: tuple) -> tuple | None:
        if (repair := self.tower.repair) is None:
            return None
        (x,) = args
        return (torch.cat([repair(x[:, :1]), x[:, 1:]], dim=1),)


class End:
    """The module of a host at which its own call meets the repair.

    Args:
        owner: the module that has it.
        name: under which name; "" where it is the owner itself.
        before, after: hooks of its input and of its output.
    """

    def __init__(self, owner: nn.Module, name: str = "", before: Sequence = (), after: Sequence = ()):
        self.owner, self.name, self.before, self.after = owner, name, before, after
        self.module: nn.Module | None = None
        self.handles: list[RemovableHandle] = []

    def hang(self) -> None:
        """Hangs the hooks on the module that the host has now, if they do not hang there yet."""
        if self.is_replaced():
            self.remove()
            self.module = self._current()
            self.handles = [self.module.register_forward_pre_hook(hook) for hook in self.before]
            self.handles += [self.module.register_forward_hook(hook) for hook in self.after]

    def is_replaced(self) -> bool:
        """Whether the hooks hang on another module than the host has now, or on none."""
        return self.module is not self._current()

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()
        self.module, self.handles = None, []

    def _current(self) -> nn.Module:
        return getattr(self.owner, self.name) if self.name else self.owner
