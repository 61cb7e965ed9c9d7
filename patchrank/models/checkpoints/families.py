"""Models that are not taken, told apart by the names of their weights, so that an error can say what they are."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

from patchrank.utils.errors import UserError

CLIP = "the weights of a CLIP whose image tower is a vision transformer, such as ViT-B-16"


class Family(NamedTuple):
    """A kind of model that is not taken.

    pattern: found in the name of at least one weight of every such model, and in none of ours.
    hint: what to try instead.
    """

    name: str
    pattern: str
    hint: str = CLIP


# The first whose pattern is found is named, so that special kinds stand before those that they are made of.
FAMILIES = (
    Family(
        "a LoRA or PEFT adapter",
        r"lora_[AB]\b|lora_(down|up|embedding)|^base_model\.model\.",
        "merging it into its model first (with PEFT: model.merge_and_unload()) and saving that model's weights",
    ),
    Family("CoCa", r"^text_decoder\.(resblocks|cross_attn)\."),
    Family("BLIP or ALBEF", r"^(visual_encoder|qformer|Qformer|query_tokens|text_decoder\.bert)\b"),
    Family("a masked autoencoder (MAE)", r"(^|\.)decoder_(blocks|embed|pos_embed)\b"),
    Family("BEiT or Swin", r"\.relative_position_(bias_table|index)$"),
    Family(
        "DINOv2, or of another tower with scaled layers",
        r"(^|\.)mask_token$|layer_scale1\.lambda1$|^(trunk\.)?blocks\.\d+\.ls1\.gamma$",
    ),
    Family(
        "a model with a convolutional image tower (ConvNeXt, FastViT, ViTamin, ALIGN)",
        r"^(visual\.)?(trunk\.)?(stem|stages)\.|\.patch_embed\.backbone\.|^vision_model\.embeddings\.convolution\.",
    ),
    Family(
        "EVA, EVA-CLIP or DINOv3", r"\.attn\.(q_bias|q_proj\.\w+|inner_attn_ln\.\w+)$|\.mlp\.(fc1_g|w1)\.|(^|\.)rope\."
    ),
    Family("SigLIP, or of another CLIP with attention pooling", r"(^|\.)attn_pool\.|^vision_model\.head\.(probe|att)"),
    Family("a ResNet, or of a CLIP with one", r"^(visual\.)?(layer[1-4]\.\d+\.|attnpool\.)"),
    Family(
        "a vision transformer of Hugging Face that is no CLIP (ViT, DINO, BEiT)",
        r"(^|\.)embeddings\.patch_embeddings\.projection\.",
    ),
    Family(
        "a CLIP whose text tower is a language model (RoBERTa, T5)",
        r"^text\.transformer\.(embeddings|encoder|roberta|shared)\.",
    ),
    Family(
        "a vision transformer that is built otherwise than CLIP's (ViT, DeiT, DINO)", r"(^|\.)patch_embed\.proj\.bias$"
    ),
)
TEXT_ALONE = Family(
    "a text model alone", r"^(bert|roberta|text_model|transformer|encoder|embeddings|token_embedding)\."
)
IMAGES = re.compile(r"visual|vision|image|patch|conv")


@contextmanager
def naming_family(keys: Iterable[str], ours: Iterable[str], source: str) -> Iterator[None]:
    """Weights that a block refuses are named, if their keys tell that they belong to another kind of model.

    Args:
        keys: names of the weights, by their writer.
        ours: names of the weights of the image tower that they were meant for, which tell nothing.
        source: what errors call the weights.

    Raises:
        UserError: in place of the block's own.
    """
    try:
        yield
    except UserError as error:
        own = {f"{prefix}{key}" for key in ours for prefix in ("", "visual.", "visual.trunk.")}
        found = find_family(sorted(set(keys) - own))
        if found is None:
            raise
        family, key = found
        says = f"these are weights of {family.name} (as {key!r} shows), which patchrank does not take"
        raise UserError(f"{source}: {says}; try {family.hint}") from error


def find_family(keys: list[str]) -> tuple[Family, str] | None:
    """The family that keys belong to, and the first key that shows it; None where no pattern is found."""
    for family in FAMILIES:
        shown = next((key for key in keys if re.search(family.pattern, key)), None)
        if shown is not None:
            return family, shown
    if any(IMAGES.search(key) for key in keys):
        return None
    shown = next((key for key in keys if re.search(TEXT_ALONE.pattern, key)), None)
    return shown and (TEXT_ALONE, shown)
