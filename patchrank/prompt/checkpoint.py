"""The state of a run after an epoch, in a file from which the run goes on after a kill.

Order and augmentation depend on seed and epoch alone, so there are no random states in it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from patchrank.io import exists
from patchrank.io.tensor_file import read_tensors, write_tensors
from patchrank.layers.prompts import Prompts
from patchrank.utils.errors import StoreError, UserError

KIND = "prompt state"


@dataclass
class State:
    """Prompts in training.

    history: of each epoch the loss, accuracy (%) or cosine on training images, and seconds; where the run stops by val,
        also its accuracy or cosine on val.
    best: the prompts of the epoch that is best on val, where the run stops by val.
    """

    prompts: Prompts
    optimizer: torch.optim.Optimizer
    history: list[dict[str, float]] = field(default_factory=list)
    best: dict[str, Tensor] = field(default_factory=dict)

    def best_epoch(self) -> int | None:
        """The epoch, from 0, that is best on val, and the first of several; None where the run does not look at val."""
        values = [epoch[key] for epoch in self.history for key in ("val_accuracy", "val_cosine") if key in epoch]
        return values.index(max(values)) if values else None

    def is_done(self, epochs: int, patience: int | None) -> bool:
        best = self.best_epoch()
        tired = patience is not None and best is not None and len(self.history) - 1 - best >= patience
        return tired or len(self.history) >= epochs

    def remember_best(self) -> None:
        if self.best_epoch() == len(self.history) - 1:
            self.best = {key: value.detach().clone() for key, value in self.prompts.state_dict().items()}


def save_state(state: State, path: str, run: str) -> None:
    """Writes a state, whole or not at all. `run` is the id of all that the run depends on."""
    tensors = {f"prompts.{key}": value for key, value in state.prompts.state_dict().items()}
    tensors |= {f"best.{key}": value for key, value in state.best.items()}
    for key, parameter in state.prompts.named_parameters():
        tensors |= {f"optimizer.{key}:{name}": value for name, value in state.optimizer.state[parameter].items()}
    write_tensors(path, KIND, tensors, {"run": run, "history": state.history})


def read_if_sound(read: Callable[..., tuple], path: str, *args) -> tuple | None:
    """What `read(path, *args)` gives; None for a file that is not there, or is damaged, which stderr then tells."""
    if not exists(path):
        return None
    try:
        return read(path, *args)
    except StoreError:  # the file may well be there
        raise
    except UserError as error:
        print(f"{error}: it is made anew", file=sys.stderr)
        return None


def restore_state(state: State, path: str, run: str) -> None:
    """Fills a new state from a file; leaves it as it is where there is no file, or one of another run."""
    found = read_if_sound(read_tensors, path, KIND, ("run", "history"))
    if found is None:
        return
    tensors, about = found
    if about["run"] != run:
        print(f"{path}: of a run with other settings, so this one starts anew", file=sys.stderr)
        return
    device, parameters = state.prompts.text.device, dict(state.prompts.named_parameters())

    def part(start: str) -> dict[str, Tensor]:
        return {key.removeprefix(start): value.to(device) for key, value in tensors.items() if key.startswith(start)}

    state.prompts.load_state_dict(part("prompts."))
    state.history, state.best = about["history"], part("best.")
    for key, value in part("optimizer.").items():
        name, _, entry = key.partition(":")
        state.optimizer.state[parameters[name]][entry] = value.cpu() if value.ndim == 0 else value  # Adam's step count
