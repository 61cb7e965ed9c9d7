"""The pair: one of our image towers and its text tower."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from timm.data import create_transform, resolve_data_config
from torch import Tensor, nn
from torchvision.transforms import Compose

from patchrank.io import weights_sha256
from patchrank.layers.prompts import Prompts
from patchrank.models import text as clip_text
from patchrank.models.captions import check_texts
from patchrank.models.fingerprints import Fingerprinted
from patchrank.models.prompt_files import check_pair
from patchrank.models.zero_shot import ZeroShot
from patchrank.utils.errors import UserError


class Clip(ZeroShot, Fingerprinted):
    """An image tower and a text tower with a common embedding space; all embeddings are unit vectors.

    A tower that has no text tower stands here alone: it has embeddings, and of a classifier also answers.

    Args:
        name: of the model; results and shards quote it.
        visual: image tower, (B, 3, H, W) to (B, E).
        text: text tower, (T, 77) token ids to (T, E); None where there is none.
        tokenizer: texts to token ids; CLIP's own if left out.
        classifier: what makes logits (B, C) of embeddings that are not normalised, where the model came with one and
            has no text tower.

    Attributes:
        class_names: what the classifier's classes are called, in the order of its logits; () where nobody says.
    """

    not_counted = ("visual.pruner.",)

    def __init__(
        self,
        name: str,
        visual: nn.Module,
        text: nn.Module | None,
        tokenizer: Callable[[Sequence[str]], Tensor] | None = None,
        classifier: nn.Linear | None = None,
    ):
        super().__init__()
        self.name = name
        self.visual = visual
        self.text = text
        self.tokenizer = tokenizer
        self.classifier = classifier
        self.class_names: tuple[str, ...] = ()
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        self._prompts: tuple[Prompts, ...] = ()  # in a tuple, so that they are no part of the pair's weights

    @property
    def has_text(self) -> bool:
        """Whether classes and captions have embeddings."""
        return self.text is not None

    @property
    def context_length(self) -> int:
        """How many tokens the text tower takes, with start and end."""
        return getattr(self.text, "context_length", clip_text.CONTEXT_LENGTH)

    def tokenize(self, texts: str | Sequence[str]) -> Tensor:
        """Token ids, (T, 77), of several texts or one. What does not fit is cut.

        Raises:
            UserError: something else than texts, none, or a model without a text tower.
        """
        texts = check_texts(texts)
        self.check_text()
        if self.tokenizer is not None:
            return self.tokenizer(texts)
        return clip_text.tokenize(texts, self.context_length)

    def check_text(self) -> None:
        """Raises `UserError` where there is no text tower."""
        if self.text is None:
            raise UserError(
                f"model {self.name} has no text tower, so classes and captions have no embeddings; try without them, "
                "or a pair such as open_clip:ViT-B-16-SigLIP/webli"
            )

    def encode_image(self, images: Tensor) -> Tensor:
        return F.normalize(self.visual(images), dim=-1)

    def encode_text(self, texts: str | Sequence[str]) -> Tensor:
        """Embeddings (T, E) of texts, unit vectors. Raises `UserError` as `tokenize` does."""
        return F.normalize(clip_text.encode_tokens(self.text, self.tokenize(texts).to(self.logit_scale.device)), dim=-1)

    @property
    def prompts(self) -> Prompts | None:
        """The learned tokens in use."""
        return self._prompts[0] if self._prompts else None

    def set_prompts(self, prompts: Prompts | None) -> None:
        """Inserts learned tokens into both towers, or those that their mode says; None takes them out again.

        From then on `zero_shot_head` has the learned text in place of templates in modes T and TV, and the image
        tower carries visual prompts in modes V and TV. They stay a module of their own, so `requires_grad_(False)` on
        the pair freezes all but them. Nothing changes if anything is wrong.

        Raises:
            UserError: they are no prompts, of other widths than the towers, or from a file for another pair.
        """
        if not isinstance(prompts, Prompts | None):
            what = f"but got a {type(prompts).__name__}; try load_prompts(FILE)[0], from patchrank.models.prompt_files"
            raise UserError(f"set_prompts takes a layer of prompts or None, {what}")
        if prompts is not None:
            self.check_text()
            check_pair(self, prompts)
        self.visual.set_prompts(prompts if prompts is not None and prompts.inserts_visual else None)
        self._prompts = () if prompts is None else (prompts,)

    @contextmanager
    def applied(self, predictor: nn.Module | None = None, prompts: Prompts | None = None, **pruning) -> Iterator[None]:
        """The pair with other pruning settings and learned tokens for the length of a block, then as it was before.

        Whatever `set_pruning` and `set_prompts` change inside the block comes to its end with it, too. Blocks may be
        nested. Other threads that use the pair meanwhile see the changes.

        Args:
            predictor, **pruning: as `set_pruning` of the image tower takes them; where there are none, pruning stays.
            prompts: learned tokens to insert into both towers; None leaves those in use.

        Raises:
            UserError: settings or prompts that do not fit; the pair is then as it was.
        """
        held = self._prompts
        try:
            with self.visual.restoring():
                if predictor is not None or pruning:
                    self.visual.set_pruning(predictor, **pruning)
                if prompts is not None:
                    self.set_prompts(prompts)
                yield
        finally:
            self._prompts = held

    def prompts_about(self) -> dict[str, str]:
        """What beside `sha256` decides on embeddings: the fingerprint of prompts in use, {} where none are."""
        return {} if self.prompts is None else {"prompts": self.prompts.sha256()}

    def embed_words(self, words: str) -> Tensor:
        """(n, D_t), what the text tower looks up for the n tokens of some words: a start for prompts."""
        tokens = self.tokenize([words])[0].to(self.logit_scale.device)
        return self.text.token_embedding(tokens[1 : int(tokens.argmax())]).detach()  # without start and end

    def normalize(self, pixels: Tensor) -> Tensor:
        """Pixels in [0, 1] to what the image tower expects."""
        cfg = self.visual.pretrained_cfg
        mean, std = (pixels.new_tensor(cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
        return (pixels - mean) / std

    def to_pixels(self, images: Tensor) -> np.ndarray:
        """What `transform` made (n, 3, H, W), as pixels (n, H, W, 3) of 0 to 255 again."""
        zero, one = self.normalize(images.new_zeros(3, 1, 1)), self.normalize(images.new_ones(3, 1, 1))
        pixels = (((images - zero) / (one - zero)).clamp(0, 1) * 255).round().byte()
        return pixels.permute(0, 2, 3, 1).cpu().numpy()

    def transform(self) -> Callable[[Image.Image], Tensor]:
        """The evaluation transform: RGB, resize the shorter side, centre crop, normalise.

        It takes PIL images of any mode, and raises `UserError` for arrays. Tensors (3, H, W) must lie in [0, 1].
        """
        usual = create_transform(**resolve_data_config(model=self.visual), is_training=False)
        return Compose([_as_rgb, *usual.transforms])

    def transform_settings(self) -> dict:
        """What `transform` does, as plain values (shards record it)."""
        settings = resolve_data_config(model=self.visual)
        return {k: list(v) if isinstance(v, tuple) else v for k, v in sorted(settings.items())}

    def sha256(self) -> str:
        """Fingerprint of both towers, without any predictor."""
        return weights_sha256(self, self.not_counted)


def _as_rgb(image: Image.Image | Tensor) -> Image.Image | Tensor:
    """What timm's transforms take: they fail with a riddle on pictures of other modes, and on arrays."""
    if isinstance(image, Image.Image):
        return image if image.mode == "RGB" else image.convert("RGB")
    if not isinstance(image, Tensor):
        kind = type(image).__name__
        raise UserError(f"the transform takes a PIL image, but got a {kind}; try PIL.Image.open or PIL.Image.fromarray")
    return image
