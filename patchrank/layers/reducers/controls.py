"""Rankings that cost next to nothing: A-ViT's halting channel with its controls, pixels, and what an MLP changes.

None needs training or attention. Whoever claims that a learned ranking is worth its cost has to beat them.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from patchrank.layers.pruning import z_scored
from patchrank.layers.reducers.base import Reducer, register_reducer
from patchrank.layers.token_state import TokenState

torch.fx.wrap("z_scored")  # asks for the type of what it is given, which torch.fx does not know


@register_reducer("avit")
class AVit(Reducer):
    """A-ViT in rank form: the tokens with the largest sum of halting inputs so far leave.

    A-ViT lets a token halt by channel 0 of its embedding, which training turns into a halting unit. Its authors define
    no form without training, so this is a reading of ours: in each layer that has run, channel 0 is z-scored over the
    patches of an image, and a token's score is minus the sum over these layers. A fixed number of tokens leaves at each
    location, and the output is not averaged over layers. Expect it to be near random.
    """

    observes = "all"
    ranks_anew = True
    first_location = 2
    channel = 0
    sign = -1.0

    def observe(self, state: TokenState, layer: int, scores: Tensor | None) -> TokenState:
        if layer == 1:  # no layer has run yet
            return state
        halting = z_scored(state.tokens[..., self.channel].float())
        return replace(state, carried=halting if state.carried is None else state.carried + halting)

    def score(self, state: TokenState) -> Tensor:
        return self.sign * state.carried


@register_reducer("avit_flipped")
class AVitFlipped(AVit):
    """A control of `avit` with the sign flipped: the tokens with the smallest sum leave."""

    sign = 1.0


@register_reducer("avit_channel")
class AVitChannel(AVit):
    """A control of `avit` by another channel than 0, drawn at random.

    Args:
        embed_dim: number of channels.
        seed: of the draw.
    """

    def __init__(self, embed_dim: int, seed: int = 0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.channel = int(torch.randint(1, embed_dim, (), generator=generator, device="cpu"))


@register_reducer("pixel_variance")
class PixelVariance(Reducer):
    """Patches of many different pixels stay, as in the Visual Word Tokenizer: the ranking is there before layer 1.

    The score is the variance over all pixels and colours of a patch, in the image as the tower gets it (normalised).
    """

    needs = ("pixels",)

    def score(self, state: TokenState) -> Tensor:
        return state.pixels.float().var(dim=-1, unbiased=False)


@register_reducer("mlp_shift")
class MlpShift(Reducer):
    """Representation shift: the tokens that the MLP of the layer before changed most stay, ranked anew each time."""

    needs = ("shift",)
    ranks_anew = True
    first_location = 2

    def score(self, state: TokenState) -> Tensor:
        return state.shift
