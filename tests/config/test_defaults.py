"""Each setting has one default, whichever door it is reached by: YAML, a Python function, a command's flag."""

import argparse
import importlib
import inspect
import pkgutil
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from pydantic import BaseModel
from pydantic.fields import FieldInfo

import patchrank
from patchrank.__main__ import STAGES
from patchrank.config import DEFAULTS, BenchmarkConfig, PromptConfig, PruningConfig, RepairConfig
from patchrank.fit import fit_predictor
from patchrank.layers.predictors import create_predictor
from patchrank.models.pruning_cfg import Pruning

SECTIONS = {name: value for name, value in DEFAULTS if isinstance(value, BaseModel)}
SECTIONS |= {"prompt": PromptConfig(), "repair": RepairConfig(), "benchmark": BenchmarkConfig()}
FIELDS = {name: field for name, field in type(DEFAULTS).model_fields.items() if name not in SECTIONS}
for section, schema in SECTIONS.items():
    FIELDS |= {f"{section}.{name}": field for name, field in type(schema).model_fields.items()}
NAMED: dict[str, list[str]] = defaultdict(list)
for path in FIELDS:
    NAMED[path.rpartition(".")[2]].append(path)

OWN = "a setting of its own, which no sweep has"
# Names that several settings have, or other things as well: which setting they mean, by module or stage
MEANT = {
    "name": {"fit": "predictor.name"},
    "loss": {"fit": "predictor.loss", "prompt": "prompt.loss"},
    "epochs": {"fit": "predictor.epochs", "prompt": "prompt.epochs"},
    "lr": {"fit": "predictor.lr", "prompt": "prompt.lr", "pretrain": OWN},
    "repeats": {"benchmark": "benchmark.repeats", "export": OWN},
    "batch_size": {"benchmark": "benchmark.batch_size", "prompt": "prompt.batch_size"},
    "mode": {"prompt": "prompt.mode", "layers.prompts": "prompt.mode"},
    "n_test": {"recipe": OWN},
    "budget": {"recipe": OWN},
    "images": {"prompt": "prompt.images", "repair": "repair.images"},
    "metric": dict.fromkeys(("golden", "fit"), "golden.metric")
    | dict.fromkeys(
        ("benchmark", "evaluate", "export", "layers", "prompt", "repair", "retrieval", "visualize"), "pruning.metric"
    ),
}
WORDS = ("name", "batch_size", "mode", "images", "templates", "root")  # mean a setting only where MEANT says so
RENAMED = {"model": "model.name", "data_root": "data.root", "predictor_name": "predictor.name"}  # flags
FIRST = {"data": "data.tasks", "location": "pruning.locations"}  # flags that take one of what is a list in YAML
OF_COMMANDS = """best classes dashboard device dry_run fresh help image index keep_rates label limit out overrides
    address predictor prompts quick rank repair runs shards split steps sweep task template threads
    val_shards wait
    autocast bucket_rates knn_images
    compile cuda_graphs cudnn_attention dtype golden json markdown methods picture tokens
    check format int8 speed uint8
    work""".split()


def setting(name: str, module: str) -> str | None:
    """The setting that a parameter or flag means; None for what is none."""
    for place, path in MEANT.get(name, {}).items():
        if f"{module}.".startswith(f"patchrank.{place}."):
            return None if path == OWN else path
    if name in WORDS:
        return None
    assert len(NAMED[name]) == 1, f"{module}: {name} may be any of {NAMED[name]}; say in MEANT which one it is"
    return NAMED[name][0]


def default(path: str) -> Any:
    return FIELDS[path].default


def functions() -> Iterator[tuple[str, Callable]]:
    """Every function and class of the package with its module, schemas left out."""
    for module in pkgutil.walk_packages(patchrank.__path__, "patchrank."):
        for thing in vars(importlib.import_module(module.name)).values():
            is_schema = inspect.isclass(thing) and issubclass(thing, BaseModel)
            if getattr(thing, "__module__", None) == module.name and callable(thing) and not is_schema:
                yield module.name, thing


def python_doors() -> Iterator[tuple[str, str, Any]]:
    """Function, setting and default of every parameter that is named like a setting and has a default of its own."""
    for module, function in functions():
        try:
            parameters = inspect.signature(function).parameters.values()
        except ValueError:  # of classes made in C, such as exceptions
            continue
        for each in parameters:
            left_open = each.default in (each.empty, None) or each.default == ()
            path = None if left_open or each.name not in NAMED else setting(each.name, module)
            if path is not None:
                yield f"{module}.{function.__qualname__}", path, each.default


def flags(stage: str, monkeypatch) -> list[argparse.Action]:
    """The flags of a command, from its own parser."""
    module = importlib.import_module(f"patchrank.{stage}")
    module = importlib.import_module(f"patchrank.{stage}.__main__") if hasattr(module, "__path__") else module
    found, add = [], argparse.ArgumentParser.add_argument

    def parsed(*args):
        raise InterruptedError

    monkeypatch.setattr(argparse.ArgumentParser, "add_argument", lambda *a, **k: found.append(add(*a, **k)))
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parsed)
    monkeypatch.setattr(argparse.ArgumentParser, "parse_intermixed_args", parsed)
    with pytest.raises(InterruptedError):
        module.main([])
    return [each for each in found if each is not None]


def is_made_from(action: argparse.Action, field: FieldInfo) -> bool:
    """Whether a flag has the words and the default of a field."""
    is_default = action.default == field.default or (action.default in ([], None) and field.default in ((), None))
    return is_default and field.description is not None and (action.help or "").startswith(field.description)


def test_python_functions_have_the_defaults_of_the_schemas():
    doors = list(python_doors())
    assert [door for door in doors if door[2] != default(door[1])] == []
    found = {path for _, path, _ in doors}
    some = {"golden.window", "predictor.dim", "predictor.lr", "benchmark.repeats", "prompt.bias", "seed"}
    assert found >= some  # so that this test can fail
    tower = {name: Pruning.model_fields[name].default for name in PruningConfig.model_fields}
    assert tower == {name: default(f"pruning.{name}") for name in tower} and Pruning().seed == default("seed")


@pytest.mark.parametrize("stage", STAGES)
def test_flags_are_made_from_the_schemas(stage, monkeypatch):
    for action in flags(stage, monkeypatch):
        name = action.dest
        if name in FIRST:
            assert action.default in (default(FIRST[name])[0], None), name
        elif name in RENAMED or name in NAMED:
            path = RENAMED.get(name) or setting(name, f"patchrank.{stage}")
            assert path is None or is_made_from(action, FIELDS[path]), f"{name}: {action.default}, {action.help}"
        else:
            assert name in OF_COMMANDS, f"--{name} has no source: give it a field in a schema, or name it here"


@pytest.mark.parametrize("stage, count", [("prompt", 23), ("fit", 11), ("golden", 11), ("benchmark", 9)])
def test_commands_have_flags_that_are_settings(stage, count, monkeypatch):
    """So that the test above can fail."""
    known = (*RENAMED, *FIRST, *NAMED)
    assert sum(action.dest in known for action in flags(stage, monkeypatch)) >= count


def test_one_default_differs_from_what_each_door_once_had():
    assert DEFAULTS.pruning.keep_rate == 1 and (DEFAULTS.predictor.dim, DEFAULTS.predictor.lr) == (16, 0.01)
    assert create_predictor("mix_mlp", 64, (8, 8)).settings == {"dim": 16, "head": "linear"}
    assert inspect.signature(fit_predictor).parameters["lr"].default == 0.01
