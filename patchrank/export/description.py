"""What a file's metadata says of the tower that it was made from, and whether a tower is that one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from patchrank import __version__
from patchrank.export.metadata import SCHEMA
from patchrank.export.program import ExportedTower
from patchrank.io import weights_sha256
from patchrank.models.captions import Template
from patchrank.models.clip import Clip
from patchrank.models.model_name import is_open_clip, stable_name
from patchrank.models.pretrained import PUBLISHED
from patchrank.models.pruning_cfg import Pruning
from patchrank.utils.errors import UserError
from patchrank.utils.plain import plain

FILES = ("predictor_path", "repair_path", "predictor_init")  # settings that say where weights came from
FLAGS = {"tower": "--checkpoint", "ranker": "--predictor", "repair": "--repair", "prompts": "--prompts"}
IMAGES = ("interpolation", "crop_pct", "crop_mode", "mean", "std")


def describe(
    clip: Clip, module: ExportedTower, format: str, classes: Sequence[str] = (), templates: Sequence[Template] = ()
) -> dict:
    """The metadata of a file in float32, as plain values.

    Args:
        module: what is traced of the pair.
        classes, templates: of the head inside.
    """
    tower = clip.visual
    drops = {} if tower.pruner is None else tower.pruner.drops
    settings = clip.transform_settings()
    images = {"name": "images", "dtype": "float32" if module.pixels is None else "uint8"}
    images |= {"layout": "NCHW" if module.pixels is None else "NHWC", "size": list(tower.patch_embed.img_size)}
    return {
        "schema": SCHEMA,
        "patchrank": __version__,
        "torch": torch.__version__,
        "format": format,
        "precision": "float32",
        "model": stable_name(clip.name),
        "weights": fingerprints(clip, bool(classes)),
        "settings": settings_of(clip),
        "schedule": [[layer, count] for layer, count in drops.items()],
        "num_patches": [tower.num_patches, tower.num_patches - sum(drops.values())],
        "gmacs": [macs.image / 1e9 for macs in (tower.macs_unpruned(), tower.macs())],
        "classes": list(classes),
        "templates": [template if isinstance(template, str) else template("{}") for template in templates],
        "input": images | {name: settings[name] for name in IMAGES},
        "outputs": module.outputs,
    }


def settings_of(clip: Clip) -> dict:
    """The arguments that an entry makes such a tower of, beside files: another size than its own, and its pruning."""
    pruning, side, found = clip.visual.pruning, clip.visual.patch_embed.img_size[0], {}
    sides = {weights.entry: weights.image_size for weights in PUBLISHED.values()}
    if not is_open_clip(clip.name) and sides.get(clip.name.partition(".")[0]) != side:  # of others nobody knows theirs
        found["img_size"] = side
    for name in Pruning.model_fields:
        if name not in FILES:
            value = getattr(pruning, name)
            found[name] = list(value) if isinstance(value, tuple) else plain(value)
    return found


def read_settings(about: Mapping, path: str) -> dict:
    """The settings that a file states. Raises `UserError` for one that `settings_of` does not write."""
    known = {"img_size", *Pruning.model_fields}.difference(FILES)
    for key in about["settings"]:
        if key not in known:
            raise UserError(f"{path}: states {key!r} among its settings, which is none; try to export anew")
    return about["settings"]


def fingerprints(clip: Clip, with_text: bool) -> dict[str, str | None]:
    """sha256 of the weights of each part that a file holds; None for one that there is not."""
    tower = clip.visual
    ranker = getattr(tower.pruner, "reducer", None)
    found = {"tower": weights_sha256(tower, ("pruner.",))}
    found["ranker"] = weights_sha256(ranker) if ranker is not None and ranker.state_dict() else None
    found["repair"] = None if tower.repair is None else weights_sha256(tower.repair, weights=_buffers(tower.repair))
    prompts = tower.prompts if clip.prompts is None else clip.prompts
    found["prompts"] = None if prompts is None else prompts.sha256()
    found["text"] = weights_sha256(clip.text) if with_text and clip.has_text else None
    found["classifier"] = None if clip.has_text or clip.classifier is None else weights_sha256(clip.classifier)
    return found


def check_same(about: Mapping, clip: Clip, path: str) -> None:
    """Refuses a pair that a file was not made from.

    Raises:
        UserError: names the part whose weights differ, and the flag by which it is given.
    """
    theirs, ours = about["weights"], fingerprints(clip, bool(about["classes"]))
    for part in {**ours, **theirs}:
        if (sha := theirs.get(part)) != ours.get(part):
            said = (str(each)[:12] if each else "none" for each in (sha, ours.get(part)))
            flag = FLAGS.get(part, "--checkpoint")
            cure = f"{flag} with the file that it was exported with" if sha else f"it without {flag}"
            raise UserError(
                "{}: was made with {} weights {}, but here they are {}; try {}".format(path, part, *said, cure)
            )


def _buffers(module: nn.Module) -> dict[str, torch.Tensor]:
    return dict(module.named_buffers())
