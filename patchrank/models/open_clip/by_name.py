"""The pair that `open_clip:...` names: open_clip's own model from its config, with our image tower and its weights."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import NamedTuple

from open_clip import CLIP, CLIPTextCfg, CLIPVisionCfg, CustomTextCLIP, SimpleTokenizer
from open_clip.factory import get_model_config, list_models
from open_clip.model import set_model_preprocess_cfg
from open_clip.pretrained import get_pretrained_cfg, list_pretrained_tags_by_model
from open_clip.tokenizer import HFTokenizer
from open_clip.transform import PreprocessCfg, merge_preprocess_dict
from torch import Tensor, nn

from patchrank.models.checkpoints.hub import TOKENIZER_FILES, download_open_clip, ensure_reachable
from patchrank.models.checkpoints.load import load_pair
from patchrank.models.model_name import FORMS, OPEN_CLIP, config_file, read_config, stable_name
from patchrank.models.open_clip.pair import from_open_clip
from patchrank.models.open_clip.prune import prune_open_clip, strange_parts
from patchrank.models.open_clip.visual import OpenClipTrunk, OpenClipVisual
from patchrank.models.pair import Clip
from patchrank.models.pruning_cfg import usual_locations
from patchrank.models.text import VOCAB_SIZE
from patchrank.utils.errors import UserError, near, one_line

MAX_REASON = 200  # characters
TEXT_KINDS = "a text tower of open_clip's own, given by width, heads and layers"


class Config(NamedTuple):
    """What a name says of a model.

    model: open_clip's settings of both towers.
    preprocess: what differs from open_clip's usual preparation of images.
    weights: model and tag of weights that open_clip knows; None where the name has no tag.
    """

    model: dict
    preprocess: dict
    weights: tuple[str, str] | None = None


def create_open_clip(
    name: str,
    pretrained: bool = True,
    checkpoint: str | Path | None = None,
    img_size: int | None = None,
    **pruning,
) -> Clip:
    """The pair of a name such as `open_clip:CONFIG.json`, on the CPU; arguments as for `create_clip`.

    Where nothing is pruned and no `locations` are named, a tower of fewer layers than the usual ones ask for has those
    of them that it can have.

    Raises:
        UserError: no such config, a model that ours cannot reproduce, weights that are missing or do not fit, or
            impossible settings of pruning.
    """
    source, config = f"model {name}", find_config(name)
    if pretrained and checkpoint is None and config.weights is None:
        raise UserError(f"{source}: names no weights; try {_other_weights(name)}")
    model = create_model(config, source, img_size)
    tokenizer = _create_tokenizer(config.model["text_cfg"], source)
    pruning |= usual_locations(_depth(model.visual), pruning)
    try:
        prune_open_clip(model, **{key: pruning[key] for key in ("locations",) if key in pruning})
        clip = from_open_clip(model, stable_name(name), tokenizer)
    except UserError as error:
        raise UserError(f"{source}: {error}") from error
    clip.logit_scale = nn.Parameter(model.logit_scale.detach().reshape(()))  # some have a vector of one
    if checkpoint is not None or pretrained:
        load_pair(clip, checkpoint or download_open_clip(*config.weights), _open_clips_names(model.visual))
    clip.visual.set_pruning(**pruning)  # once the weights are there that a predictor's file is compared with
    return clip


def create_open_clip_tower(name: str, img_size: int | None = None, **pruning) -> OpenClipTrunk:
    """The image tower of `create_open_clip` alone, with random weights. Raises `UserError` as that does."""
    model = create_model(find_config(name), f"model {name}", img_size)
    return prune_open_clip(model, **pruning | usual_locations(_depth(model.visual), pruning)).visual.trunk


def find_config(name: str) -> Config:
    """The config that a name holds or names.

    Raises:
        UserError: a file that is no config, a name or a tag that open_clip does not know, or a tag whose weights were
            trained with another activation than the config says.
    """
    file, stated = config_file(name), name.removeprefix(OPEN_CLIP)
    if file is not None:
        read = read_config(file)
        return Config(read["model_cfg"], read["preprocess_cfg"])
    if not stated:
        raise UserError(f"model {name!r}: names no model; try {FORMS}")
    model, slash, tag = stated.partition("/")
    if model not in list_models():
        close = get_close_matches(stated.replace("/", "-"), list_models(), n=1, cutoff=0.5)
        hint = f"{OPEN_CLIP}{close[0]}" if close else "one of open_clip.list_models()"
        raise UserError(
            f"model {name!r}: open_clip knows no such config, and a config's file ends in .json; try {hint}"
        )
    return _with_tag(name, model, tag) if slash else Config(get_model_config(model), {})


def _with_tag(name: str, model: str, tag: str) -> Config:
    """The config of a model that open_clip knows, with a tag's weights and preparation of images."""
    config, known, about = get_model_config(model), list_pretrained_tags_by_model(model), get_pretrained_cfg(model, tag)
    if tag not in known:
        hint = near(tag, known) if known else f"it knows none of {model}; try {OPEN_CLIP}{model} with a checkpoint"
        raise UserError(f"model {name!r}: open_clip knows no such tag; {hint}")
    quick = about.get("quick_gelu", False)
    if quick != config.get("quick_gelu", False):  # it would run, and be less accurate
        other = f"{model}-quickgelu" if quick else model.removesuffix("-quickgelu")
        trained = "quick GELU" if quick else "GELU"
        raise UserError(f"model {name!r}: these weights were trained with {trained}; try {OPEN_CLIP}{other}/{tag}")
    return Config(config, about, (model, tag))


