"""Trials that tune prompts: what their rows say, what is kept between them, and what they leave behind."""

from dataclasses import replace

import pytest
from helpers.trials import runner

from patchrank.config import TrialConfig, known_keys, value_at
from patchrank.config.canonical import canonical
from patchrank.io import content_id
from patchrank.models.embed import evaluate
from patchrank.prompt import presets, tuning
from patchrank.trial import requirements
from patchrank.trial import run as trials
from patchrank.trial.identity import PLACES, VERSIONS, fingerprint, trial_id
from patchrank.trial.inputs import load_inputs
from patchrank.trial.requirements import TrialContext
from patchrank.tune.plan import make_plan
from patchrank.tune.space import configure
from patchrank.tune.sweep import load_sweep
from patchrank.utils.errors import UserError

BASE = TrialConfig.model_validate(
    {
        "data": {"tasks": ["digits", "digits_ink"], "n_train": 16, "n_val": 8, "n_test": 20, "n_oracle": 10},
        "pruning": {"locations": [4], "reducer": "center", "keep_rate": 0.5},
        "prompt": {"mode": "none", "shots": 1, "images": 10, "epochs": 2},
    }
)


@pytest.fixture(scope="module")
def inputs():
    return load_inputs(BASE.model, BASE.data)


@pytest.fixture
def run(inputs, tmp_path):
    return runner(BASE, inputs, tmp_path)


def named(**changes):
    return configure(BASE, {key.replace("__", "."): value for key, value in changes.items()})


def test_rows_say_what_prompts_saw_and_cost_and_keep_the_pair_as_it_came_beside(run, inputs):
    plain = run()["metrics"]
    both = run(prompt__mode="TV")["metrics"]
    text = run(prompt__mode="T")["metrics"]
    distilled = run(prompt__mode="V", prompt__loss="distill", prompt__norm_gains=True)["metrics"]
    for metrics in (both, text, distilled):
        assert metrics["accuracy_unpruned"] == plain["accuracy_unpruned"]
        assert metrics["gmacs_unpruned"] == plain["gmacs_unpruned"]
    assert both["gmacs"] == distilled["gmacs"] > text["gmacs"] == plain["gmacs"]
    assert text["cosine"] == plain["cosine"] != both["cosine"]  # text leaves images alone
    assert (both["n_prompt_images"], both["n_seen_images"], both["n_seen_labels"]) == (10, 10, 10)
    assert (distilled["n_seen_images"], distilled["n_seen_labels"]) == (10, 0)
    assert "n_seen_images" not in plain and inputs.clip.prompts is None


def test_prompts_are_kept_beside_shards_for_whoever_asks_next(run, tmp_path, monkeypatch):
    first = run(prompt__mode="TV")
    files = sorted((tmp_path / "shards" / "prompts").iterdir())
    assert [file.suffix for file in files] == [".safetensors"] * 2  # one a task, and no state
    monkeypatch.setattr(tuning, "train_epoch", lambda *_: pytest.fail("it was tuned again"))
    again = run(prompt__mode="TV")
    assert again["metrics"] == first["metrics"] and again["id"] == first["id"]


def test_a_failed_evaluation_leaves_no_prompts_to_the_next_trial(run, inputs, monkeypatch):
    def fails(*_, **__):
        assert inputs.clip.prompts is not None
        raise RuntimeError("no more")

    with monkeypatch.context() as patch:
        patch.setattr(trials, "evaluate", fails)
        with pytest.raises(RuntimeError):
            run(prompt__mode="TV")
    assert inputs.clip.prompts is None and inputs.clip.visual.num_prompt_tokens == 0


@pytest.mark.slow
def test_images_that_ranking_and_prompts_share_are_counted_once(run, inputs):
    metrics = run(prompt__mode="V", prompt__loss="distill", pruning__reducer="prior", golden__stride=2)["metrics"]
    assert (metrics["n_prompt_images"], metrics["n_train"], metrics["n_seen_images"]) == (10, 16, 16)
    labelled = run(prompt__mode="TV", pruning__reducer="prior", golden__metric="label", golden__stride=2)["metrics"]
    ids = {*TrialContext(named(prompt__mode="TV"), inputs).lessons("digits").ids, *inputs.split("digits", "train").ids}
    assert labelled["tasks"]["digits"]["n_seen_labels"] == len(ids) <= 26


def test_ids_depend_on_images_and_presets_that_prompts_come_from(inputs, monkeypatch):
    def identity(given=inputs, **changes):
        return trial_id(TrialContext(named(**changes), given))

    ids = [identity(prompt__mode="TV", seed=seed) for seed in (0, 1)]
    ids += [identity(prompt__mode="TV", prompt__shots=2), identity(prompt__mode="T"), identity()]
    assert len(set(ids)) == 5 and identity(prompt__mode="TV") == ids[0]
    drawn = [TrialContext(named(prompt__mode="TV", seed=seed), inputs).lessons("digits") for seed in (0, 1)]
    assert len(drawn[0]) == 10 and drawn[0].ids != drawn[1].ids
    with monkeypatch.context() as patch:  # a preset that changes makes other prompts, so those are other trials
        patch.setitem(presets.PRESETS, "digits", presets.PRESETS["digits"]._replace(lr=0.5))
        afresh = replace(inputs)  # which has no fingerprints yet
        assert identity(afresh, prompt__mode="TV") != ids[0] and identity(afresh) == ids[-1]
    real = requirements.load_train
    monkeypatch.setattr(requirements, "load_train", lambda *how: replace(real(*how), labels=[9] * 10))
    assert identity(replace(inputs), prompt__mode="TV") != ids[0]


