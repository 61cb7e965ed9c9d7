"""Prompt layers (section 3.3): learned tokens of both towers. P_t joins the text, and P_v = M P_t the image's sequence.

They are built by name: `textual(classes)` gives the text tower's tokens, `visual()` the image tower's. Sequence order
everywhere is `[CLS, registers, visual prompts, patches]`.

Shapes: b learned tokens, C classes, D_t and D_v the widths of the text and the image tower.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from patchrank.io import content_id, weights_sha256
from patchrank.layers.registry import Registry
from patchrank.utils.errors import UserError, near

PROMPTS = Registry("prompt", always=("mode", "num_tokens", "text_dim", "image_dim"))
register_prompt = PROMPTS.register  # a decorator: makes a class that derives from `Prompts` available to YAML by name
MODES = ("T", "V", "TV")  # which tower's input has learned tokens: the text's, the image's, both
STD = 0.02  # of the start


def create_prompt(
    name: str, mode: str, num_tokens: int, text_dim: int, image_dim: int | None = None, **settings
) -> nn.Module:
    """Builds a registered prompt layer; the arguments are those of `Prompts`.

    Raises:
        UserError: an unknown name, a setting that this layer does not have, or a value that it cannot have.
    """
    return PROMPTS.create(name, mode=mode, num_tokens=num_tokens, text_dim=text_dim, image_dim=image_dim, **settings)


def insert(x: Tensor, tokens: Tensor, place: int) -> Tensor:
    """Puts tokens (n, D) into sequences (B, L, D), so that they begin at `place`: (B, L + n, D)."""
    tokens = tokens.to(x).expand(x.shape[0], -1, -1)
    return torch.cat([x[:, :place], tokens, x[:, place:]], dim=1)


def remove(x: Tensor, place: int, count: int) -> Tensor:
    """Takes `count` tokens out of sequences (B, L, D), from `place` on."""
    return torch.cat([x[:, :place], x[:, place + count :]], dim=1) if count else x


def count_visual(prompts: nn.Module, embed_dim: int) -> int:
    """How many visual tokens there are. Raises `UserError` if they do not fit a tower of width `embed_dim`."""
    with torch.no_grad():
        shape = tuple(prompts.visual().shape)
    if len(shape) != 2 or shape[1] != embed_dim:
        raise UserError(f"visual prompts must have shape (b, {embed_dim}) for this image tower, but have {shape}")
    return shape[0]


@register_prompt("coupled")
class Prompts(nn.Module):
    """Learned text tokens, and the linear map that makes visual tokens of them; the base of all prompt layers.

    Another kind overrides `visual` or `textual`, and may learn more beside `text`.

    Args:
        mode: `T` inserts text tokens and has no map; `V` learns both, but inserts visual tokens alone, beside a
            hand-written text; `TV` inserts both.
        num_tokens: b.
        text_dim: D_t.
        image_dim: D_v; not used in mode T.
        classes: makes text tokens class-specific, one set for each of these names; in mode T alone.
        bias: gives the map a bias, as MaPLe has it; the paper's has none.
        seed: of the start, tokens from N(0, 0.02) and the map from PyTorch's own for linear layers; no global
            generator is touched.
        words: (b, D_t), embeddings of words to start from instead.
        num_norms: how many LayerNorms of the image tower learn a gain each as well; in modes V and TV alone.

    Raises:
        UserError: an unknown mode, class-specific tokens in another mode than T, gains in mode T, or words that are
            not b.

    Attributes:
        text: P_t, (b, D_t) or (C, b, D_t).
        to_visual: M, None in mode T.
        norm_gains: (num_norms, D_v), what comes to 1; None without.
        image_dim, bias: as they were given, None and False in mode T.
        about: what the file of these prompts says of them, {} where they came from no file.
        source: what errors call them.
    """

    def __init__(
        self,
        mode: str,
        num_tokens: int,
        text_dim: int,
        image_dim: int | None = None,
        classes: Sequence[str] | None = None,
        bias: bool = False,
        seed: int = 0,
        words: Tensor | None = None,
        num_norms: int = 0,
    ):
        super().__init__()
        _check(mode, num_tokens, text_dim, classes, words, num_norms)
        self.mode, self.classes = mode, None if classes is None else tuple(classes)
        self.image_dim, self.bias = (None, False) if mode == "T" else (image_dim, bias)
        self.about: dict = {}
        self.source = "prompts"
        generator = torch.Generator().manual_seed(seed)
        shape = (num_tokens, text_dim) if classes is None else (len(classes), num_tokens, text_dim)
        start = STD * torch.randn(shape, generator=generator) if words is None else words.detach().expand(shape)
        self.text = nn.Parameter(start.float().clone(memory_format=torch.contiguous_format))
        self.to_visual = None if mode == "T" else _linear(text_dim, image_dim, bias, generator)
        self.norm_gains = nn.Parameter(torch.zeros(num_norms, image_dim)) if num_norms else None

    @property
    def num_tokens(self) -> int:
        """b, how many tokens are learned for each tower."""
        return self.text.shape[-2]

    @property
    def inserts_text(self) -> bool:
        return "T" in self.mode

    @property
    def inserts_visual(self) -> bool:
        return "V" in self.mode

    def visual(self) -> Tensor:
        """P_v = M P_t, (b, D_v). Raises `UserError` in mode T."""
        if self.to_visual is None:
            raise UserError(f"{self.source}: of mode T, which has no visual part; try mode V or TV")
        return self.to_visual(self.text)

    def textual(self, classes: Sequence[str]) -> Tensor:
        """P_t for these classes: (b, D_t), or (C, b, D_t) if class-specific.

        Raises:
            UserError: in mode V, whose text is hand-written; or class-specific tokens of other classes.
        """
        if not self.inserts_text:
            raise UserError(f"{self.source}: of mode V, beside which text is hand-written; try mode T or TV")
        if self.classes is not None and self.classes != tuple(classes):
            pairs = enumerate(zip(self.classes, classes))
            different = [f"class {n} is {own!r}, not {asked!r}" for n, (own, asked) in pairs if own != asked]
            says = different[0] if different else f"{len(self.classes)}, not {len(classes)}"
            raise UserError(f"{self.source}: learned for classes of its own: {says}")
        return self.text

    def sha256(self) -> str:
        """Fingerprint of all by which they change the output of either tower."""
        what = [self.mode, self.classes, weights_sha256(self, without=())]
        return content_id(what if type(self) is Prompts else [*what, type(self).__name__])


def _linear(in_features: int, out_features: int | None, bias: bool, generator: torch.Generator) -> nn.Linear:
    """A linear layer that starts as PyTorch's own does, from a generator of its own."""
    if out_features is None:
        raise UserError("prompts of modes V and TV need image_dim, the width of the image tower")
    where = torch.get_default_device()  # "meta" where a file's description is checked before anything is made
    layer = nn.utils.skip_init(nn.Linear, in_features, out_features, bias=bias, device=where)
    bound = 1 / math.sqrt(in_features)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.uniform_(-bound, bound, generator=generator)
    return layer


def _check(
    mode: str, num_tokens: int, text_dim: int, classes: Sequence[str] | None, words: Tensor | None, num_norms: int
) -> None:
    if mode not in MODES:
        raise UserError(f"prompt mode {mode!r} does not exist; {near(mode, MODES)}")
    if num_tokens < 1:
        raise UserError(f"num_tokens of prompts must be at least 1, but is {num_tokens}")
    if isinstance(classes, str):
        raise UserError(f"classes of prompts must be a list of names, but is {classes!r}; try [{classes!r}]")
    if classes is not None and mode != "T":
        raise UserError(f"class-specific prompts need mode 'T', since an image's class is not known; mode is {mode!r}")
    if num_norms and mode == "T":
        raise UserError("norm gains are the image tower's, and prompts of mode T have no visual part; try mode V or TV")
    if classes is not None and not classes:
        raise UserError("class-specific prompts need class names, but there are none")
    if words is not None and tuple(words.shape) != (num_tokens, text_dim):
        raise UserError(
            f"words to start from must be ({num_tokens}, {text_dim}), num_tokens and the text tower's width, but are "
            f"{tuple(words.shape)}"
        )
