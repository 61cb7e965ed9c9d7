"""The pair: one of our image towers, its text tower, and the zero-shot head between them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load, save
from timm.data import create_transform, resolve_data_config
from torch import Tensor, nn

from patchrank.files import content_id, join, read_bytes, weights_sha256, write_atomic
from patchrank.models.checkpoints.download import download_pair
from patchrank.models.checkpoints.reading import load_pair
from patchrank.models.tags import TEXT_CFGS, find_weights
from patchrank.models.text import CONTEXT_LENGTH, create_text_tower, encode_texts, encode_tokens, tokenize

KEEP_FROM = 256  # prompts: fewer are embedded faster than found


class Clip(nn.Module):
    """An image tower and a text tower with a common embedding space; all embeddings are unit vectors.

    Args:
        name: what `create_clip` was asked for; results and shards quote it.
        visual: image tower, (B, 3, H, W) to (B, E).
        text: text tower, (T, 77) token ids to (T, E).
        tokenizer: texts to token ids; CLIP's own if left out.
        heads: folder or fsspec URL where class embeddings are kept between processes, by what they depend on.
    """

    def __init__(
        self,
        name: str,
        visual: nn.Module,
        text: nn.Module,
        tokenizer: Callable[[Sequence[str]], Tensor] | None = None,
        heads: str | None = None,
    ):
        super().__init__()
        self.name = name
        self.visual = visual
        self.text = text
        self.tokenizer = tokenizer
        self.heads = heads
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        self._heads: dict[tuple, Tensor] = {}
        self._heads_of: tuple = ()

    def tokenize(self, texts: Sequence[str]) -> Tensor:
        """Token ids, (T, 77)."""
        if self.tokenizer is not None:
            return self.tokenizer(list(texts))
        return tokenize(texts, getattr(self.text, "context_length", CONTEXT_LENGTH))

    def encode_image(self, images: Tensor) -> Tensor:
        return F.normalize(self.visual(images), dim=-1)

    def encode_text(self, texts: Sequence[str]) -> Tensor:
        return F.normalize(encode_tokens(self.text, self.tokenize(texts).to(self.logit_scale.device)), dim=-1)

    def zero_shot_head(self, classes: Sequence[str], templates: Sequence[str]) -> Tensor:
        """Class embeddings (C, E): unit vectors of every template, averaged, made unit vectors again.

        Cached while the pair is in evaluation mode and the text tower's weights stay as they are.
        """
        if self.training:
            return self._make_head(classes, templates)
        weights = tuple((weight.data_ptr(), weight._version) for weight in self.text.parameters())
        if weights != self._heads_of:  # somebody loaded or tuned others
            self._heads, self._heads_of = {}, weights
        key = (tuple(classes), tuple(templates))
        if key not in self._heads:
            self._heads[key] = self._kept_head(classes, templates)
        return self._heads[key]

    def _kept_head(self, classes: Sequence[str], templates: Sequence[str]) -> Tensor:
        """From the folder of heads, where there is one; large ones are kept there once they are made."""
        if self.heads is None or len(classes) * len(templates) < KEEP_FROM:
            return self._make_head(classes, templates)
        about = {"text": weights_sha256(self.text), "classes": list(classes), "templates": list(templates)}
        path = join(self.heads, f"{content_id(about)}.safetensors")
        try:
            return load(read_bytes(path))["head"].to(self.logit_scale.device)
        except (FileNotFoundError, SafetensorError, KeyError):
            head = self._make_head(classes, templates)
        write_atomic(path, save({"head": head.cpu().contiguous()}))
        return head

    @torch.no_grad()
    def _make_head(self, classes: Sequence[str], templates: Sequence[str]) -> Tensor:
        texts = [template.format(name.replace("_", " ")) for name in classes for template in templates]
        with torch.inference_mode(False):  # a cached head may later stand in a graph
            rows = encode_texts(self.encode_text, texts, "class embeddings")
            return F.normalize(rows.view(len(classes), len(templates), -1).mean(1), dim=-1)

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


def create_clip(
    name: str, pretrained: bool = True, checkpoint: str | Path | None = None, device: str = "cpu", **pruning
) -> Clip:
    """An image tower with its text tower and tokenizer, in evaluation mode.

    Args:
        name: one of our timm entrypoints, with or without a tag.
        pretrained: load the tag's weights: those that ship with the package, or the published ones from their hub.
        checkpoint: file of a pair to load instead: ours, open_clip's, OpenAI's or Hugging Face's `CLIPModel`.
        **pruning: keyword arguments of the entrypoint.

    Raises:
        UserError: an unknown name, weights that cannot be reached, or a checkpoint of another architecture.
    """
    weights = find_weights(name)
    source = checkpoint if checkpoint is not None or not pretrained else weights.file or download_pair(weights)
    ships = pretrained and checkpoint is None and weights.file is not None
    visual = timm.create_model(name, pretrained=ships, **pruning)  # with its predictor, where one ships
    clip = Clip(name, visual, create_text_tower(quick_gelu=has_quick_gelu(visual), **TEXT_CFGS[weights.entry]))
    if source is not None:
        load_pair(clip, source)
    return clip.eval().to(device)


def has_quick_gelu(visual: nn.Module) -> bool:
    """Whether an image tower was built with OpenAI's activation; its text tower has the same."""
    return type(visual.blocks[0].mlp.act).__name__ == "QuickGELU"
