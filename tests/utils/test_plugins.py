"""Predictors and reducers of users' own, by modules that a sweep names."""

import re
import sys
from pathlib import Path

import numpy as np
import pytest

from patchrank.config import TrialConfig
from patchrank.layers.predictors import PREDICTORS
from patchrank.layers.reducers import REDUCERS
from patchrank.trial.check import check_trial
from patchrank.trial.inputs import load_inputs
from patchrank.trial.requirements import ResolvedTrial
from patchrank.trial.run import run_trial
from patchrank.utils.errors import UserError
from patchrank.utils.plugins import import_modules

GUIDE = (Path(__file__).parents[2] / "docs/contributing.md").read_text()
(EXAMPLE,) = re.findall(r"```python\n(.*?)```", GUIDE, re.S)


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Writes a module that can be imported by name, and takes back whatever it registers."""
    monkeypatch.syspath_prepend(str(tmp_path))
    before = [(registry, dict(registry)) for registry in (PREDICTORS, REDUCERS)]
    names = []

    def write(name: str, text: str) -> str:
        (tmp_path / f"{name}.py").write_text(text)
        names.append(name)
        return name

    yield write
    for name in names:
        sys.modules.pop(name, None)
    for registry, content in before:
        registry.clear()
        registry.update(content)


def configured(**sections) -> ResolvedTrial:
    raw = {
        "data": {"tasks": ["digits"], "n_train": 24, "n_val": 12, "n_test": 12},
        "golden": {"stride": 2},
        "predictor": {"epochs": 3},
        "pruning": {"locations": [4], "keep_rate": 0.5},
    }
    for section, changes in sections.items():
        raw[section] |= changes
    return ResolvedTrial(TrialConfig.model_validate(raw))


def test_the_guides_components_run_in_trials_by_name(module, tmp_path):
    own, longest = configured(predictor={"name": "weighted"}), configured(pruning={"reducer": "longest"})
    for unknown in (own, longest):
        with pytest.raises(UserError, match="is not registered"):
            check_trial(unknown)
    name = module("my_components", EXAMPLE)
    import_modules([name])
    known = PREDICTORS["weighted"]
    import_modules([name, name])
    assert PREDICTORS["weighted"] is known  # not made a second time
    inputs, folders = load_inputs(own.config.model, own.config.data), (str(tmp_path / "run"), str(tmp_path / "shards"))
    kept = []
    for trial in (own, longest):
        check_trial(trial)
        record = run_trial(trial, inputs, *folders, "test", quiet=True)
        assert record["metrics"]["n_kept"] == 32
        with np.load(tmp_path / "run" / "trials" / f"{record['id']}.npz", allow_pickle=False) as arrays:
            kept.append(arrays["digits.pictures_kept"])
        if trial is own:
            assert record["metrics"]["matching_rate"] > record["metrics"]["matching_chance"]
            assert record["metrics"]["gmacs_predictor"] == 64 * 64 / 1e9
    assert not np.array_equal(*kept)
    (fitted,) = (tmp_path / "shards" / "predictors").iterdir()
    before = fitted.read_bytes()
    again = configured(predictor={"name": "weighted"}, pruning={"keep_rate": 0.4})
    run_trial(again, inputs, *folders, "test", quiet=True)  # a fitted one is found again
    assert fitted.read_bytes() == before and len(list(fitted.parent.iterdir())) == 1


@pytest.mark.parametrize(
    "text, reason",
    [
        (None, r"ModuleNotFoundError: No module named 'broken'"),
        ("import no_such_library", r"ModuleNotFoundError: No module named 'no_such_library'"),
        ("def (", r"SyntaxError: invalid syntax"),
        ("raise ValueError('one\\ntwo')", r"ValueError: one two"),
        ("import sys; sys.exit(2)", r"SystemExit: 2"),
    ],
)
def test_what_cannot_be_imported_is_told_in_one_line(module, text, reason):
    if text is not None:
        module("broken", text)
    with pytest.raises(UserError) as raised:
        import_modules(["json", "broken"])
    rule = "it must be importable on every node, e.g. installed or beside where the command runs"
    assert re.fullmatch(rf"imports: module 'broken' cannot be imported \({reason}.*\); {rule}", str(raised.value))
