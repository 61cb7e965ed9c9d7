"""Whether a file was made for a model's weights, also after these were given another precision.

Predictors and prompts name the weights that they belong to by a fingerprint, which any change of the weights changes.
Rounding to float16 or bfloat16 changes weights too, yet leaves them those of the same model. So a model remembers what
the fingerprint was before it was rounded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from patchrank.io import is_plain_tensor, weights_sha256
from patchrank.layers.predictors import awaits_weights
from patchrank.layers.reducers import Reducer
from patchrank.models.prompt_files import check_tower
from patchrank.models.pruning_cfg import check_owner
from patchrank.models.repair_files import check_repair

LOW = {torch.float16, torch.bfloat16}


class Fingerprinted(nn.Module):
    """A module that knows its weights by the fingerprints that they had in other precisions, too.

    Attributes:
        not_counted: beginnings of names of tensors that no fingerprint is taken of.
    """

    not_counted: tuple[str, ...] = ()
    _rounded: Mapping[str, str] = {}  # fingerprint of weights that were rounded -> that of the weights before

    def known_as(self, weights: Mapping[str, Tensor] | None = None) -> list[str]:
        """All fingerprints by which a file may name the weights: as they are, as float32, and before any rounding.

        Args:
            weights: what this module is about to load, by its own names, in place of the weights that it has.
        """
        as_float32 = self.float32_sha256(weights)
        found = [as_float32, self._rounded.get(as_float32, as_float32)]
        if weights is None and self._precisions() != {torch.float32}:
            found.insert(0, weights_sha256(self, self.not_counted))
        return list(dict.fromkeys(found))

    def float32_sha256(self, weights: Mapping[str, Tensor] | None = None) -> str:
        """Fingerprint of the weights as float32, or of `weights` as `known_as` takes them."""
        return weights_sha256(self, self.not_counted, weights, torch.float32)

    def has_fingerprint(self) -> bool:
        """Whether all weights are plain tensors; quantised ones have no bytes that could be compared."""
        return all(map(is_plain_tensor, self._counted(self.state_dict()).values()))

    def precision_note(self) -> str:
        """What to add to a message that names the weights, "" where they are not rounded."""
        low = [str(precision).removeprefix("torch.") for precision in self._precisions() & LOW]
        return f" in {' and '.join(sorted(low))}; try the same before they are rounded to it" if low else ""

    def covers(self, weights: Mapping[str, object]) -> bool:
        """Whether weights hold everything that counts, in its shape, and nothing else that would."""
        own, theirs = self._counted(self.state_dict()), self._counted(weights)
        if own.keys() != theirs.keys() or not all(map(is_plain_tensor, [*own.values(), *theirs.values()])):
            return False
        return all(value.shape == own[key].shape for key, value in theirs.items())

    def note_loading(self, weights: Mapping[str, Tensor]) -> None:
        """Remembers fingerprints where weights, which are about to be loaded, will be rounded.

        Args:
            weights: what `covers` finds complete.
        """
        own, theirs = self._counted(self.state_dict()), self._counted(weights)
        if any(own[key].dtype in LOW and own[key].dtype is not value.dtype for key, value in theirs.items()):
            rounded = {key: value.to(own[key].dtype) for key, value in theirs.items()}
            self._note_rounding(self.float32_sha256(theirs), self.float32_sha256(rounded))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        """Modifications: notes the fingerprints before and after, where `fn` rounds the weights."""
        if not self._is_rounding(fn):
            return super()._apply(fn, recurse)
        before = self.float32_sha256()
        super()._apply(fn, recurse)
        self._note_rounding(before, self.float32_sha256())
        return self

    def _is_rounding(self, fn: Callable[[Tensor], Tensor]) -> bool:
        if not self.has_fingerprint():
            return False
        return any(fn(torch.empty(0, dtype=now)).dtype in LOW - {now} for now in self._precisions())

    def _note_rounding(self, before: str, after: str) -> None:
        self._rounded = {**self._rounded, after: self._rounded.get(before, before)}

    def _precisions(self) -> set[torch.dtype]:
        """Types of the floating-point weights."""
        return {weight.dtype for weight in self.parameters() if weight.is_floating_point()}

    def _counted(self, weights: Mapping[str, object]) -> dict[str, object]:
        return {key: value for key, value in weights.items() if not key.startswith(self.not_counted)}


class FingerprintedTower(Fingerprinted):
    """Part of an image tower: refuses weights that its predictor or its prompts were not made for."""

    not_counted = ("pruner.", "head.")
    # In tuples, so that they are no part of the weights: the reducer in use, or last in use, and prompts that are to be
    # compared with the first weights that are loaded.
    _ranker: tuple[Reducer, ...] = ()
    _unchecked: tuple[nn.Module, ...] = ()

    @property
    def predictor(self) -> nn.Module | None:
        """What ranks patches, or did while tokens left; None where nothing that is fitted ever did."""
        return getattr(self._ranker[0], "predictor", None) if self._ranker else None

    def blocks_sha256(self) -> str:
        """Fingerprint of all that patch tokens pass through: the tower without its head and its pruning block."""
        return weights_sha256(self, self.not_counted)

    def check_predictor(self) -> None:
        """Raises `UserError` for a predictor that was fitted to other weights, or that has no weights itself."""
        check_owner(self)

    def _load_from_state_dict(self, state_dict: dict, prefix: str, metadata: dict, strict: bool, *args) -> None:
        """Modifications: weights that bring no predictor leave the one in use, if it was fitted to them."""
        weights = {key.removeprefix(prefix): value for key, value in state_dict.items() if key.startswith(prefix)}
        if self.covers(weights):
            self.note_loading(weights)
            for prompts in self._unchecked:
                if prompts is self.prompts:
                    check_tower(self, prompts, weights)
            self._unchecked = ()
            brings = any(key.startswith("pruner.") for key in weights)
            if strict and self.pruner is not None and not brings and not awaits_weights(self):
                check_owner(self, weights)
                state_dict.update(self.pruner.state_dict(prefix=f"{prefix}pruner."))
        if self.pruner is not None and self.repair is not None:
            check_repair(self, weights)
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, *args)