def test_a_trial_without_prompts_has_the_id_that_it_had_before_there_were_any(inputs):
    plain = named(prompt=None)
    settings = canonical(plain.config)
    settings["pruning"]["leftovers"] = "drop"  # the default, then and now
    for section, key in PLACES:
        del settings[section][key]
    assert settings["prompt"] is None
    off = named(prompt__mode="none", prompt__lr=0.5)
    found = TrialContext(plain, inputs)
    assert trial_id(TrialContext(off, inputs)) == trial_id(found)
    before = content_id({"schema": 1, "trial": settings, **fingerprint(found), "versions": VERSIONS})
    assert trial_id(found) == before and fingerprint(found).keys() == {"model", "data"}


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"prompt.mode": "V", "prompt.loss": "distill", "pruning.keep_rate": 1.0}, "nothing is pruned"),
        ({"prompt.mode": "TV", "prompt.loss": "distill"}, "mode must be 'V'"),
        ({"prompt.mode": "TV", "prompt.words": "a photo of", "prompt.num_tokens": 4}, "are 3 tokens"),
        ({"prompt.mode": "TX"}, "prompt.mode is 'TX'"),
        ({"prompt.mode": "TV", "pruning.reducer": "golden"}, "prompts learn from others"),
        ({"prompt.mode": "TV", "prompt.num_tokens": 74}, "must leave room for a class name; try 67"),
        ({"prompt.mode": "TV", "seed": -1}, "seed is -1, but should be greater than or equal to 0"),
        ({"prompt.shots": 0}, "prompt.shots is 0"),
    ],
)
def test_what_cannot_be_tuned_is_told_before_anything_starts(changes, message):
    with pytest.raises(UserError, match=message):
        configure(BASE, changes)


def test_prompts_are_settings_that_can_be_swept():
    assert {"mode", "loss", "norm_gains", "shots", "lr"} <= set(known_keys(TrialConfig, ("prompt",)))


@pytest.mark.parametrize(
    "sweep, modes, settings",
    [
        ("prompts", ["T", "TV", "V", "none"], 18),
        ("locations", ["none"], 4),
        ("locations_tuned", ["TV"], 4),
        ("keep_rates", ["T", "TV", "none"], 117),
    ],
)
def test_shipped_sweeps_have_the_prompts_that_the_paper_has(sweep, modes, settings, tmp_path):
    plan = make_plan(load_sweep(sweep, [f"root={tmp_path}", f"shards={tmp_path}"]))
    found = [plan.trial(cell.values) for cell in plan.cells]
    assert sorted({each.config.prompt.mode for each in found}) == modes
    unseeded = {each.config.model_dump_json(exclude={"seed", "controls"}) for each in found}
    assert len(unseeded) == settings
    if sweep == "keep_rates":  # figure 1: at layer 4, from nothing dropped on
        tuned = [each for each in found if each.config.prompt.mode == "TV"]
        assert {each.config.pruning.keep_rate for each in tuned} == {1.0, 0.8, 0.6, 0.5, 0.4, 0.2}
        assert {(each.config.pruning.reducer, *each.config.pruning.locations) for each in tuned} == {("predictor", 4)}


def test_a_smoke_run_tunes_little(tmp_path):
    sweep = load_sweep("prompts", [f"root={tmp_path}"], quick=True)
    assert (sweep.config.trial.prompt.epochs, sweep.config.trial.prompt.shots) == (2, 2)
    assert load_sweep("scores", [f"root={tmp_path}"], quick=True).config.trial.prompt is None


def test_a_row_is_of_the_prompts_that_the_tuning_gives(run, inputs, tmp_path):
    settings = named(prompt__mode="TV")
    record, clip = run(prompt__mode="TV"), inputs.clip
    clip.visual.set_pruning(**settings.pruning)
    context = TrialContext(settings, inputs)
    train, config = context.lessons("digits"), context.recipes["digits"]
    clip.set_prompts(tuning.tune_prompts(clip, train, None, config, 0, str(tmp_path / "p"), quiet=True).prompts)
    try:
        found = evaluate(clip, inputs.split("digits", "test"), quiet=True)
    finally:
        clip.set_prompts(None)
    assert record["metrics"]["tasks"]["digits"]["cosine"] == pytest.approx(
        float(found.cosine["pruned"].mean()), abs=1e-6
    )


def test_prompts_may_be_swept_or_set_where_a_sweep_has_none(tmp_path):
    where = [f"root={tmp_path}", f"shards={tmp_path}"]
    assert load_sweep("scores", [*where, "trial.prompt.mode=T"]).config.trial.prompt.mode == "T"
    with pytest.raises(UserError, match="seed holds no keys"):
        load_sweep("scores", [*where, "trial.seed.x=1"])
    (tmp_path / "space.yaml").write_text("prompt.mode: {grid: [none, V]}")
    plan = make_plan(load_sweep("scores", [*where, f"spaces=[{tmp_path}/space.yaml]", "report.claims=[]"]))
    assert [plan.trial(cell.values).config.prompt.mode for cell in plan.cells] == ["none", "V"]
    with pytest.raises(
        UserError, match="when names 'prompt.moode', which is no setting of a trial; did you mean 'prompt.mode'"
    ):
        (tmp_path / "space.yaml").write_text("prompt.lr: {grid: [0.1, 0.2], when: {prompt.moode: [V]}}")
        make_plan(load_sweep("scores", [*where, f"spaces=[{tmp_path}/space.yaml]", "report.claims=[]"]))
    plan = make_plan(load_sweep("prompts", [*where, "trial.prompt=null", "report.claims=[]"]))
    assert len(plan.cells) == 44
    assert value_at(BASE.model_dump() | {"prompt": None}, "prompt.mode") is None
