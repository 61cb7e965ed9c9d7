"""A pruned open_clip model as a `Clip`, the pair that our stages take."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from open_clip import CLIP, CustomTextCLIP
from open_clip.transformer import text_global_pool
from torch import Tensor, nn

from patchrank.models.open_clip.prune import check_kind, pruned_trunk
from patchrank.models.pair import Clip
from patchrank.models.text import VOCAB_SIZE
from patchrank.utils.errors import UserError


class OpenClipText(nn.Module):
    """The text tower of open_clip's `CLIP`, whose parts stand beside the image tower; it shares them.

    Parts and attributes have the names of open_clip's `TextTransformer`.
    """

    def __init__(self, model: CLIP):
        super().__init__()
        for name in ("token_embedding", "positional_embedding", "transformer", "ln_final", "text_projection"):
            setattr(self, name, getattr(model, name))
        self.pool_type, self.eos_id = model.text_pool_type, model.text_eos_id
        self.context_length, self.vocab_size = model.context_length, model.vocab_size
        self.width, self.layers = model.transformer.width, model.transformer.layers
        projection = self.text_projection  # none, a layer, or a bare (width, E)
        bare = projection is not None and not isinstance(projection, nn.Linear)
        self.output_dim = projection.shape[1] if bare else getattr(projection, "out_features", self.width)
        self._mask = model.attn_mask

    @property
    def attn_mask(self) -> Tensor | None:
        """Added to attention (L, L), on the device of the weights, which others may move."""
        return None if self._mask is None else self._mask.to(self.positional_embedding.device)

    def forward(self, tokens: Tensor) -> Tensor:
        """Embeddings (T, E) of token ids (T, L): `model.encode_text`, not normalised."""
        dtype = self.transformer.get_cast_dtype()
        x = self.token_embedding(tokens).to(dtype) + self.positional_embedding.to(dtype)
        x = self.ln_final(self.transformer(x, attn_mask=self.attn_mask))
        x = text_global_pool(x, tokens, self.pool_type, eos_token_id=self.eos_id)
        if self.text_projection is None:
            return x
        return self.text_projection(x) if isinstance(self.text_projection, nn.Linear) else x @ self.text_projection


def text_tower(model: CLIP | CustomTextCLIP) -> nn.Module:
    """Token ids (T, L) to embeddings (T, E), not normalised: the text tower of an open_clip model, shared with it."""
    return model.text if isinstance(model, CustomTextCLIP) else OpenClipText(model)


def from_open_clip(
    model: CLIP | CustomTextCLIP, name: str = "open_clip", tokenizer: Callable[[Sequence[str]], Tensor] | None = None
) -> Clip:
    """The pair that our stages take (scoring, fitting, evaluation) from a model of `prune_open_clip`, sharing it all.

    Args:
        model: open_clip's, pruned; `keep_rate=1` will do.
        name: what shards and results will call it.
        tokenizer: texts to token ids, `open_clip.get_tokenizer(...)`; CLIP's own if left out.

    Raises:
        UserError: a model that is not pruned, whose projection is outside of its tower, whose images are padded, or
            which has another vocabulary and no tokenizer is given.
    """
    check_kind("from_open_clip", model)
    trunk = pruned_trunk(model)
    if trunk is None or not isinstance(model, (CLIP, CustomTextCLIP)):
        raise UserError(f"from_open_clip needs a model from prune_open_clip, but this {type(model).__name__} is not")
    if len(getattr(model.visual, "head", ())):
        raise UserError(
            "from_open_clip needs the projection inside the image tower, but timm_proj put it behind; try null"
        )
    if trunk.pretrained_cfg["crop_mode"] == "border":
        raise UserError("from_open_clip cannot pad images as resize_mode 'longest' does; try 'shortest' or 'squash'")
    text = text_tower(model)
    if tokenizer is None and getattr(text, "vocab_size", None) != VOCAB_SIZE:
        raise UserError("this model has another vocabulary than CLIP; try tokenizer=open_clip.get_tokenizer(...)")
    clip = Clip(name, trunk, text, tokenizer)
    clip.logit_scale = model.logit_scale
    return clip.train(model.training)
