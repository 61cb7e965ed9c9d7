"""Nothing of ours leans on private names of other packages, but for those in `patchrank/utils/private_names.py`."""

import ast
import importlib
import pkgutil
import re
import runpy
import sys
from collections.abc import Iterator
from functools import cache
from importlib.metadata import version
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

import patchrank.layers
import patchrank.models
from patchrank.layers.predictors import create_predictor
from patchrank.models.pruned_vit import PrunedVisionTransformer
from patchrank.utils import private_names

ROOT = Path(__file__).parents[2]
FILES = sorted([*ROOT.glob("patchrank/**/*.py"), *ROOT.glob("tests/**/*.py")])
OTHERS = {module.name for module in pkgutil.iter_modules()} | sys.stdlib_module_names
OTHERS -= {"patchrank", "helpers", "conftest"}
PUBLIC = {"_exit", "_asdict", "_fields", "_make", "_replace"}  # Python documents them: os._exit, and of named tuples
ACCESSORS = {"getattr", "hasattr", "setattr", "delattr", "object"}  # the last is `mock.patch.object`
ALLOWED = {  # by file; None allows everything
    "patchrank/utils/private_names.py": None,
    "tests/repo/test_private_names.py": None,
    "patchrank/models/checkpoints/torchscript.py": {"torch._utils", "torch.jit._pickle"},  # what archives call types
    "patchrank/models/checkpoints/pickled.py": {  # what pickles call things
        "numpy._core",
        "numpy.core.multiarray._reconstruct",
        "pathlib._local",
    },
}


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.endswith("__") and name != "_"


@cache
def nodes(source: str) -> list[ast.AST]:
    return list(ast.walk(ast.parse(source)))


@cache
def private_names_of(source: str) -> set[str]:
    """What a file defines: functions, classes, and what it assigns to, attributes included."""
    names = set()
    for node in nodes(source):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Store):
            names.add(node.id if isinstance(node, ast.Name) else node.attr)
    return {name for name in names if is_private(name)}


OURS = set().union(*(private_names_of(file.read_text()) for file in FILES if file.is_relative_to(ROOT / "patchrank")))


def uses(source: str) -> Iterator[str]:
    """Every use of a private name of another package. A name that is one of ours as well cannot be told from it."""
    own = OURS | PUBLIC | private_names_of(source)
    for node in nodes(source):
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield from imported(node)
        elif isinstance(node, ast.Attribute):
            if is_private(node.attr) and node.attr not in own:
                yield ast.unparse(node)
        elif isinstance(node, ast.Call):
            yield from named_in(node, own)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield from written(node.value)


def imported(node: ast.Import | ast.ImportFrom) -> Iterator[str]:
    base = f"{node.module or ''}." if isinstance(node, ast.ImportFrom) else ""
    for name in (f"{base}{alias.name}" for alias in node.names):
        first, *rest = name.split(".")
        if first != "patchrank" and any(map(is_private, rest)):
            yield name


def named_in(node: ast.Call, own: set[str]) -> Iterator[str]:
    """Attributes that are read or set by name: `hasattr(model, "_name")`, `monkeypatch.setattr(lock, "_name", f)`."""
    called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
    for argument in node.args[1:2] if called in ACCESSORS else []:
        name = argument.value if isinstance(argument, ast.Constant) else ""
        if isinstance(name, str) and name.isidentifier() and is_private(name) and name not in own:
            yield f"{called} of {name}"


def written(text: str) -> Iterator[str]:
    """Dotted names in texts: what is patched by name, and code that a test hands to another Python."""
    for name in re.findall(r"(?<![\w./])[a-z]\w*(?:\.\w+)*?\._[a-z]\w*", text):
        if name.split(".")[0] in OTHERS and name.rsplit(".", 1)[1] not in PUBLIC:
            yield name


def test_no_file_uses_private_names_of_other_packages():
    found = {str(file.relative_to(ROOT)): set(uses(file.read_text())) for file in FILES}
    bad = [f"{file}: {name}" for file, names in found.items() for name in names - set(ALLOWED.get(file) or ())]
    bad = [line for line in bad if ALLOWED.get(line.split(":")[0], ()) is not None]
    assert not bad, "private names of other packages:\n" + "\n".join(bad)
    assert all(found[file] >= (names or set()) for file, names in ALLOWED.items()), "something allowed is used no more"


