"""What takes the place of a model's list of layers: it runs them as our tower does."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Literal

from torch import Tensor, nn

from patchrank.layers.token_state import TokenState
from patchrank.utils.errors import UserError

Output = Literal["grid", "kept"]


class Run:
    """One pass of a sequence through a pruned tower's layers, step by step.

    What the steps hand on is on the full grid, as hosts want it; the shorter sequence stays here. So a host may take
    features between any two layers, and nothing stays on the model.

    Args:
        tower: ours, with something to prune. Its `output` says whether a step gives the full grid, with zeros where
            patches left, or the kept tokens alone.
    """

    def __init__(self, tower: nn.Module):
        self.tower = tower
        self.blocks: Sequence[Callable] = ()
        self.x: Tensor | None = None
        self.state: TokenState | None = None

    def begin(self, x: Tensor) -> None:
        """Takes the tokens (B, P + N, D) that enter layer 1. Raises `UserError` where these are of another grid."""
        self.tower.check_host()
        needed = self.tower.num_prefix_tokens + self.tower.num_patches
        if x.shape[1] != needed:
            side = " x ".join(map(str, self.tower.patch_embed.img_size))
            raise UserError(
                f"the model is pruned for images of {side} pixels, {needed} tokens, but got {x.shape[1]} tokens; try "
                "that size, or patchrank.prune(patchrank.unprune(model), img_size=SIDE, ...)"
            )
        self.blocks = self.tower._layers(None)
        self.x, self.state = x, self.tower._begin(x, x, True)

    def step(self, layer: int) -> Tensor:
        """Runs one layer, from 1, and gives its output as the host is to see it."""
        if self.state is None:
            raise UserError("layers of a pruned model run from the first one on; try patchrank.unprune")
        self.x, self.state = self.tower._run_layer(self.blocks, layer, self.x, self.state)
        return self.x if self.tower.output == "kept" else self.tower._full_grid(self.x, self.state)

    def whole(self, x: Tensor) -> Tensor:
        """All layers at once."""
        self.begin(x)
        for layer in range(1, len(self.blocks)):
            self.x, self.state = self.tower._run_layer(self.blocks, layer, self.x, self.state)
        return self.step(len(self.blocks))


class Step:
    """One layer of a `Run`, called as the host calls its layers; every other attribute is the layer's own."""

    def __init__(self, run: Run, layer: int, block: nn.Module):
        vars(self).update(run=run, layer=layer, block=block)

    def __call__(self, x: Tensor, *masks: Tensor | None, **options: object) -> Tensor:
        check_options(self.run.tower.asked(options), masks)
        if self.layer == 1:
            self.run.begin(x)
        return self.run.step(self.layer)

    def __getattr__(self, name: str):
        return getattr(self.block, name)

    def __setattr__(self, name: str, value: object) -> None:
        setattr(self.block, name, value)


class Leads:
    """Part of a module that holds a tower: the predictor is no part of the model, and goes where the model goes."""

    def train(self, mode: bool = True) -> nn.Module:
        super().train(mode)
        return self._lead(lambda pruner: pruner.train(mode))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        super()._apply(fn, recurse)
        return self._lead(lambda pruner: pruner._apply(fn, recurse))

    def _lead(self, change: Callable[[nn.Module], object]) -> nn.Module:
        if (pruner := self.held[0].pruner) is not None:
            change(pruner)
        return self


class RunLayers(Leads, nn.ModuleList):
    """A model's layers under their own names, which run with tokens leaving on the way.

    Called, it runs all of them; iterated or sliced from the start, it gives the steps of one run. While nothing is
    pruned both do what the model's own list does.

    Args:
        tower: ours, around the same modules.
        layers: the model's own list.
    """

    def __init__(self, tower: nn.Module, layers: nn.Sequential | nn.ModuleList):
        super().__init__(layers.children())
        self.held = (tower, layers)  # in a tuple, so that they are no part of the model
        self.training = layers.training

    def forward(self, x: Tensor) -> Tensor:
        tower, _ = self.held
        if tower.pruner is not None:
            return Run(tower).whole(x)
        for layer in self.children():
            x = layer(x)
        return x

    def __iter__(self) -> Iterator[Callable]:
        tower, _ = self.held
        if tower.pruner is None:
            return self.children()
        tower.check_steps()
        run = Run(tower)
        return iter([Step(run, place, layer) for place, layer in enumerate(self.children(), 1)])

    def __getitem__(self, place: int | slice):
        return list(self)[place] if isinstance(place, slice) else list(self.children())[place]

    def __repr__(self) -> str:
        return nn.Module.__repr__(self)


def check_options(options: dict, masks: Sequence[object] = ()) -> None:
    """Raises `UserError` for what a host asks of its layers that pruned layers do not do."""
    for name, value in {"attn_mask": None, **options, **{f"mask {i}": mask for i, mask in enumerate(masks)}}.items():
        wanted = name.startswith(("output_", "attn_mask", "attention_mask", "is_causal", "mask"))
        if wanted and value is not None and value is not False:
            raise UserError(f"{name} does not go together with pruning: tokens leave on the way; try patchrank.unprune")
