"""The pair: one of our image towers, open_clip's text tower, and the zero-shot head between them.

The only file that imports open_clip, and only when a text tower is built: an image tower needs none of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load
from timm.data import create_transform, resolve_data_config
from torch import Tensor, nn

from patchrank.errors import UserError, near
from patchrank.files import read_bytes, weights_sha256
from patchrank.models.pretrained import checkpoint_filter_fn
from patchrank.models.tags import WEIGHTS

CONTEXT_LENGTH = 77
VOCAB_SIZE = 49408  # CLIP's byte-pair vocabulary
TEXT_CFGS = {
    "patchrank_clip_digits": dict(width=64, heads=4, layers=3, output_dim=64),
    "patchrank_clip_b16": dict(width=512, heads=8, layers=12, output_dim=512, quick_gelu=True),
}


class Clip(nn.Module):
    """An image tower and a text tower with a common embedding space; all embeddings are unit vectors.

    Args:
        name: what `create_clip` was asked for; results and shards quote it.
        visual: image tower, (B, 3, H, W) to (B, E).
        text: text tower, (T, 77) token ids to (T, E).
    """

    def __init__(self, name: str, visual: nn.Module, text: nn.Module):
        super().__init__()
        self.name = name
        self.visual = visual
        self.text = text
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        self._heads: dict[tuple, Tensor] = {}
        self.register_load_state_dict_post_hook(_forget_heads)

    def tokenize(self, texts: Sequence[str]) -> Tensor:
        """CLIP's own tokens, (T, 77)."""
        from open_clip.tokenizer import tokenize

        return tokenize(list(texts), context_length=CONTEXT_LENGTH)

    def encode_image(self, images: Tensor) -> Tensor:
        return F.normalize(self.visual(images), dim=-1)

    def encode_text(self, texts: Sequence[str]) -> Tensor:
        return F.normalize(self.text(self.tokenize(texts).to(self.logit_scale.device)), dim=-1)

    @torch.no_grad()
    def zero_shot_head(self, classes: Sequence[str], templates: Sequence[str]) -> Tensor:
        """Class embeddings (C, E): unit vectors of every template, averaged, made unit vectors again.

        Cached while the pair is in evaluation mode, since text never changes between images.
        """
        key = (tuple(classes), tuple(templates), str(self.logit_scale.device))
        if not self.training and key in self._heads:
            return self._heads[key]
        with torch.inference_mode(False):  # a cached head may later stand in a graph
            rows = [self.encode_text([t.format(name.replace("_", " ")) for t in templates]).mean(0) for name in classes]
            head = F.normalize(torch.stack(rows), dim=-1)
        if not self.training:
            self._heads[key] = head
        return head

    def train(self, mode: bool = True) -> Clip:
        self._heads.clear()
        return super().train(mode)

    def normalize(self, pixels: Tensor) -> Tensor:
        """Pixels in [0, 1] to what the image tower expects."""
        cfg = self.visual.pretrained_cfg
        mean, std = (pixels.new_tensor(cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
        return (pixels - mean) / std

    def transform(self) -> Callable[[Image.Image], Tensor]:
        """The evaluation transform: resize the shorter side, centre crop, normalise."""
        return create_transform(**resolve_data_config(model=self.visual), is_training=False)

    def transform_settings(self) -> dict:
        """What `transform` does, as plain values (shards record it)."""
        settings = resolve_data_config(model=self.visual)
        return {k: list(v) if isinstance(v, tuple) else v for k, v in sorted(settings.items())}

    def sha256(self) -> str:
        """Fingerprint of both towers, without any predictor."""
        return weights_sha256(self, without=("visual.pruner.",))


def _forget_heads(clip: Clip, incompatible_keys: object) -> None:
    """Other weights, other class embeddings."""
    clip._heads.clear()


def create_clip(
    name: str, pretrained: bool = True, checkpoint: str | Path | None = None, device: str = "cpu", **pruning
) -> Clip:
    """An image tower with its text tower and tokenizer, in evaluation mode.

    Args:
        name: one of our timm entrypoints, with or without a tag.
        pretrained: load the weights that ship with the package.
        checkpoint: safetensors file of a pair to load instead.
        **pruning: keyword arguments of the entrypoint.

    Raises:
        UserError: an unknown name, no weights to load, or a checkpoint of another architecture.
    """
    arch = name.split(".")[0]
    if arch not in TEXT_CFGS:
        raise UserError(f"model {name!r} does not exist; {near(name, TEXT_CFGS)}")
    known = [model for model in timm.list_models(f"{arch}*", include_tags=True) if model.split(".")[0] == arch]
    if "." in name and name not in known:
        raise UserError(f"model {name!r} does not exist; {near(name, [arch, *known])}")
    shipped = WEIGHTS / f"{arch}.safetensors"
    if pretrained and checkpoint is None and not shipped.exists():
        raise UserError(f"model {name!r} has no weights in the package: give a checkpoint file")
    visual = timm.create_model(name, pretrained=pretrained and checkpoint is None, **pruning)
    clip = Clip(name, visual, create_text_tower(**TEXT_CFGS[arch]))
    if pretrained or checkpoint is not None:
        load_pair(clip, checkpoint or shipped)
    return clip.eval().to(device)


def load_pair(clip: Clip, path: str | Path) -> None:
    """Loads both towers from a safetensors file with `visual.*`, `text.*` and `logit_scale`; fp16 is upcast."""
    try:
        tensors = load(read_bytes(path))
    except (OSError, SafetensorError) as error:
        raise UserError(f"checkpoint {path}: cannot be read as safetensors ({error})") from error
    visual = checkpoint_filter_fn(tensors, clip.visual)
    rest = {key: value for key, value in tensors.items() if not key.startswith("visual.")}
    try:
        clip.load_state_dict({f"visual.{key}": value for key, value in visual.items()} | rest)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:160]
        raise UserError(f"checkpoint {path}: does not fit {clip.name} ({reason})") from error
    clip.visual.check_predictor()


def create_text_tower(quick_gelu: bool = False, **cfg) -> nn.Module:
    """open_clip's `TextTransformer` at CLIP's context length (77) and vocabulary (49,408)."""
    from open_clip.transformer import QuickGELU, TextTransformer

    act_layer = QuickGELU if quick_gelu else nn.GELU
    return TextTransformer(context_length=CONTEXT_LENGTH, vocab_size=VOCAB_SIZE, act_layer=act_layer, **cfg)