def create_model(config: Config, source: str, img_size: int | None = None) -> CLIP | CustomTextCLIP:
    """open_clip's model of a config, with random weights, as its factory makes it.

    Raises:
        UserError: an image size, settings that open_clip does not know or cannot make a model of, or a tower that ours
            cannot replace.
    """
    if img_size is not None:
        raise UserError(f"{source}: img_size is for entries of ours; try image_size in the config's vision_cfg")
    settings = {key: value for key, value in config.model.items() if key != "custom_text"}
    _check_settings(settings, source)
    settings["vision_cfg"] = settings["vision_cfg"] | {"timm_model_pretrained": False}
    kind = CustomTextCLIP if config.model.get("custom_text") else CLIP
    try:
        model = kind(**settings).eval()
        images = merge_preprocess_dict(PreprocessCfg(), config.preprocess) | {"size": model.visual.image_size}
        PreprocessCfg(**images)  # which checks them
    except Exception as error:  # of whatever kind its parts raise
        raise UserError(f"{source}: open_clip cannot make it ({one_line(error)[:MAX_REASON]})") from error
    for feature in strange_parts(model.visual):
        takes = "open_clip's own vision transformers, pooled by the class token, and timm's"
        raise UserError(f"{source}: its image tower has {feature}, which ours cannot reproduce; try {takes}")
    set_model_preprocess_cfg(model, images)
    return model


def _check_settings(settings: dict, source: str) -> None:
    """Refuses keys that open_clip does not know, and text towers that are none of its own."""
    if "multimodal_cfg" in settings:
        raise UserError(f"{source}: multimodal_cfg makes it a CoCa, which patchrank does not take; try a CLIP")
    known = {"": [key for key in inspect.signature(CLIP).parameters if key not in ("cast_dtype", "output_dict")]}
    for section, schema in (("vision_cfg", CLIPVisionCfg), ("text_cfg", CLIPTextCfg)):
        if not isinstance(settings[section], dict):
            raise UserError(f"{source}: {section} must hold a mapping, but holds {settings[section]!r}")
        known[section] = [field.name for field in dataclasses.fields(schema)]
    text = settings["text_cfg"]
    if text.get("hf_model_name"):
        raise UserError(f"{source}: text_cfg.hf_model_name asks for a text tower of Hugging Face; try {TEXT_KINDS}")
    if text.get("output_tokens"):
        raise UserError(f"{source}: text_cfg.output_tokens is for captioning; try false")
    for section, keys in known.items():
        for key in settings[section] if section else settings:
            if key not in keys:
                place = f"{section}.{key}" if section else key
                raise UserError(f"{source}: key {place!r} does not exist in open_clip's configs; {near(key, keys)}")


def _create_tokenizer(text: dict, source: str) -> Callable[[Sequence[str]], Tensor] | None:
    """What open_clip takes for a text tower; None for CLIP's own tokens.

    Raises:
        UserError: a tokenizer of Hugging Face that cannot be had, or another vocabulary and no tokenizer for it.
    """
    settings = {"context_length": text.get("context_length", CLIPTextCfg.context_length)}
    more = text.get("tokenizer_kwargs") or {}
    if "trust_remote_code" in more:
        raise UserError(
            f"{source}: text_cfg.tokenizer_kwargs: trust_remote_code would run a stranger's code; leave it out"
        )
    if name := text.get("hf_tokenizer_name"):
        try:
            if not Path(name).is_dir():
                ensure_reachable(name, TOKENIZER_FILES, whole=True)
            return HFTokenizer(name, **settings, tokenizer_mode=text.get("tokenizer_mode"), **more)
        except UserError as error:
            raise UserError(f"{source}: text_cfg.hf_tokenizer_name: {error}") from error
        except Exception as error:  # its libraries' own kinds
            reason = one_line(error)[:MAX_REASON]
            raise UserError(f"{source}: text_cfg.hf_tokenizer_name {name!r} cannot be had ({reason})") from error
    if (size := text.get("vocab_size", VOCAB_SIZE)) != VOCAB_SIZE:
        whose = f"{VOCAB_SIZE} of CLIP's tokenizer"
        raise UserError(f"{source}: text_cfg.vocab_size is {size}, not the {whose}; try to name its hf_tokenizer_name")
    try:
        return SimpleTokenizer(**settings, **more) if more else None
    except Exception as error:
        raise UserError(f"{source}: text_cfg.tokenizer_kwargs {more} ({one_line(error)[:MAX_REASON]})") from error


def _depth(visual: nn.Module) -> int:
    """How many layers an image tower of open_clip's has."""
    return len(visual.trunk.blocks if hasattr(visual, "trunk") else visual.transformer.resblocks)


def _open_clips_names(visual: nn.Module) -> dict[str, str]:
    """open_clip's name of each weight of the image tower, by timm's."""
    if isinstance(visual, OpenClipVisual):
        return {ours: f"visual.{theirs}" for theirs, ours in visual.names.items()}
    return {key: f"visual.trunk.{key}" for key in visual.trunk.state_dict()}


def _other_weights(name: str) -> str:
    """What to try for a name without weights."""
    tags = [] if config_file(name) else list_pretrained_tags_by_model(name.removeprefix(OPEN_CLIP))
    return "--checkpoint FILE" + (f", or a tag, as in {name}/{tags[0]}" if tags else "")
