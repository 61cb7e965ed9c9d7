"""Predictors, reducers and prompt layers of users' own, by modules that a sweep names."""

import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from patchrank.config import TrialConfig
from patchrank.io.tensor_file import read_tensors
from patchrank.layers.predictors import PREDICTORS
from patchrank.layers.prompts import PROMPTS, Prompts
from patchrank.layers.reducers import REDUCERS
from patchrank.models.prompt_files import load_prompts, save_prompts
from patchrank.trial.check import check_trial
from patchrank.trial.inputs import load_inputs
from patchrank.trial.requirements import ResolvedTrial
from patchrank.trial.run import run_trial
from patchrank.utils.errors import UserError
from patchrank.utils.plugins import import_modules

GUIDE = (Path(__file__).parents[2] / "docs/contributing.md").read_text()
EXAMPLE, PROMPT_EXAMPLE = re.findall(r"```python\n(.*?)```", GUIDE, re.S)


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Writes a module that can be imported by name, and takes back whatever it registers."""
    monkeypatch.syspath_prepend(str(tmp_path))
    before = [(registry, dict(registry)) for registry in (PREDICTORS, REDUCERS, PROMPTS)]
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
        raw[section] = raw.get(section, {}) | changes
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


def test_the_guides_prompt_layer_is_tuned_in_a_trial_and_read_again(module, tmp_path):
    prompt = {"mode": "TV", "shots": 1, "epochs": 1, "batch_size": 10, "num_tokens": 2}
    trials = {name: configured(prompt=prompt | {"name": name}) for name in ("coupled", "independent")}
    known = r"prompt 'independent' is not registered; (did you mean .*\? )?known: coupled$"
    with pytest.raises(UserError, match=known):
        check_trial(trials["independent"])
    import_modules([module("my_prompts", PROMPT_EXAMPLE)])
    misspelt = configured(prompt=prompt | {"name": "independant"})
    with pytest.raises(UserError, match="did you mean 'independent'. known: coupled, independent$"):
        check_trial(misspelt)
    model, data = trials["coupled"].config.model, trials["coupled"].config.data
    inputs, folders = load_inputs(model, data), (str(tmp_path / "run"), str(tmp_path / "shards"))
    records, found = {}, {}
    for name, trial in trials.items():
        check_trial(trial)
        records[name] = run_trial(trial, inputs, *folders, "test", quiet=True)
        (new,) = set((tmp_path / "shards" / "prompts").iterdir()) - {path for path, _ in found.values()}
        found[name] = new, load_prompts(new)[0]
    assert records["coupled"]["id"] != records["independent"]["id"]
    assert "name" not in records["coupled"]["config"]["prompt"]  # as before there were names
    assert records["independent"]["config"]["prompt"]["name"] == "independent"
    path, own = found["independent"]
    assert type(own) is PROMPTS["independent"] and type(found["coupled"][1]) is Prompts
    assert [key for key, _ in own.named_parameters()] == ["text", "tokens"]
    learned = own.state_dict()
    start = PROMPTS["independent"]("TV", 2, 64, 64).state_dict()
    assert all(not torch.equal(learned[key], start[key]) for key in start)  # gradients reached both
    assert read_tensors(path, "prompts", ("name",))[1]["name"] == "independent"
    inputs.clip.set_prompts(own)  # its own pair takes it
    inputs.clip.set_prompts(None)
    PROMPTS.pop("independent")
    with pytest.raises(UserError, match=rf"{path.name}: prompt 'independent' is not registered"):
        load_prompts(path)


def test_a_layer_that_nobody_registered_is_not_saved(tmp_path):
    class Unknown(Prompts):
        pass

    with pytest.raises(UserError, match="of class Unknown is not registered: register_prompt makes it so"):
        save_prompts(Unknown("TV", 2, 64, 64), tmp_path / "prompts", {})
    assert not list(tmp_path.iterdir())


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
