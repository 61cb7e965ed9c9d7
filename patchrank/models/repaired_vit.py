"""What an image tower needs to use a repair: a projection in the place of its own, or before it."""

from __future__ import annotations

from torch import Tensor, nn

from patchrank.layers.pruning_block import PruningBlock
from patchrank.layers.repair import Repair, check_head
from patchrank.models.pruning_cfg import Pruning
from patchrank.models.repair_files import check_settings, load_repair
from patchrank.utils.errors import UserError


class RepairedTower:
    """Part of a tower of timm's shape: embeddings of pruned images go through a repair, where there is one.

    It takes the place of the head. One that was solved for a tower without a head stands before the head of a tower
    that has one, so that a classifier reads repaired embeddings.

    The repair hangs on the pruning block. So it comes and goes with what it was solved for, is no part of the tower's
    weights, fingerprints and files, and follows the tower to other devices and precisions.
    """

    @property
    def repair(self) -> Repair | None:
        """What repairs embeddings; None where nothing leaves."""
        return getattr(self.pruner, "repair", None)

    @property
    def repair_leads(self) -> bool:
        """Whether the repair stands before the head, and not in its place."""
        return self.repair is not None and self._is_before_head(self.repair)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """timm's, with the repair; patches that left, rows of zeros, are not pooled.

        Raises:
            UserError: the head got a call of its own (hooks, LoRA), which would not run.
        """
        return self._head_of(x, self.live_sizes(x), pre_logits)

    def _head_of(
        self, x: Tensor, sizes: Tensor | None = None, pre_logits: bool = False, repaired: bool = True
    ) -> Tensor:
        """What pooling and the head, or a repair, make of tokens that stand for `sizes` (B, K) patches."""
        x = self.head_drop(self.fc_norm(self.pool(x, sizes=sizes)))
        if pre_logits:
            return x
        if self.repair is None or not repaired:
            return self._project(x)
        if self.repair_leads:
            return self._project(self.repair(x))
        check_head(self.head)
        return self.repair(x)

    def _project(self, x: Tensor) -> Tensor:
        return self.head(x)

    def _is_before_head(self, repair: Repair) -> bool:
        return repair.headless and not isinstance(self.head, nn.Identity)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        if self.repair is not None and not self.repair.headless:
            raise UserError(
                "a repair takes the place of the head that is reset; try set_pruning(repair_path=None) first"
            )
        super().reset_classifier(num_classes, global_pool)

    def _hold(self, prompts: nn.Module | None) -> None:
        if prompts is not None and self.repair is not None:
            raise UserError(
                f"{self.repair.source}: solved without prompts, so the two exclude each other; "
                "try set_pruning(repair_path=None) first"
            )
        super()._hold(prompts)

    def _find_repair(self, pruning: Pruning, pruner: PruningBlock | None, given: bool) -> Repair | None:
        """The repair that settings name: the one in use goes on where none is given, if it fits them.

        Raises:
            UserError: it cannot be read, or was solved for other settings; prompts are in use.
        """
        if pruning.repair_path is None or (pruner is None and not given):
            return None
        repair = load_repair(pruning.repair_path) if given or self.repair is None else self.repair
        if pruner is None:  # nothing leaves now, but a file that is named must be there
            return None
        leads = self._is_before_head(repair)
        if not leads:
            check_head(self.head)
        ours = self.embed_dim if leads else self.num_classes or self.embed_dim, self.embed_dim
        if (theirs := tuple(repair.weight.shape)) != ours:
            raise UserError(f"{repair.source}: of shape {theirs}, but this tower's projection has {ours}")
        check_settings(repair, pruning, pruner.drops, pruner.reducer)
        if self.prompts is not None:
            raise UserError(
                f"{repair.source}: solved without prompts, which this tower has; try repair_path=None, or "
                "set_prompts(None)"
            )
        return repair