@pytest.mark.parametrize(
    "bad",
    [
        "import ray.@private",
        "from ray.@private.utils import get_used_memory",
        "from timm.models import @hub",
        "def f(study):\n    return study.@storage.path",
        "import optuna\nkey = optuna.samplers.NSGAIISampler.@get_generation_key()",
        "hasattr(model, '@model_args')",
        "monkeypatch.setattr('filelock.@unix.lock_fd_nonblocking', print)",
        "monkeypatch.setattr(lock, '@acquire_once', print)",
        "mock.patch('ray.@private.utils.get_used_memory')",
        "mock.patch.object(lock, '@acquire_once')",
        "CODE = '''\nfrom ray.@private.utils import x\n'''",
    ],
)
def test_the_test_above_can_fail(bad):
    assert list(uses(bad.replace("@", "_")))
    assert not list(uses(bad.replace("@", "")))


def test_overridden_methods_of_other_packages_are_listed():
    found = {}
    for package in (patchrank.models, patchrank.layers):
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            for owner in vars(importlib.import_module(module.name)).values():
                if isinstance(owner, type) and owner.__module__ == module.name:
                    found |= overridden(owner)
    assert found == private_names.OVERRIDDEN


def overridden(owner: type) -> dict[str, str]:
    """Private methods of a class that a base class of another package has too."""
    bases = [base for base in owner.__mro__[1:-1] if not base.__module__.startswith("patchrank")]
    own = {name for name, value in vars(owner).items() if is_private(name) and callable(value)}
    places = {name: base for name in own for base in reversed(bases) if name in vars(base)}
    return {name: f"{base.__module__}.{base.__name__}".replace("modules.module.", "") for name, base in places.items()}


# ---- what we rely on; a failure says which package changed


def says(package: str, name: str) -> str:
    return f"{package} {version(package)} has changed {name}, which patchrank/utils/private_names.py takes from it"


def test_timm_reads_indices_as_we_do():
    found = [private_names.feature_take_indices(12, wanted) for wanted in (2, [0, -1], None)]
    assert found == [([10, 11], 11), ([0, 11], 11), (list(range(12)), 11)], says("timm", "feature_take_indices")


def test_timm_records_arguments_that_change(tower, tmp_path):
    private_names.update_model_args(tower, keep_rate=0.25)
    assert timm.models.get_model_args(tower)["keep_rate"] == 0.25, says("timm", "update_model_args")
    private_names.save_config_for_hf(tower, tmp_path / "config.json", model_args={"locations": [4]})
    text = (tmp_path / "config.json").read_text()
    assert '"keep_rate": 0.25' in text and '"locations"' in text, says("timm", "save_config_for_hf")


def test_timm_notes_what_it_made_a_model_with(tower):
    assert private_names.has_model_args(tower), says("timm", "_model_args")
    small = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}
    made_by_hand = PrunedVisionTransformer(**small, locations=(1,))
    made_by_hand.set_pruning(keep_rate=0.5, reducer="center")
    assert not private_names.has_model_args(made_by_hand)


def test_checks_of_shapes_can_be_traced():
    predictor = create_predictor("mix_mlp", 16, (2, 2), dim=4)
    cls, patches = torch.randn(1, 16), torch.randn(1, 4, 16)
    traced = torch.fx.symbolic_trace(predictor)
    assert torch.equal(traced(cls, patches), predictor(cls, patches)), says("torch", "torch._assert")
    with pytest.raises(AssertionError, match="tied to a grid of"):
        predictor(cls, patches[:, :3])


def test_a_module_can_be_made_to_hold_what_another_holds():
    module, other = nn.Module(), nn.Module()
    other.pool, other.pruner = nn.Linear(2, 2), nn.Linear(2, 2)
    other.register_buffer("mean", torch.zeros(2), persistent=False)
    other.weight = nn.Parameter(torch.zeros(2))
    private_names.hold_the_same(module, other, without="pruner")
    assert module.pool is other.pool and module.weight is other.weight and module.mean is other.mean
    assert not hasattr(module, "pruner"), says("torch", "where a module holds its parts")


def test_torch_counts_changes_and_marks_what_is_compiled():
    layer = nn.Linear(2, 2)
    before = private_names.version_of(layer.weight)
    with torch.no_grad():
        layer.weight.add_(1)
    assert private_names.version_of(layer.weight) > before, says("torch", "Tensor._version")
    assert not private_names.is_compiled(layer)
    layer.compile(backend="eager")
    assert private_names.is_compiled(layer), says("torch", "what Module.compile leaves")


def test_a_timm_without_them_is_named_at_import(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm.models._input", None)
    said = rf"^timm {re.escape(timm.__version__)} has moved a private name .* try pip install timm=="
    with pytest.raises(ImportError, match=said):
        runpy.run_path(private_names.__file__)
