"""Image towers by timm's names, and from folders as timm writes them: `timm:NAME`, `local-dir:FOLDER`, entries of ours.

Weights come as safetensors, or through the reader of `checkpoints`, which knows tensors and refuses all else. timm's
own loader, which also takes other formats from other places, is not asked.
"""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path

import timm
from timm.data import ImageNetInfo, infer_imagenet_subset
from timm.models import get_arch_pretrained_cfgs, get_pretrained_cfg
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from patchrank.config import PruningConfig
from patchrank.models.checkpoints.hub import download_file, weights_in
from patchrank.models.checkpoints.load import load_vit, read_checkpoint
from patchrank.models.classifier import split_classifier
from patchrank.models.hosts.of_timm import check_model
from patchrank.models.hosts.tower import SharedTower
from patchrank.models.model_name import (
    CONFIG,
    HF,
    LOCAL,
    TIMM,
    folder_of,
    local_folder,
    prefix_of,
    read_settings,
    stable_name,
)
from patchrank.models.pair import Clip
from patchrank.models.patchrank_clip import HUB_FILES, check_img_size
from patchrank.models.pretrained import record_input_size
from patchrank.models.pruned_vit import PrunedVisionTransformer
from patchrank.models.pruning_cfg import OFF, Pruning, usual_locations
from patchrank.utils.errors import UserError, near, one_line

MAX_REASON = 200  # characters


def create_timm(
    name: str,
    pretrained: bool = True,
    checkpoint: str | Path | None = None,
    img_size: int | None = None,
    folder: Path | None = None,
    **settings,
) -> Clip:
    """The tower of a name alone, with the classifier that it came with; arguments as for `create_clip`.

    A checkpoint decides how many classes there are. A tower of ours that was saved comes back with its pruning in
    force, and with its predictor; where a setting is given that says how many patches leave, the saved ones do not
    count.

    Args:
        folder: where the files of a repository of the hub lie, if the name is of one.

    Raises:
        UserError: no such model or tag, one that ours cannot reproduce, weights that are missing or do not fit, or
            impossible settings of pruning.
    """
    weights, source = _find_weights(name, pretrained, checkpoint, folder)
    model = _build(name, img_size, folder, weights, settings)
    if weights is not None:
        load_vit(model, weights, source)
    classifier = split_classifier(model)
    clip = Clip(stable_name(name), _pruned(model, settings), None, classifier=classifier)
    if classifier is not None:
        clip.class_names = _class_names(model, classifier.out_features, is_tags=weights is not None and not checkpoint)
    return clip


def create_timm_tower(name: str, img_size: int | None = None, folder: Path | None = None, **settings) -> nn.Module:
    """The image tower of `create_timm` alone, with random weights. Raises `UserError` as that does."""
    model = _build(name, img_size, folder, None, settings)
    split_classifier(model)
    return _pruned(model, settings).eval()


def _class_names(model: VisionTransformer, count: int, is_tags: bool) -> tuple[str, ...]:
    """What so many classes are called: as the record says, or as in ImageNet where a tag's weights have as many.

    () where nobody says.
    """
    cfg = model.pretrained_cfg or {}
    if len(names := cfg.get("label_names") or ()) == count:
        told = cfg.get("label_descriptions") or {}
        return tuple(told.get(name, name) if isinstance(told, dict) else name for name in names)
    subset = infer_imagenet_subset({"num_classes": count}) if is_tags and "local-dir" != cfg.get("source") else None
    known = ImageNetInfo(subset) if subset else None
    return tuple(known.index_to_description(place) for place in range(count)) if known else ()


def _pruned(model: VisionTransformer, settings: Mapping) -> PrunedVisionTransformer:
    """A tower of ours around a model of timm's, or the model itself if it is one, pruned as settings say."""
    pruning = {key: value for key, value in settings.items() if key in Pruning.model_fields}
    if isinstance(model, PrunedVisionTransformer):  # whose locations were checked when it was made
        tower = model
    else:
        tower = SharedTower.around(model)
        pruning = usual_locations(len(tower.blocks), pruning) | pruning
    if OFF.keys() & pruning.keys():  # in place of whatever a saved tower had
        pruning = OFF | pruning
    if pruning:
        tower.set_pruning(**pruning)
    return tower


def _build(
    name: str, img_size: int | None, folder: Path | None, weights: Mapping | None, settings: Mapping
) -> VisionTransformer:
    """timm's model of a name, or ours, with random weights and as many classes as weights have, in evaluation mode."""
    source, whole = f"model {name}", _timms_name(name, folder)
    check_img_size(img_size, 1)
    others = {key: value for key, value in settings.items() if key not in Pruning.model_fields}
    others |= _of_entry(whole, settings, weights is None) | _of_head(weights)
    others |= {} if img_size is None else {"img_size": img_size}
    try:
        model = timm.create_model(whole, pretrained=False, **others)
        if getattr(model, "dynamic_img_size", False):  # images have one size here
            model = timm.create_model(whole, pretrained=False, **others | {"dynamic_img_size": False})
    except UserError as error:
        raise UserError(f"{source}: {error}") from error
    except Exception as error:  # of whatever kind its parts raise
        raise UserError(f"{source}: timm cannot make it ({one_line(error)[:MAX_REASON]})") from error
    if type(model) is not PrunedVisionTransformer:
        check_model(model, f"{source}: patchrank")
    check_img_size(img_size, model.patch_embed.patch_size)
    record_input_size(model)
    return model.eval()


