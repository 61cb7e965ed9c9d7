"""Repair files: a projection, and the tower, the schedule and the ranking that it was solved for."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from patchrank.io import is_plain_tensor, weights_sha256
from patchrank.io.tensor_file import read_tensors, write_tensors
from patchrank.layers.predictors import awaits_weights
from patchrank.layers.repair import Repair
from patchrank.utils.errors import UserError
from patchrank.utils.plain import plain

MODEL = ("name", "blocks_sha256", "head_sha256")
ABOUT = ("model", "pruning", "ranker_sha256", "images", "ridge", "data")  # keys of a file's metadata
PRECISIONS = (torch.float32, torch.float16, torch.bfloat16)
# Fields of `Pruning` that do not decide by themselves which tokens are left: the layers and counts of `drops` stand for
# those of the schedule, and the ranker's fingerprint for its file. Seeds draw other random orders of the same kind.
SCHEDULE = {"keep_rate", "budget", "taper", "align", "locations", "drop_counts"}
NO_HEAD = nn.Identity()  # of a tower whose embedding is what would enter a head
LEFT_OUT = SCHEDULE | {"predictor_path", "predictor_init", "repair_path", "cls_only_last", "seed"}


def save_repair(repair: Repair, path: str | Path) -> None:
    """Writes a repair and what it belongs to, as float32, whole or not at all; `load_repair` reads it back."""
    tensors = {"weight": repair.weight.float(), "bias": repair.bias.float()}
    write_tensors(path, "repair", tensors, repair.about)


def load_repair(path: str | Path) -> Repair:
    """The repair in a file; never unpickles.

    Raises:
        UserError: the file is missing, damaged, of another kind, or its tensors are no projection.
    """
    source = f"repair {path}"
    tensors, about = read_tensors(path, "repair", ABOUT)
    weight, bias = tensors.get("weight"), tensors.get("bias")
    if tensors.keys() != {"weight", "bias"} or weight.ndim != 2 or bias.shape != weight.shape[:1]:
        raise UserError(f"{source}: must hold a weight (E, D) and a bias (E,) alone, but holds {', '.join(tensors)}")
    if not all(each.is_floating_point() and each.isfinite().all() for each in (weight, bias)):
        raise UserError(f"{source}: must hold finite numbers alone")
    model, pruning = about["model"], about["pruning"]
    if not isinstance(model, dict) or not isinstance(pruning, dict) or not all(key in model for key in MODEL):
        raise UserError(f"{source}: its metadata must name a model by {', '.join(MODEL)} and its pruning's settings")
    return Repair(weight.float(), bias.float(), about, source, headless=model["head_sha256"] == fingerprints(NO_HEAD))


def describe_repair(tower: nn.Module, name: str) -> dict:
    """The tower that a repair is solved for, its schedule and its ranking, as the pruning in force has them.

    Args:
        name: of the model, for messages.
    """
    model = {"name": name, "blocks_sha256": tower.blocks_sha256(), "head_sha256": fingerprints(tower.head)}
    schedule = describe_schedule(tower.pruning, tower.pruner.drops)
    return {"model": model, "pruning": schedule, "ranker_sha256": _ranker_sha256(tower.pruner)}


def describe_schedule(pruning: object, drops: Mapping[int, int]) -> dict:
    """What decides on how many tokens leave where, and on what becomes of them, as plain values.

    Args:
        pruning: of `Pruning`. A field stands in it only where it is not at its default, so that files stay valid when
            fields are added. Nor does `leftovers: drop`, which a ranker does anyway.
        drops: tokens that leave, by layer.
    """
    found: dict[str, object] = {"drops": [[layer, count] for layer, count in drops.items()], "reducer": pruning.reducer}
    for name, field in type(pruning).model_fields.items():
        if name not in LEFT_OUT and (value := getattr(pruning, name)) != field.get_default(call_default_factory=True):
            found[name] = list(value) if isinstance(value, tuple) else plain(value)
    return _said_once(found)


def check_settings(repair: Repair, pruning: object, drops: Mapping[int, int], ranker: nn.Module) -> None:
    """Refuses a repair that was solved for another schedule or ranking; a ranker without weights is not looked at yet.

    Raises:
        UserError: names the repair's settings and those in force.
    """
    theirs, ours = _said_once(repair.about["pruning"]), describe_schedule(pruning, drops)
    cure = "try it without a repair (repair_path=None), or one that was solved for these settings (patchrank.repair)"
    other = [key for key in {**theirs, **ours} if theirs.get(key) != ours.get(key)]
    if other:
        said = (", ".join(f"{key} {_said(key, side.get(key))}" for key in other) for side in (theirs, ours))
        raise UserError(f"{repair.source}: solved for {{}}, but the pruning has {{}}; {cure}".format(*said))
    if not awaits_weights(ranker):
        _check_ranker(repair, fingerprints(ranker) if ranker.state_dict() else [])


def check_repair(tower: nn.Module, weights: Mapping[str, Tensor] | None = None) -> None:
    """Refuses the repair in use where it was solved for another tower, another head or another predictor.

    Args:
        weights: what the tower is about to load, in place of weights that it has.

    Raises:
        UserError: names both sides.
    """
    repair = getattr(tower.pruner, "repair", None)
    if repair is None:
        return
    model, cure = repair.about["model"], "try it without a repair (repair_path=None)"
    says = f"{repair.source}: solved for {model['name']}"
    coming = weights or {}
    head = {key.removeprefix("head."): value for key, value in coming.items() if key.startswith("head.")}
    ranker = {
        key[len("pruner.reducer.") :]: value for key, value in coming.items() if key.startswith("pruner.reducer.")
    }
    counted = NO_HEAD if tower.repair_leads else tower.head
    if not tower.has_fingerprint() or not all(map(is_plain_tensor, counted.state_dict().values())):
        raise UserError(
            f"{says}, but this tower's weights are quantised, so that nobody can tell whose they are; {cure}"
        )
    if weights is None or tower.covers(weights):
        if model["blocks_sha256"] not in (known := tower.known_as(weights)):
            theirs, ours = model["blocks_sha256"][:12], f"{known[0][:12]}{tower.precision_note()}"
            raise UserError(f"{says} with weights {theirs}, but this tower's weights are {ours}; {cure}")
    comes = (weights is None or head) and not tower.repair_leads
    if comes and (own := fingerprints(tower.head, head or None))[0] not in model["head_sha256"]:
        theirs = model["head_sha256"][0][:12]
        raise UserError(f"{says} with head {theirs}, but this tower's head is {own[0][:12]}; {cure}")
    if ranker or (weights is None and repair.about["ranker_sha256"]):
        _check_ranker(repair, fingerprints(tower.pruner.reducer, ranker or None))


def fingerprints(module: nn.Module, weights: Mapping[str, Tensor] | None = None) -> list[str]:
    """Fingerprints of a module's weights as they are, and rounded to the lower precisions, all as float32.

    A tower that is rounded later has one of them.
    """
    state = {key: value.detach() for key, value in {**module.state_dict(), **(weights or {})}.items()}
    found = []
    for precision in PRECISIONS:
        rounded = {key: value.to(precision) if value.is_floating_point() else value for key, value in state.items()}
        found.append(weights_sha256(module, weights=rounded, dtype=torch.float32))
    return list(dict.fromkeys(found))


def _ranker_sha256(pruner: nn.Module) -> list[str]:
    return fingerprints(pruner.reducer) if pruner.reducer.state_dict() else []


def _check_ranker(repair: Repair, own: list[str]) -> None:
    theirs = repair.about["ranker_sha256"]
    if (theirs or own) and (not own or own[0] not in theirs):
        said = (shas[0][:12] if shas else "none" for shas in (theirs, own))
        raise UserError(
            "{}: solved with predictor weights {}, but those in use are {}; try that predictor, or "
            "no repair (repair_path=None)".format(repair.source, *said)
        )


def _said_once(schedule: Mapping[str, object]) -> dict:
    """A schedule without `leftovers: drop`, which says the same as no word on them."""
    return {key: value for key, value in schedule.items() if (key, value) != ("leftovers", "drop")}


def _said(key: str, value: object) -> str:
    """A setting as messages have it; `drops` as "26 before layer 4"."""
    if key == "drops":
        return " and ".join(f"{count} before layer {layer}" for layer, count in value or [])
    return repr(value)
