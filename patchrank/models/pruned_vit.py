"""CLIP's image tower with token pruning, as a timm model.

Paper: `Patch Ranking: Token Pruning as Ranking Prediction for Efficient CLIP`, WACV 2025.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.fx import Proxy

from patchrank.config import validate
from patchrank.layers.class_token import can_skip_rows, forward_cls
from patchrank.layers.intermediates import check_format, format_intermediates
from patchrank.layers.macs import Macs, vision_macs
from patchrank.layers.pooling import POOLS
from patchrank.layers.predictors import load_predictor
from patchrank.layers.prunable import check_prunable, without_mask
from patchrank.layers.pruning_block import PrunedOutput, PruningBlock
from patchrank.layers.reducers import Reducer
from patchrank.layers.token_state import TokenState
from patchrank.models.encoded_vit import EncodedTower
from patchrank.models.fingerprints import FingerprintedTower
from patchrank.models.pooled_vit import PooledTower
from patchrank.models.pretrained import record_input_size
from patchrank.models.prompt_files import load_visual
from patchrank.models.prompted_vit import PromptedTower
from patchrank.models.pruning_cfg import (
    Pruning,
    check_owner,
    check_schedule,
    count_macs,
    create_pruner,
    create_ranker,
    find_drops,
    lets_leave,
    skips_rows,
    with_predictor,
)
from patchrank.models.repair_files import check_repair
from patchrank.models.repaired_vit import RepairedTower
from patchrank.utils.errors import UserError
from patchrank.utils.private_names import (
    feature_take_indices,
    has_model_args,
    keeping_model_args,
    update_model_args,
    with_plain_model_args,
)

__all__ = ["PrunedVisionTransformer"]

torch.fx.wrap("without_mask")  # a step of the traced graph, where masks have values; while it is traced they have none


@with_plain_model_args
class PrunedVisionTransformer(
    EncodedTower, RepairedTower, PromptedTower, FingerprintedTower, PooledTower, VisionTransformer
):
    """timm's vision transformer, from which patch tokens leave on the way.

    Modifications: tokens leave before chosen layers or inside of them (`Pruning` has the settings), the last block
    computes the class token alone, features come back on the full grid, with what patches merged into, or zeros where
    they were dropped, and learned tokens (`set_prompts`) stand between prefix and patches; they are never scored or
    dropped, and no part of what comes back.
    """

    def __init__(self, *args, prompts_path: str | Path | None = None, **kwargs):
        """Takes timm's arguments, by keyword the fields of `Pruning`, and the file of prompts to insert."""
        settings = {name: kwargs.pop(name) for name in Pruning.model_fields if name in kwargs}
        super().__init__(*args, **kwargs)
        self.pruning = Pruning()
        self.pruner: PruningBlock | None = None
        self._prune(settings)
        if prompts_path is not None:
            self._hold(load_visual(prompts_path))
            self._unchecked = (self.prompts,)  # compared with the weights once these are loaded

    @property
    def num_patches(self) -> int:
        return self.patch_embed.num_patches

    @property
    def drop_counts(self) -> tuple[int, ...]:
        """How many tokens leave at each location, () where nothing does."""
        return tuple(self.pruner.drops.values()) if self.pruner is not None else ()

    @property
    def cls_only(self) -> bool:
        """Whether `forward` runs the last block for the class token alone; never where something hangs on it."""
        return skips_rows(self, self.pruning, self.pruner is not None)

    def set_pruning(self, predictor: nn.Module | None = None, **changes) -> None:
        """Changes pruning settings of a live model; what is not named stays. Nothing changes if anything is wrong.

        Args:
            predictor: a fitted predictor to rank by, instead of a file.
            **changes: fields of `Pruning`.

        Raises:
            UserError: an unknown or impossible setting, or a predictor or repair that was fitted to something else.
        """
        before = self.pruning, self.pruner, self._ranker
        if predictor is not None:  # it takes the place of the file, also in later changes
            changes = with_predictor(self.pruning, changes, predictor)
        try:
            self._prune(changes, predictor)
            check_owner(self, in_use=before[2], advise=True)
            if self.repair is not getattr(before[1], "repair", None):
                check_repair(self)
        except BaseException:  # a predictor of somebody's own may raise anything
            self.pruning, self.pruner, self._ranker = before
            raise
        if has_model_args(self):  # a tower that timm made, which may be saved with them
            update_model_args(self, **{name: getattr(self.pruning, name) for name in changes})  # as plain values

    @contextmanager
    def restoring(self) -> Iterator[None]:
        """Gives pruning, prompts and timm's note of both back after a block, whatever changed them inside."""
        before = self.pruning, self.pruner, self._ranker, self._prompts, self.num_prompt_tokens
        with keeping_model_args(self):
            try:
                yield
            finally:
                self.pruning, self.pruner, self._ranker, self._prompts, self.num_prompt_tokens = before

    def _prune(self, changes: dict, predictor: nn.Module | None = None) -> None:
        pruning = validate(Pruning, dict(self.pruning) | changes, "pruning")
        check_schedule(self, pruning)
        ranker, pruner = self._find_ranker(pruning, changes, predictor), None
        if ranker:
            drops = find_drops(self, pruning, ranker[0])
            if any(drops):
                pruner = create_pruner(pruning, ranker[0], drops, self.has_class_token)
                check_prunable(self, pruner)
        repair = self._find_repair(pruning, pruner, "repair_path" in changes)
        if pruner is not None:
            pruner.repair = repair
            weight = getattr(getattr(self.patch_embed, "proj", None), "weight", None)
            weight = next(self.parameters()) if weight is None else weight
            pruner.to(weight.device, weight.dtype).train(self.training)
        self.pruning, self.pruner, self._ranker = pruning, pruner, ranker

    def _find_ranker(self, pruning: Pruning, changes: dict, predictor: nn.Module | None) -> tuple[Reducer, ...]:
        """The reducer that settings ask for; () where nothing leaves and none was ever needed.

        Weights in use go on where none are given, but are tied to their reducer and their first location.
        """
        embed_dim, grid_size, found = self.embed_dim, self.patch_embed.grid_size, ()
        given = predictor is not None or "predictor_path" in changes
        moved = pruning.locations[0] != self.pruning.locations[0] or pruning.reducer != self.pruning.reducer
        if self._ranker and self._ranker[0].fitted and not given and not moved:
            found = (create_ranker(pruning, embed_dim, grid_size, self._ranker[0].predictor),)
            found[0].about = self._ranker[0].about
        elif lets_leave(pruning) or predictor is not None:
            found = (create_ranker(pruning, embed_dim, grid_size, predictor),)
            if predictor is None:  # choosing passes no gradient on; one handed over may be in training elsewhere
                found[0].requires_grad_(False)
        if changes.get("predictor_path") and not (found and found[0].fitted):
            load_predictor(pruning.predictor_path)  # nothing ranks by it now, but a file that is named must be there
        return found

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        if self.pruner is not None and global_pool not in (None, *POOLS[:3]):
            raise UserError(f"pruning does not go with global_pool {global_pool!r}; try 'token', 'avg' or keep_rate 1")
        super().reset_classifier(num_classes, global_pool)

    def set_input_size(self, *args, **kwargs) -> None:
        if self.pruner is not None:
            off = "set_pruning(keep_rate=1, budget=None, drop_counts=None)"
            raise UserError(f"set_input_size would undo the grid that pruning relies on: {off} first")
        super().set_input_size(*args, **kwargs)
        record_input_size(self)

    def embed(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) to the tokens (B, P + N, D) that enter layer 1; here and below P counts prompts too."""
        return self._embed(images, self.prompts)

    def forward_prefix(self, images: Tensor, layer: int) -> Tensor:
        """The full token sequence (B, P + N, D) as it enters `layer` (1 to depth), nothing dropped."""
        x = self.embed(images)
        for block in self._layers(self.prompts)[: layer - 1]:
            x = self._run(block, x)
        return x

    def forward_whole(self, images: Tensor, tokens: Tensor | None = None) -> Tensor:
        """Embeddings (B, E) of the tower as it came: nothing dropped, and no prompts.

        Args:
            tokens: as for `forward_pruned`; not used where there are prompts, which change a sequence from its start.
        """
        if tokens is None or self.prompts is not None:
            return self.forward_suffix(self._embed(images, None), 1, prompted=False)
        return self.forward_suffix(tokens, self.shared_layer, prompted=False)

    def forward_suffix(self, x: Tensor, layer: int, prompted: bool = True, pre_logits: bool = False) -> Tensor:
        """Embeddings (B, E) of token sequences of any length that enter `layer`; no further pruning.

        Args:
            prompted: False for sequences without the prompts in use.
            pre_logits: give what enters the head, (B, D), which of a classifier is the embedding.
        """
        prompts = self.prompts if prompted else None
        blocks = self._layers(prompts)
        for block in blocks[layer - 1 : -1]:
            x = self._run(block, x)
        last = forward_cls(blocks[-1], x) if can_skip_rows(self) else self._run(blocks[-1], x)
        return self._embedding(last, prompts, repaired=False, pre_logits=pre_logits)

    @property
    def shared_layer(self) -> int:
        """The last layer whose input pruning neither touches nor looks at."""
        return 1 if self.pruner is None else self.pruner.shared_layer

    def forward_pruned(
        self, images: Tensor, scores: Tensor | None = None, tokens: Tensor | None = None, mapped: bool = True
    ) -> PrunedOutput:
        """Embeddings, and which patches they rest on.

        Args:
            images: (B, 3, H, W), normalised.
            scores: (B, N), high = keep, to rank by instead of the reducer's own (oracles, controls); then no repair is
                used, since it belongs to the reducer's ranking.
            tokens: (B, P + N, D), what `forward_prefix(images, shared_layer)` gave, for callers that prune the same
                images in many ways.
            mapped: False where nobody asks which token each patch lives in; `source` is None then.
        """
        cls_only = not isinstance(images, Proxy) and self.cls_only  # torch.fx wants every block as a module
        x, state = self._encode(images, scores, cls_only, tokens=tokens, mapped=mapped)
        embedding = self._embedding(x, self.prompts, repaired=scores is None, sizes=state.sizes)
        return PrunedOutput(embedding, state.index, state.scores, state.source(self.num_patches) if mapped else None)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        if self._keeps_all() and (attn_mask is not None or is_causal or not self.cls_only):
            return super().forward(x, attn_mask=attn_mask, is_causal=is_causal)
        cls_only = not isinstance(x, Proxy) and self.cls_only
        x, state = self._encode(without_mask(x, attn_mask, is_causal), cls_only=cls_only, mapped=False)
        return self._embedding(x, self.prompts, repaired=True, sizes=state.sizes)

    def forward_features(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Normed tokens on the full grid (B, P + N, D), zeros where dropped; P without prompts, as timm's."""
        if self._keeps_all():
            return super().forward_features(x, attn_mask=attn_mask, is_causal=is_causal)
        x, state = self._encode(without_mask(x, attn_mask, is_causal))
        return self._full_grid(self._last_norm(x, self.prompts), state)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        output_dict: bool = False,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
    ):
        """timm's, with every map on the full grid and zeros where tokens had left; `stop_early` saves nothing here."""
        fmt = check_format(output_fmt)
        if self._keeps_all():
            return super().forward_intermediates(
                x, indices, return_prefix_tokens, norm, stop_early, fmt, intermediates_only, output_dict,
                attn_mask, is_causal,
            )  # fmt: skip
        wanted, _ = feature_take_indices(len(self.blocks), indices)
        taken: list[Tensor] = []

        def visit(layer: int, y: Tensor, state: TokenState) -> None:
            if layer - 1 in wanted:
                taken.append(self._full_grid(self._last_norm(y, self.prompts) if norm else y, state))

        last, state = self._encode(without_mask(x, attn_mask, is_causal), visit=visit)
        final = None if intermediates_only else self._full_grid(self._last_norm(last, self.prompts), state)
        grid = self.patch_embed.grid_size
        return format_intermediates(taken, final, self.num_prefix_tokens, grid, fmt, return_prefix_tokens, output_dict)

    def macs(self) -> Macs:
        """What one image costs with the settings in force."""
        return count_macs(self, self.pruner, self.cls_only)

    def macs_unpruned(self) -> Macs:
        """What one image costs the tower as it came: with nothing pruned, and no prompts."""
        return Macs(vision_macs(self, num_leading=self.num_prefix_tokens))

    def _keeps_all(self) -> bool:
        return self.pruner is None and self.prompts is None