def _of_head(weights: Mapping | None) -> dict[str, int]:
    """The number of classes that weights by timm's names have; {} where that is the model's own."""
    if weights is None or "patch_embed.proj.weight" not in weights:
        return {}
    head = weights.get("head.weight")
    return {"num_classes": 0 if head is None else len(head)}


def _of_entry(whole: str, settings: Mapping, is_random: bool) -> dict:
    """What an entry of ours must be told as it is built: where tokens leave, and not to await weights that do not come.

    A saved tower is built as it was saved, so that its predictor is loaded, where settings say later what leaves.

    Args:
        whole: the name, as timm takes it.
    """
    is_saved = whole.startswith(LOCAL)
    entry, saved = _saved_entry(Path(whole.removeprefix(LOCAL)), whole) if is_saved else (whole, {})
    if not entry.startswith("patchrank_"):
        return {}
    is_replaced = is_saved and OFF.keys() & settings.keys()
    told = {key: settings[key] for key in ("locations",) if key in settings and not is_replaced}
    if is_saved and is_random:  # counts, since timm takes None for nothing said
        places = told.get("locations") or saved.get("locations") or Pruning().locations
        told["drop_counts"] = (0,) * len(places)
    return told


def _saved_entry(folder: Path, source: str) -> tuple[str, dict]:
    """The entry that a folder as timm writes it was made by, and the pruning that it was saved with."""
    found = read_settings(folder / CONFIG, f"model {source}")
    entry, args = found.get("architecture"), found.get("model_args")
    args = args if isinstance(args, dict) else {}
    return str(entry), {name: args[name] for name in Pruning.model_fields if name in args}


def saved_settings(name: str | None) -> dict:
    """Pruning that a folder's tower of ours was saved with, as a section of a trial has it; {} for all other names.

    Raises:
        UserError: no such folder, or one without a config.
    """
    if prefix_of(name) not in (LOCAL, HF) or folder_of(name) is None:
        return {}
    entry, saved = _saved_entry(local_folder(name), name)
    if not entry.startswith("patchrank_"):
        return {}
    return {key: saved[key] for key in PruningConfig.model_fields if saved.get(key) is not None}


def _timms_name(name: str, folder: Path | None) -> str:
    """What timm calls a model: one of its names, an entry of ours, or a folder.

    Raises:
        UserError: no such model, tag or folder, or one that timm did not write.
    """
    if folder is not None or name.startswith(LOCAL):
        place = local_folder(name) if folder is None else folder
        if "architecture" not in read_settings(place / CONFIG, f"model {name}"):
            hint = f"; try {HF}{place}" if name.startswith(LOCAL) else ""
            raise UserError(f"model {name}: {CONFIG} names no architecture of timm's{hint}")
        return f"{LOCAL}{place}"
    stated = name.removeprefix(TIMM)
    model, _, tag = stated.partition(".")
    known = timm.list_models()
    if model not in known:
        close = get_close_matches(model, known, n=1, cutoff=0.5)
        hint = f"did you mean {TIMM}{close[0]}?" if close else "try one of timm.list_models('vit_*')"
        raise UserError(f"model {name}: timm has no such model; {hint}")
    if model.startswith("patchrank_") and name.startswith(TIMM):
        raise UserError(f"model {name}: is an entry of ours; try {stated}")
    tags = get_arch_pretrained_cfgs(model)
    if tag and stated not in tags:
        raise UserError(f"model {name}: timm knows no such tag; {near(stated, tags)}")
    return stated


def _find_weights(
    name: str, pretrained: bool, checkpoint: str | Path | None, folder: Path | None
) -> tuple[dict[str, Tensor] | None, str]:
    """The weights of a name by their writer's names, or None where they shall be random; and what errors call them.

    Raises:
        UserError: there are none, or they cannot be had.
    """
    whole = _timms_name(name, folder)
    if checkpoint is None and not pretrained:
        return None, ""
    if checkpoint is None and whole.startswith(LOCAL):
        checkpoint = weights_in(Path(whole.removeprefix(LOCAL)))
    elif checkpoint is None:
        cfg = get_pretrained_cfg(whole)
        if not cfg.hf_hub_id:
            raise UserError(f"model {name}: its weights are not on the hub; try --checkpoint FILE, or another tag")
        checkpoint = download_file(cfg.hf_hub_id, (cfg.hf_hub_filename,) if cfg.hf_hub_filename else HUB_FILES)
    return read_checkpoint(checkpoint), f"checkpoint {checkpoint}"
