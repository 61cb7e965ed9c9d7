"""The zero-shot head: class embeddings made of names, by templates or by learned text tokens."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from patchrank.io import content_id, join, read_bytes, weights_sha256, write_atomic
from patchrank.layers.prompts import Prompts
from patchrank.models import text as clip_text
from patchrank.models.captions import Template, check_classes, check_templates, fill
from patchrank.utils.errors import StoreError, UserError
from patchrank.utils.private_names import version_of

KEEP_FROM = 256  # prompts: fewer are embedded faster than found

Names = tuple[str, ...]  # of classes, or their captions by one template


class ZeroShot:
    """Part of a pair: its class embeddings, and where they are kept.

    Attributes:
        heads: folder or fsspec URL where class embeddings are kept between processes, by what they depend on; None
            keeps none.
    """

    def __init__(self):
        super().__init__()
        self.heads: str | None = None
        self._heads: dict[tuple, Tensor] = {}  # by weights, classes, templates and prompts
        self._prompted_ids: dict[tuple, Tensor] = {}

    def zero_shot_head(self, classes: Iterable[str], templates: Iterable[Template], prompted: bool = True) -> Tensor:
        """Class embeddings (C, E): unit vectors of every template, averaged, made unit vectors again.

        Where learned text tokens are in use, they take the place of all templates. Cached while the pair is in
        evaluation mode and the text tower's weights stay as they are.

        Args:
            classes: names, in the order of the labels.
            templates: sentences with one `{}` for a name, or functions from a name to a sentence, as open_clip's are.
            prompted: False for the class embeddings of the pair as it came, whatever prompts are in use.

        Raises:
            UserError: one name or template instead of a list, none at all, what is no name or no template, or a model
                without a text tower.
        """
        classes = check_classes(classes)
        self.check_text()
        # a function gives way to its captions: what it does may change, so caches must not know it by what it is
        templates = tuple(
            template if isinstance(template, str) else fill(template, classes)
            for template in check_templates(templates)
        )
        prompts = self.prompts if prompted and self.prompts is not None and self.prompts.inserts_text else None
        if self.training:
            return self._make_head(classes, templates, prompts)
        weights = tuple((weight.data_ptr(), version_of(weight)) for weight in self.text.parameters())
        key = weights, classes, templates, None if prompts is None else prompts.sha256()
        head = self._heads.get(key)
        if head is None:
            head = self._kept_head(classes, templates, prompts)
            # heads of other weights go; threads may read the old dictionary, so a new one takes its place
            self._heads = {k: kept for k, kept in self._heads.items() if k[0] == weights} | {key: head}
        return head

    def _kept_head(self, classes: Names, templates: tuple[str | Names, ...], prompts: Prompts | None) -> Tensor:
        """From the folder of heads, where there is one; large ones are kept there once they are made."""
        if self.heads is None or len(classes) * len(templates) < KEEP_FROM:
            return self._make_head(classes, templates, prompts)
        about = {"text": weights_sha256(self.text), "classes": list(classes), "templates": list(templates)}
        about |= {} if prompts is None else {"prompts": prompts.sha256()}
        path = join(self.heads, f"{content_id(about)}.safetensors")
        try:
            return load(read_bytes(path))["head"].to(self.logit_scale.device)
        except (FileNotFoundError, NotADirectoryError, SafetensorError, KeyError):
            head = self._make_head(classes, templates, prompts)
        try:
            write_atomic(path, save({"head": head.cpu().contiguous()}))
        except StoreError:
            raise
        except UserError as error:  # as for a user without a home: slower the next time, and no more
            warnings.warn(f"class embeddings are not kept ({error}); try PATCHRANK_CACHE=FOLDER", stacklevel=2)
        return head

    @torch.no_grad()
    def _make_head(self, classes: Names, templates: tuple[str | Names, ...], prompts: Prompts | None) -> Tensor:
        with torch.inference_mode(False):  # a cached head may later stand in a graph
            if prompts is not None:
                return self.prompted_head(classes, prompts)
            filled = [fill(each, classes) if isinstance(each, str) else each for each in templates]
            texts = [text for of_class in zip(*filled) for text in of_class]
            if self.tokenizer is None and (cut := clip_text.too_long(texts, self.context_length)):
                warnings.warn(
                    f"{len(cut)} of {len(texts)} captions are longer than the {self.context_length} tokens of the text "
                    f"tower, and are cut, such as {cut[0][:80]!r}...; try shorter names",
                    stacklevel=2,
                )
            rows = clip_text.encode_texts(self.encode_text, texts, "class embeddings")
            return F.normalize(rows.view(len(classes), len(templates), -1).mean(1), dim=-1)

    def prompted_head(self, classes: Sequence[str], prompts: Prompts) -> Tensor:
        """Class embeddings (C, E), unit vectors, of `{learned tokens} {name}.`; gradients reach the prompts.

        Raises:
            UserError: prompts of mode V or of other classes, a class name that leaves no room for them, or no list of
                names.
        """
        classes = check_classes(classes)
        learned, key = prompts.textual(classes), (tuple(classes), prompts.num_tokens)
        ids = self._prompted_ids.get(key)
        if ids is None:  # training asks for the same ones at every step, so the last ones are kept
            with torch.inference_mode(False):  # they may later stand in a graph
                ids = clip_text.tokenize_prompted(self.tokenize, classes, prompts.num_tokens)
            self._prompted_ids = {key: ids}
        ids, rows = ids.to(self.logit_scale.device), []
        for start in range(0, len(ids), clip_text.BATCH_SIZE):
            part = slice(start, start + clip_text.BATCH_SIZE)
            rows.append(clip_text.encode_tokens(self.text, ids[part], learned if learned.ndim == 2 else learned[part]))
        return F.normalize(torch.cat(rows), dim=-1)
