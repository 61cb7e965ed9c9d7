"""From a sweep file and overrides to a checked sweep and its search space."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import patchrank
from patchrank.config import PromptConfig, Rule, SweepConfig, TrialConfig, leaves, validate
from patchrank.io import resolve
from patchrank.io.yaml import parse_yaml, read_yaml
from patchrank.models.model_name import with_absolute_path
from patchrank.utils.errors import UserError, near
from patchrank.utils.plugins import import_modules

QUICK = {
    "data": {"n_train": 32, "n_val": 16, "n_test": 48, "n_oracle": 16},
    "predictor": {"epochs": 10},
    "prompt": {"epochs": 2, "shots": 2, "images": 32},
}


@dataclass(frozen=True)
class Sweep:
    """A sweep ready to be planned: its settings with paths resolved, swept axes, and what to tell the user."""

    config: SweepConfig
    axes: dict[str, Rule]
    notes: list[str]


def load_sweep(spec: str, overrides: Sequence[str] = (), quick: bool = False) -> Sweep:
    """Reads a sweep file, its search spaces and overrides.

    Raises:
        UserError: an unreadable file, an unknown or wrong key, an axis that is no setting of a trial, or axes that do
            not go together.
    """
    if isinstance(overrides, str):  # each of its letters would be one
        raise UserError(f"overrides must be a list, as in [{overrides!r}], but are {overrides!r}")
    path = find_sweep(spec)
    raw = read_yaml(path)
    if not isinstance(raw, dict):
        raise UserError(f"{path}: must hold a mapping of keys to values")
    changed = [_override(raw, text) for text in overrides]
    config = validate(SweepConfig, raw, f"{path}" + (" with overrides" if overrides else ""))
    import_modules(config.imports)
    plain = TrialConfig(prompt=PromptConfig()).model_dump()
    known = list(plain | leaves(plain))  # dotted paths of all sections and settings of a trial
    axes = _read_axes([path.parent / space for space in config.spaces], known)
    if quick and "seed" in axes:
        axes["seed"] = Rule(grid=axes["seed"].grid[:1]) if axes["seed"].grid else axes["seed"]
    pinned = [key for key in changed if key.removeprefix("trial.") in axes]
    axes = {key: rule for key, rule in axes.items() if f"trial.{key}" not in pinned}
    _check_axes(axes, known)
    notes = [f"{key} is pinned by an override and no longer swept" for key in pinned]
    inside = [(key, axis) for key in changed for axis in axes if key.startswith(f"trial.{axis}.")]
    notes += [f"{key} holds where the swept {axis} does not say otherwise" for key, axis in inside]
    trial = _shrunk(config.trial, changed) if quick else config.trial
    return Sweep(_placed(config, trial, "-quick" if quick else ""), axes, notes)


def _placed(config: SweepConfig, trial: TrialConfig, suffix: str) -> SweepConfig:
    """A sweep with absolute paths, since workers may run elsewhere.

    Smoke runs have a suffix, and so have the sweeps that they are shown beside.
    """
    beside = tuple(resolve(place) + suffix for place in config.report.beside)
    changed = {"root": resolve(config.root) + suffix, "shards": resolve(config.shards)}
    changed["report"] = config.report.model_copy(update={"beside": beside})
    placed = {"name": with_absolute_path(trial.model.name), "checkpoint": _absolute(trial.model.checkpoint)}
    model = trial.model.model_copy(update=placed)
    places = {key: _absolute(getattr(trial.data, key)) for key in ("root", "vocabulary")}
    changed["trial"] = trial.model_copy(update={"model": model, "data": trial.data.model_copy(update=places)})
    return config.model_copy(update=changed)


def _absolute(place: str | None) -> str | None:
    """A place as an absolute path or URL; `::` joins several tars."""
    if place is None:
        return None
    pieces = [place] if "://" in place else place.split("::")
    return "::".join(map(resolve, pieces))


def _shrunk(trial: TrialConfig, overridden: Sequence[str]) -> TrialConfig:
    """Caps counts for a smoke run, those aside that an override names."""
    smaller = {}
    for part, caps in QUICK.items():
        section, fewer = getattr(trial, part), {}
        if section is None:
            continue
        for key, cap in caps.items():
            is_named = any(f"trial.{part}.{key}.".startswith(f"{each}.") for each in overridden)
            if not is_named:
                count = getattr(section, key)
                fewer[key] = cap if count is None else min(cap, count)
        smaller[part] = section.model_copy(update=fewer)
    return trial.model_copy(update=smaller)


def find_sweep(spec: str) -> Path:
    """A file, or a sweep that ships by name (`locations`, `sweeps/locations.yaml`)."""
    if Path(spec).is_file():
        return Path(spec)
    package = Path(patchrank.__file__).parent
    room = package if (package / "sweeps").is_dir() else package.parent  # as a wheel has them, or the repository
    shipped = {file.stem: file for file in room.glob("sweeps/*.yaml")}
    if Path(spec).exists() or Path(spec).stem not in shipped or Path(spec).suffix not in ("", ".yaml"):
        raise UserError(f"sweep {spec}: no such file; {near(spec, [f'sweeps/{name}.yaml' for name in shipped])}")
    return shipped[Path(spec).stem]


def _override(raw: dict, text: str) -> str:
    """Sets `a.b.c=value` in the raw file; returns the key."""
    key, equals, value = text.partition("=")
    if not equals:
        raise UserError(f"override {text!r}: must read key=value, as in trial.pruning.keep_rate=0.5")
    *path, last = key.split(".")
    place = raw
    for part in path:
        if isinstance(place, dict):
            place[part] = {} if place.get(part) is None else place[part]
            place = place[part]
    if not isinstance(place, dict):
        raise UserError(f"override {text!r}: {'.'.join(path)} holds no keys")
    place[last] = parse_yaml(value, f"override {text!r}")
    return key


def _read_axes(files: Sequence[Path], known: Sequence[str]) -> dict[str, Rule]:
    axes = {}
    for file in files:
        raw = read_yaml(file)
        if not isinstance(raw, dict):
            raise UserError(f"{file}: must hold settings of a trial with a rule each")
        for key, rule in raw.items():
            if key not in known:
                raise UserError(f"{file}: {str(key)!r} is no setting of a trial; {near(str(key), known)}")
            several = rule if isinstance(rule, list) and rule else [rule]
            axes[key] = _in_turn([validate(Rule, each, f"{file}: {key}") for each in several])
    return axes


def _in_turn(rules: Sequence[Rule]) -> Rule:
    """Several rules of one axis as one: each counts where the conditions of those before it are not met."""
    first, *others = rules
    return first.model_copy(update={"otherwise": _in_turn(others)}) if others else first


def _check_axes(axes: dict[str, Rule], known: Sequence[str]) -> None:
    """Refuses axes that do not go together, and mappings that are to be sampled."""
    for key, rule in axes.items():
        for path in rule.depends_on:
            if rule.kind != "grid" and path not in axes:
                raise UserError(f"{key}: when names {path!r}, which is not swept; {near(path, axes)}")
            if rule.kind == "grid" and path in axes and axes[path].kind != "grid":
                raise UserError(f"{key}: when names {path!r}, which is sampled, so {key} cannot be a grid; try choice")
            if path not in known:
                raise UserError(f"{key}: when names {path!r}, which is no setting of a trial; {near(path, known)}")
        if rule.otherwise is not None:
            _check_alternatives(key, rule, axes)
        if any(isinstance(value, dict) for value in rule.choice or ()):
            raise UserError(f"{key}: a mapping can stand in a grid, but not be sampled; try {key}.<setting>")


def _check_alternatives(key: str, rule: Rule, axes: dict[str, Rule]) -> None:
    """Refuses several rules of one axis where a point of the grid does not say which of them counts."""
    kinds, each = set(), rule
    while each is not None:
        kinds.add(each.kind)
        each = each.otherwise
    if "grid" in kinds:
        raise UserError(f"{key}: of several rules none can be a grid; try choice")
    if len(kinds) > 1:
        raise UserError(f"{key}: its rules must be of one kind, but are {', '.join(sorted(kinds))}")
    for path in sorted(rule.depends_on):
        if path in axes and axes[path].kind != "grid":
            raise UserError(f"{key}: of several rules the grid decides, but {path!r}, which when names, is sampled")
