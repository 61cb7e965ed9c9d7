"""The model that `hf:REPO_OR_FOLDER` names: transformers' own modules, and our tower of its image tower's parts."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers
from torch import nn

from patchrank.models.checkpoints.hub import download_folder, weights_in
from patchrank.models.checkpoints.load import read_checkpoint
from patchrank.models.from_timm import create_timm, create_timm_tower
from patchrank.models.hosts.of_transformers import KNOWN, find_core
from patchrank.models.hosts.transformers_tower import StandaloneTower, create_tower
from patchrank.models.hugging_face.images import read_images
from patchrank.models.hugging_face.quiet import quiet
from patchrank.models.hugging_face.text import HubText, create_tokenizer
from patchrank.models.model_name import CONFIG, HF, REPO, folder_of, local_folder, read_settings, stable_name
from patchrank.models.pair import Clip
from patchrank.models.pruning_cfg import usual_locations
from patchrank.utils.errors import UserError, one_line

MAX_REASON = 200  # characters
USUAL = {  # the class of a config that names none, by its model_type
    "clip": "CLIPModel",
    "clip_vision_model": "CLIPVisionModel",
    "siglip": "SiglipModel",
    "siglip_vision_model": "SiglipVisionModel",
    "dinov2": "Dinov2Model",
    "dinov2_with_registers": "Dinov2WithRegistersModel",
    "vit": "ViTModel",
}
TAKES = (*USUAL.values(), "CLIPVisionModelWithProjection", "ViTForImageClassification")
UNREAD = ("pooler.", "vit.pooler.")  # weights behind the class token of a ViT, which no embedding is made by


def create_hub(
    name: str,
    pretrained: bool = True,
    checkpoint: str | Path | None = None,
    img_size: int | None = None,
    **pruning,
) -> Clip:
    """The pair or tower of a name such as `hf:FOLDER`, on the CPU; arguments as for `create_clip`.

    A folder or repository that timm wrote is read as `local-dir:` is.

    Raises:
        UserError: no such folder or repository, a model that ours cannot reproduce, weights that are missing or do not
            fit, or impossible settings of pruning.
    """
    folder, source = _find_folder(name, pretrained and checkpoint is None), f"model {name}"
    settings = read_settings(folder / CONFIG, source)
    if "architecture" in settings:
        return create_timm(name, pretrained, checkpoint, img_size, folder, **pruning)
    place = checkpoint if checkpoint is not None else weights_in(folder) if pretrained else None
    model = create_model(settings, source, place)
    tower = _create_tower(model, folder, img_size, source)
    text = HubText(model) if hasattr(model, "text_model") else None
    tokenizer = None if text is None else create_tokenizer(folder, text.context_length, source)
    clip = Clip(stable_name(name), tower, text, tokenizer, getattr(model, "classifier", None))
    if clip.classifier is not None:
        clip.class_names = _class_names(model.config)
    if hasattr(model, "logit_scale"):
        clip.logit_scale = nn.Parameter(model.logit_scale.detach().reshape(()))  # SigLIP's is a vector of one
    _prune(tower, pruning)
    return clip


def create_hub_tower(name: str, img_size: int | None = None, **pruning) -> nn.Module:
    """The image tower of `create_hub` alone, with random weights. Raises `UserError` as that does."""
    folder, source = _find_folder(name, weights=False), f"model {name}"
    settings = read_settings(folder / CONFIG, source)
    if "architecture" in settings:
        return create_timm_tower(name, img_size, folder, **pruning)
    tower = _create_tower(create_model(settings, source), folder, img_size, source)
    _prune(tower, pruning)
    return tower.eval()


def create_model(settings: dict, source: str, weights: str | Path | None = None) -> nn.Module:
    """transformers' model of a config, in evaluation mode and float32.

    Args:
        settings: of its config.json.
        weights: file or folder, by the names that transformers writes or wrote; random weights if left out.

    Raises:
        UserError: a model that ours cannot reproduce, or weights that cannot be read or do not fit.
    """
    kind = _kind_of(settings, source)
    if kind.__name__.startswith(("CLIPVision", "SiglipVision")) and isinstance(settings.get("vision_config"), dict):
        settings = settings["vision_config"] | {key: settings[key] for key in ("projection_dim",) if key in settings}
    try:
        with quiet():
            config = kind.config_class.from_dict(settings)
            if weights is None:
                return kind(config).eval()
            tensors = read_checkpoint(weights)
            model, about = kind.from_pretrained(
                None,
                config=config,
                state_dict=tensors,
                dtype=torch.float32,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
            )
    except UserError:
        raise
    except Exception as error:  # of whatever kind its parts raise
        raise UserError(f"{source}: transformers cannot make it ({one_line(error)[:MAX_REASON]})") from error
    _check_fit(about, f"checkpoint {weights}")
    return model.eval()


def _find_folder(name: str, weights: bool) -> Path:
    """The local folder of a name; a repository's files are downloaded, without its weights if nobody needs them."""
    stated = name.removeprefix(HF)
    if folder_of(name) is not None:
        return local_folder(name)
    if not REPO.fullmatch(stated):
        raise UserError(f"model {name!r}: names no model; try {HF}REPO or {HF}FOLDER")
    return download_folder(stated, weights)


def _kind_of(settings: dict, source: str) -> type[nn.Module]:
    """The class of transformers that a config names."""
    stated, model_type = settings.get("architectures"), settings.get("model_type")
    named = stated[0] if stated and isinstance(stated, list) else USUAL.get(str(model_type))
    if named not in TAKES:
        what = named or model_type or "no model"
        raise UserError(
            f"{source}: its config names {what}, which patchrank does not take; it takes {', '.join(TAKES)}"
        )
    return getattr(transformers, named)


def _create_tower(model: nn.Module, folder: Path, img_size: int | None, source: str) -> StandaloneTower:
    """Our tower around the parts of a model, with timm's record of how its images are prepared."""
    try:
        core = find_core(model)
        images = read_images(folder, core.config.model_type, core.config.image_size, source)
        side = images["input_size"][1] if img_size is None else img_size
        projection = getattr(model, "visual_projection", None)
        tower = create_tower(core, KNOWN[type(core).__name__], projection, side, StandaloneTower)
    except UserError as error:
        raise UserError(f"{source}: {error}" if not str(error).startswith(source) else str(error)) from error
    tower.pretrained_cfg = tower.default_cfg = images | {"input_size": (3, side, side), "architecture": None}
    return tower


def _class_names(config: object) -> tuple[str, ...]:
    """What a config calls its classes; () where it only counts them."""
    names = tuple(str(name) for _, name in sorted(config.id2label.items()))
    return () if all(name == f"LABEL_{place}" for place, name in enumerate(names)) else names


def _prune(tower: StandaloneTower, pruning: dict) -> None:
    pruning = usual_locations(len(tower.blocks), pruning) | pruning
    if pruning:
        tower.set_pruning(**pruning)


def _check_fit(about: dict, source: str) -> None:
    """Raises `UserError` that names the first weight that did not fit, by its name in transformers."""
    wrong = [f"{key} is missing" for key in about["missing_keys"] if not key.startswith(UNREAD)]
    wrong += [f"{key} is surplus" for key in about["unexpected_keys"] if not key.startswith(UNREAD)]
    for each in about["mismatched_keys"]:  # 4.57 tells names alone, later ones both shapes too
        wrong.append(f"{each if isinstance(each, str) else each[0]} has another shape than its config says")
    if wrong:
        more = f", and {len(wrong) - 1} more do not fit" if len(wrong) > 1 else ""
        raise UserError(f"{source}: {min(wrong)}{more}")
