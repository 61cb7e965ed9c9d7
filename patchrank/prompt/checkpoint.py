"""Where a run stands after an epoch, so that it goes on from there after a kill.

Order and augmentation are functions of seed and epoch, so there are no random states to keep.
"""

from __future__ import annotations

import sys
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
    """history: loss, accuracy (%) or cosine on training images and seconds of each epoch, and the same on val where it
    stops by it; best: the prompts of the epoch that is best on val, where it stops by it."""

    prompts: Prompts
    optimizer: torch.optim.Optimizer
    history: list[dict[str, float]] = field(default_factory=list)
    best: dict[str, Tensor] = field(default_factory=dict)

    def best_epoch(self) -> int | None:
        """The first of those that are best on val, from 0; None where nothing looks at val."""
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
    """Writes it, whole or not at all. `run` names all that the run depends on."""
    tensors = {f"prompts.{key}": value for key, value in state.prompts.state_dict().items()}
    tensors |= {f"best.{key}": value for key, value in state.best.items()}
    for key, parameter in state.prompts.named_parameters():
        tensors |= {f"optimizer.{key}:{name}": value for name, value in state.optimizer.state[parameter].items()}
    write_tensors(path, KIND, tensors, {"run": run, "history": state.history})


def restore_state(state: State, path: str, run: str) -> None:
    """Fills a fresh state with what a file says; leaves it fresh where there is none, or one of another run."""
    if not exists(path):
        return
    try:
        tensors, about = read_tensors(path, KIND, ("run", "history"))
    except StoreError:  # it may well be there
        raise
    except UserError as error:
        print(f"{error}: starts anew", file=sys.stderr)
        return
    if about["run"] != run:
        print(f"{path}: of a run with other settings, so this one starts anew", file=sys.stderr)
        return
    parts = {part: _part(tensors, part, state.prompts.text.device) for part in ("prompts", "best", "optimizer")}
    state.prompts.load_state_dict(parts["prompts"])
    state.history, state.best = about["history"], parts["best"]
    parameters = dict(state.prompts.named_parameters())
    for key, value in parts["optimizer"].items():
        name, _, entry = key.partition(":")
        state.optimizer.state[parameters[name]][entry] = value.cpu() if value.ndim == 0 else value  # Adam counts there


def _part(tensors: dict[str, Tensor], name: str, device: torch.device) -> dict[str, Tensor]:
    return {key.removeprefix(f"{name}."): v.to(device) for key, v in tensors.items() if key.startswith(f"{name}.")}
