"""Pairs and image towers by name, whoever made them."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import timm
from torch import nn

from patchrank.layers.macs import text_macs
from patchrank.models import text as clip_text
from patchrank.models.checkpoints.hub import download_pair
from patchrank.models.checkpoints.load import load_pair
from patchrank.models.from_timm import create_timm, create_timm_tower
from patchrank.models.model_name import HF, LOCAL, TIMM, is_open_clip, prefix_of
from patchrank.models.pair import Clip
from patchrank.models.patchrank_vit import THEIRS
from patchrank.models.pretrained import TEXT_CFGS, by_open_clips_name, find_weights
from patchrank.models.prompt_files import load_prompts
from patchrank.utils.device import check_device
from patchrank.utils.errors import UserError


def create_clip(
    name: str,
    pretrained: bool = True,
    checkpoint: str | Path | None = None,
    device: str = "cpu",
    prompts: str | Path | None = None,
    **pruning,
) -> Clip:
    """An image tower, in evaluation mode, with its text tower and tokenizer or its classifier, where it has one.

    Args:
        name: one of our timm entrypoints, with or without a tag; one of timm's vision transformers (`timm:NAME`); a
            model of transformers, by its repository on the hub or its folder (`hf:REPO`, `hf:FOLDER`); a folder that
            timm or `save_pretrained` wrote (`local-dir:FOLDER`); or a model of open_clip's, by the file of its config
            (`open_clip:CONFIG.json`), or by a name that open_clip knows (`open_clip:NAME`, `open_clip:NAME/TAG`).
        pretrained: load the tag's weights: those that ship with the package, or the published ones from their hub.
        checkpoint: file of weights to load instead. Of our CLIP entries and open_clip's models that of a pair: ours,
            open_clip's, OpenAI's or Hugging Face's `CLIPModel`; of others by the names of the library that has the
            model.
        prompts: file of learned tokens to insert into both towers.
        **pruning: keyword arguments of the entrypoint; `img_size` among them, to which `transform` resizes then. Of
            other models `img_size` and the fields of `patchrank.models.pruning_cfg.Pruning`.

    Raises:
        UserError: an unknown name, a config that is none or whose towers ours cannot reproduce, weights that cannot be
            reached, a checkpoint of another architecture, prompts that were tuned with another pair, or a device that
            is not there.
    """
    if pretrained not in (True, False):
        meant = by_open_clips_name(str(name), pretrained) if isinstance(pretrained, str) else []
        example = meant[0].name if meant else f"{name}.{pretrained}"
        raise UserError(
            f"create_clip: pretrained is {pretrained!r}, but must be True or False; a tag stands in the name, so try "
            f"create_clip({example!r}), or checkpoint=FILE"
        )
    check_device(device)
    if "prompts_path" in pruning:
        raise UserError("prompts_path is for an image tower alone; of a pair it is prompts=FILE")
    clip = _creator(name)(name, pretrained, checkpoint, **pruning)
    if prompts is not None:
        clip.set_prompts(load_prompts(prompts)[0].to(device))
    return clip.eval().to(device)


def create_tower(name: str, **pruning) -> nn.Module:
    """The image tower of `create_clip` alone, with random weights. Raises `UserError` as `create_clip` does."""
    if is_open_clip(name):
        from patchrank.models.open_clip.by_name import create_open_clip_tower

        return create_open_clip_tower(name, **pruning)
    if prefix_of(name) == HF:
        _check_transformers(name)
        from patchrank.models.hugging_face.by_name import create_hub_tower

        return create_hub_tower(name, **pruning)
    if is_without_text(name):
        return create_timm_tower(name, **pruning)
    find_weights(name)  # which says more than timm of a name that does not exist
    return timm.create_model(name, **pruning).eval()


def _creator(name: str) -> Callable[..., Clip]:
    """What makes the pair of a name, on the CPU; it takes the arguments of `create_clip`."""
    if is_open_clip(name):
        from patchrank.models.open_clip.by_name import create_open_clip

        return create_open_clip
    if prefix_of(name) == HF:
        _check_transformers(name)
        from patchrank.models.hugging_face.by_name import create_hub

        return create_hub
    return create_timm if is_without_text(name) else _create_own


def _check_transformers(name: str) -> None:
    """Raises `UserError` where transformers, which a name asks for, is not installed."""
    if find_spec("transformers") is None:
        raise UserError(f"model {name}: the package transformers is missing; try pip install 'transformers>=5'")


def is_without_text(name: object) -> bool:
    """Whether a name means an image tower of timm's kind that has no text tower."""
    return prefix_of(name) in (TIMM, LOCAL) or (isinstance(name, str) and name.partition(".")[0] in THEIRS)


def _create_own(name: str, pretrained: bool, checkpoint: str | Path | None, **pruning) -> Clip:
    """The pair of an entry of ours, on the CPU; arguments as for `create_clip`."""
    weights = find_weights(name)
    source = checkpoint if checkpoint is not None or not pretrained else weights.file or download_pair(weights)
    ships = pretrained and checkpoint is None and weights.file is not None
    visual = timm.create_model(name, pretrained=ships, **pruning)  # with its predictor, where one ships
    quick_gelu = type(visual.blocks[0].mlp.act).__name__ == "QuickGELU"  # OpenAI's, which the text tower has as well
    clip = Clip(name, visual, clip_text.create_text_tower(quick_gelu, **TEXT_CFGS[weights.entry]))
    if source is not None:
        load_pair(clip, source)
    return clip


def macs_row(clip: Clip) -> dict[str, float]:
    """GMACs of one image with the pruning in force and without, of its ranking, of its matching, and of one caption.

    There is no figure of matching where no tokens are compared, and none of captions without a text tower.
    """
    macs, plain = clip.visual.macs(), clip.visual.macs_unpruned()
    matching = {"gmacs_matching": macs.matching / 1e9} if macs.matching else {}
    text = {"gmacs_text": text_macs(*clip_text.text_shape(clip.text)) / 1e9} if clip.has_text else {}
    return {
        "gmacs": macs.image / 1e9,
        "gmacs_unpruned": plain.image / 1e9,
        "gmacs_predictor": macs.predictor / 1e9,
        **matching,
        **text,
    }
