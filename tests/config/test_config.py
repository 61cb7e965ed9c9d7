from pathlib import Path

import pytest

from patchrank.config import PromptConfig, Rule, SweepConfig, TrialConfig, validate, value_at
from patchrank.config.canonical import canonical
from patchrank.io.yaml import parse_yaml
from patchrank.tune.console import print_plan
from patchrank.tune.plan import make_plan
from patchrank.tune.sweep import find_sweep, load_sweep
from patchrank.utils.errors import UserError

ROOT = Path(__file__).parents[2]
LARGE = ("presets", "methods", "methods_search")  # plans that take seconds
SWEEPS = [
    pytest.param(file, marks=[pytest.mark.slow] if file.stem in LARGE else [])
    for file in sorted(ROOT.glob("sweeps/*.yaml"))
]
YAMLS = sorted([*ROOT.glob("sweeps/*.yaml"), *ROOT.glob("search_spaces/*.yaml"), *ROOT.glob("patchrank/report/*.yaml")])


@pytest.mark.parametrize("file", YAMLS, ids=lambda file: f"{file.parent.name}/{file.name}")
def test_every_yaml_loads(file):
    assert isinstance(parse_yaml(file.read_text(), str(file)), dict)


@pytest.mark.parametrize("file", SWEEPS, ids=lambda file: file.name)
def test_every_sweep_makes_a_quick_plan(file):
    assert make_plan(load_sweep(str(file), quick=True)).size > 0  # the whole ones: where claims are looked at


def test_locations_is_the_papers_table_7():
    plan = make_plan(load_sweep("sweeps/locations.yaml"))
    first = [cell.values for cell in plan.cells if cell.values["seed"] == 0]
    tuned = make_plan(load_sweep("sweeps/locations_tuned.yaml"))
    four = [[2, 3, 4, 5], [4, 5, 6, 7], [1, 3, 5, 7], [4, 6, 8, 10]]
    assert [values["pruning.locations"] for values in first] == four
    assert [cell.values["pruning.locations"] for cell in tuned.cells if cell.values["seed"] == 0] == four
    assert len(plan.cells) == len(tuned.cells) == 3 * 4
    ours, theirs = (each.sweep.config.trial.model_dump() for each in (plan, tuned))
    assert ours["pruning"]["keep_rate"] == 0.6 and (ours["prompt"]["mode"], theirs["prompt"]["mode"]) == ("none", "TV")
    assert (ours["model"], ours["data"]) == (theirs["model"], theirs["data"])  # so that they can stand side by side


@pytest.mark.parametrize("spec", ["locations", "locations.yaml", "sweeps/locations.yaml"])
def test_shipped_sweeps_are_found_from_anywhere(spec, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_sweep(spec).name == "locations.yaml"


def test_yaml_is_read_as_people_mean_it():
    values = parse_yaml("a: 1e-3\nb: on\nc: no\nd: 1.5\ne: true\nf: 3\ng: -2E+2\nh: null\ni: '1'", "x")
    assert values == dict(a=0.001, b="on", c="no", d=1.5, e=True, f=3, g=-200.0, h=None, i="1")


@pytest.mark.parametrize(
    "text, message",
    [
        ("a: 1\nb: 2\na: 3", "x, line 3: not readable as YAML .key 'a' stands twice"),
        ("a: [1", "x, line 1: not readable as YAML"),
        ("a: !!python/object/apply:os.system ['true']", "x, line 1: not readable"),
    ],
)
def test_unreadable_yaml_is_named_by_line(text, message):
    with pytest.raises(UserError, match=message):
        parse_yaml(text, "x")


@pytest.mark.parametrize(
    "override, message",
    [
        ("trial.pruning.keep_rat=0.5", "key 'trial.pruning.keep_rat' does not exist; did you mean 'keep_rate'"),
        ("trail.seed=1", "key 'trail' does not exist; did you mean 'trial'"),
        ("trial.pruning.keep_rate=0", "trial.pruning.keep_rate is 0, but should be a number above 0 and at most 1"),
        ("trial.pruning.keep_rate=half", "keep_rate is 'half', but should be a number above 0 and at most 1"),
        ("trial.pruning.keep_rate=.nan", "keep_rate is nan, but should be a number above 0 and at most 1"),
        (
            "trial.pruning.locations=!!set {4, 6}",
            "locations is {4, 6}, but should be a list, whose items have an order",
        ),
        ("trial.controls=!!set {random}", "controls is {'random'}, but should be a list, whose items have an order"),
        ("spaces=!!set {a.yaml}", "spaces is {'a.yaml'}, but should be a list, whose items have an order"),
        ("trial.model.img_size=0", "trial.model.img_size is 0, but should be greater than or equal to 1"),
        ("trial.seed=on", "trial.seed is 'on', but should be a valid integer"),
        ("trial.seed=-1", "trial.seed is -1, but should be greater than or equal to 0"),
        (f"trial.seed={2**32}", "trial.seed is 4294967296, but should be less than 4294967296"),
        ("search.seed=-1", "search.seed is -1, but should be greater than or equal to 0"),
        ("time_limit=.inf", "time_limit is inf, but should be a finite number"),
        ("time_limit=1e300", "time_limit is 1e.300, but should be less than or equal to 1000000000"),
        ("resources.cpu=.inf", "resources.cpu is inf, but should be a finite number"),
        ("search.asha={of: predictor, reduction: .nan}", "reduction is nan, but should be a finite number"),
        ("trial.golden.metric=labels", "should be 'label', 'confidence' or 'preservation'"),
        ("trial.pruning.locations=[0, 4]", "from 1 to the tower's depth 12"),
        ("trial.pruning.locations=[4, 13]", "from 1 to the tower's depth 12"),
        ("trial.pruning.locations=[6, 4]", "must increase"),
        ("trial.pruning.drop_counts=[32, 32]", "drop_counts must be one count"),
        ("trial.pruning={align: 8, drop_counts: [20]}", "trial.pruning: align 8 rounds counts, but drop_counts 20 say"),
        ("trial.golden.window=9", "window must lie in 1..8 on a 8 x 8 grid"),
        ("trial.golden.remove_at=13", "from 1 to the tower's depth 12"),
        ("trial.golden.rounds=65", "rounds must lie in 1..64"),
        ("trial.predictor.name=mixmlp", "did you mean 'mix_mlp'"),
        ("trial.predictor.loss=bec", "did you mean 'bce'"),
        ("trial.pruning.reducer=randm", "did you mean 'random'"),
        ("trial.pruning.leftovers=fuze", "leftovers 'fuze' does not exist; known: drop"),
        ("trial.model.name=patchrank_clip_b61", "did you mean 'patchrank_clip_b16'"),
        ("trial.data.tasks=[digit]", "did you mean 'digits'"),
        ("trial.data.tasks=[digits, digits]", "data.tasks must not name a task twice"),
        ("trial.predictor.fit_on=digits", "fit_on is 'digits', but should be 'own' or 'others', or should be a valid"),
        ("trial.predictor.fit_on=[digits_inc]", "did you mean 'digits_ink'"),
        ("trial.predictor.name=mlp", "'mlp' ranks by the class token alone"),
        ("trial.predictor={name: mlp, head: mean}", "head of mlp must be 'linear'"),
        ("report.claims=[{say: x, of: {}, measure: acuracy}]", "measure is 'acuracy'"),
        ("report.claims=[{say: x, of: {prunin.keep_rate: 1}, measure: accuracy}]", "did you mean 'pruning.keep_rate'"),
        ("trial.data.root=/data", "data.root is '/data', but task 'digits' is embedded"),
        ("objectives=[{metric: accuracy, mode: max}]", "should be 'val_accuracy'"),
        ("search.method=optun", "should be 'grid', 'random' or 'optuna'"),
        ("name=../x", "name is '../x', but"),
        ("schema=2", "schema is 2, but should be 1"),
        ("seed", "must read key=value"),
    ],
)
def test_bad_overrides_say_which_key_and_which_rule(override, message):
    with pytest.raises(UserError, match=message):
        make_plan(load_sweep("locations", [override, *["root=runs/x"][: override != "seed"]]))


def test_overrides_are_a_list():
    with pytest.raises(UserError, match=r"overrides must be a list, as in \['trial.seed=1'\]"):
        load_sweep("locations", "trial.seed=1")


def test_overriding_a_swept_axis_pins_it_and_says_so():
    sweep = load_sweep("locations", ["trial.pruning.locations=[3, 6]"])
    assert list(sweep.axes) == ["seed", "controls"] and sweep.notes == [
        "trial.pruning.locations is pinned by an override and no longer swept"
    ]
    assert all(
        make_plan(sweep).trial(cell.values).config.pruning.locations == (3, 6) for cell in make_plan(sweep).cells
    )


def space(tmp_path, text: str):
    """The plan of the locations sweep with another search space."""
    sweep = (ROOT / "sweeps/locations.yaml").read_text().replace("../search_spaces/locations.yaml", "space.yaml")
    (tmp_path / "sweep.yaml").write_text(sweep)
    (tmp_path / "space.yaml").write_text(text)
    return make_plan(load_sweep(str(tmp_path / "sweep.yaml")))


def test_a_grid_axis_stands_only_where_its_when_is_met(tmp_path):
    plan = space(
        tmp_path,
        "pruning.reducer: {grid: [predictor, center]}\npruning.keep_rate: {grid: [0.6, 0.5]}\n"
        "seed: {grid: [0, 1, 2], when: {pruning.reducer: [predictor], pruning.keep_rate: [0.6]}}",
    )
    found = [(plan.trial(cell.values).config.pruning.reducer, cell.values.get("seed")) for cell in plan.cells]
    assert found == [("predictor", 0), ("predictor", 1), ("predictor", 2), ("predictor", None)] + [("center", None)] * 2
    with pytest.raises(UserError, match="when names 'pruning.redcer', .*did you mean 'pruning.reducer'"):
        space(tmp_path, "seed: {grid: [0, 1], when: {pruning.redcer: [predictor]}}")


def test_a_mapping_changes_some_keys_of_a_section_and_points_that_come_out_equal_are_one(tmp_path):
    plan = space(tmp_path, "golden: {grid: [{}, {window: 3}, {rounds: 2, window: 1}, {window: 2}]}")
    found = [plan.trial(cell.values).config.golden for cell in plan.cells]
    assert [(g.window, g.rounds, g.remove_at) for g in found] == [(2, 1, 4), (3, 1, 4), (1, 2, 4)]
    with pytest.raises(UserError, match="did you mean 'rounds'"):
        space(tmp_path, "golden: {grid: [{round: 2}]}")


def test_an_axis_that_falls_takes_those_that_hang_on_it(tmp_path):
    plan = space(
        tmp_path,
        "pruning.reducer: {grid: [predictor, random]}\n"
        "predictor.dim: {grid: [8, 64], when: {pruning.reducer: [predictor]}}\n"
        "predictor.epochs: {grid: [5, 10], when: {predictor.dim: [64]}}",
    )
    found = [tuple(cell.values.values()) for cell in plan.cells]
    assert found == [("predictor", 8), ("predictor", 64, 5), ("predictor", 64, 10), ("random",)]


def test_a_section_is_not_sampled(tmp_path):
    with pytest.raises(UserError, match="golden: a mapping can stand in a grid, but not be sampled"):
        sweep = (ROOT / "sweeps/locations.yaml").read_text().replace("../search_spaces/locations.yaml", "space.yaml")
        (tmp_path / "sweep.yaml").write_text(sweep.replace("{method: grid}", "{method: random}"))
        (tmp_path / "space.yaml").write_text("golden: {choice: [{window: 2}, {window: 3}]}")
        make_plan(load_sweep(str(tmp_path / "sweep.yaml")))


def test_overriding_inside_a_swept_section_is_said():
    notes = load_sweep("windows", ["trial.golden.window=3"]).notes
    assert notes == ["trial.golden.window holds where the swept golden does not say otherwise"]


@pytest.mark.parametrize("file", sorted((ROOT / "sweeps").glob("*.yaml")), ids=lambda file: file.stem)
def test_every_claim_of_a_sweep_has_what_it_compares(file):
    """A slip in a claim would show only once the sweep has run."""
    from patchrank.report.claims import is_about, pair_up
    from patchrank.report.results import Setting

    plan, settings = make_plan(load_sweep(str(file))), {}
    beside = [make_plan(load_sweep(f"sweeps/{Path(root).name}.yaml")) for root in plan.sweep.config.report.beside]
    for config in [each.trial(cell.values).config.model_dump() for each in (plan, *beside) for cell in each.cells]:
        settings.setdefault(str(config | {"seed": 0, "controls": []}), Setting([{"config": config}], []))
    for claim in plan.sweep.config.report.claims:
        selected = [setting for setting in settings.values() if is_about(claim, setting)]
        pairs = pair_up(claim, selected, list(settings.values()))
        assert pairs and all(pair.other is not None for pair in pairs), claim.say


def test_a_smoke_run_needs_one_seed():
    assert load_sweep("locations", quick=True).axes["seed"].grid == (0,)


def test_quick_runs_live_in_a_folder_of_their_own():
    whole, quick = load_sweep("locations"), load_sweep("locations", quick=True)
    assert quick.config.root == whole.config.root + "-quick"
    assert quick.config.trial.data.n_test < 200


@pytest.mark.parametrize(
    "override, counts",
    [
        ("trial.seed=0", (32, 16, 2)),
        ("trial.data.n_train=500", (500, 16, 2)),
        ("trial.data.n_train=8", (8, 16, 2)),
        ("trial.data={tasks: [digits], n_train: 500}", (500, 128, 2)),  # 128 is the default
        ("trial.prompt={mode: T, shots: 5}", (32, 16, 5)),
    ],
)
def test_a_smoke_run_is_small_where_no_override_says_otherwise(override, counts):
    trial = load_sweep("prompts", [override], quick=True).config.trial
    assert (trial.data.n_train, trial.data.n_val, trial.prompt.shots) == counts


def test_a_sweep_is_read_in_one_go(monkeypatch):
    seen = []
    monkeypatch.setattr(SweepConfig, "model_validate", lambda raw: seen.append(raw) or SweepConfig(**raw))
    sweep = load_sweep("locations", ["trial.seed=3"], quick=True)
    assert len(seen) == 1 and sweep.config.trial.seed == 3


@pytest.mark.parametrize(
    "rule, message",
    [
        ({"gird": [1]}, "did you mean 'grid'"),
        ({}, "exactly one of grid, choice, uniform, int"),
        ({"grid": [1], "choice": [2]}, "exactly one of"),
        ({"grid": []}, "at least 1 item"),
        ({"uniform": [0.1]}, "at least 2 items"),
    ],
)
def test_rules_are_checked(rule, message):
    with pytest.raises(UserError, match=message):
        validate(Rule, rule, "space: axis")


def test_an_axis_must_be_a_setting_of_a_trial(tmp_path):
    sweep = (ROOT / "sweeps/locations.yaml").read_text().replace("../search_spaces/locations.yaml", "space.yaml")
    (tmp_path / "sweep.yaml").write_text(sweep)
    (tmp_path / "space.yaml").write_text("pruning.location: {grid: [[4]]}")
    with pytest.raises(
        UserError, match="space.yaml: 'pruning.location' is no setting of a trial; did you mean 'pruning.loc"
    ):
        load_sweep(str(tmp_path / "sweep.yaml"))
    (tmp_path / "space.yaml").write_text("pruning.keep_rate: {uniform: [0.3, 0.9]}")
    with pytest.raises(UserError, match="search.method is 'grid', but pruning.keep_rate is sampled"):
        make_plan(load_sweep(str(tmp_path / "sweep.yaml")))


def test_missing_and_unknown_files():
    with pytest.raises(UserError, match="no such file; did you mean 'sweeps/locations.yaml'"):
        load_sweep("sweeps/location.yaml")
    with pytest.raises(UserError, match="key 'name' is missing"):
        validate(SweepConfig, {"schema": 1}, "x")
    assert validate(TrialConfig, {}, "x").pruning.keep_rate == 1


FREE = {"wandb": {"project": "x", "tags": ["a", {"b": [1]}]}}


def test_configurations_are_frozen_and_hashable():
    raw = {"schema": 1, "name": "x", "root": "r", "shards": "s", "spaces": ["a.yaml"], "report": {"table": "x"}}
    claim = {"say": "x", "of": {"pruning.locations": [[4], [6]]}, "against": {"seed": 1}, "measure": "accuracy"}
    raw |= {"loggers": FREE, "report": {"table": "x", "claims": [claim | {"against": "unpruned"}]}}
    one, other = (validate(SweepConfig, raw, "x") for _ in range(2))
    assert hash(one) == hash(other) and one == other
    assert len({TrialConfig(), TrialConfig(), TrialConfig(seed=1)}) == 2
    rule = validate(Rule, {"grid": [[1], [2]], "when": [{"seed": [1]}, {"seed": [2]}]}, "x")
    assert rule.conditions == ({"seed": (1,)}, {"seed": (2,)}) and hash(rule) == hash(rule.model_copy())
    with pytest.raises(ValueError, match="frozen"):
        one.trial.pruning.keep_rate = 0.5


def test_lists_are_tuples_in_python_and_lists_in_files():
    trial = validate(TrialConfig, {"pruning": {"locations": [2, 3]}, "predictor": {"fit_on": ["digits"]}}, "x")
    assert trial.pruning.locations == (2, 3) and trial.predictor.fit_on == ("digits",)
    assert trial.model_dump()["pruning"]["locations"] == [2, 3] and trial.model_dump()["data"]["tasks"] == ["digits"]
    assert validate(TrialConfig, trial.model_dump(), "x") == trial
    assert TrialConfig.model_validate_json(trial.model_dump_json()) == trial


@pytest.mark.parametrize("wrong", [[True], ["4"], [4.0], "4", 4, {4: 1}, []])
def test_items_of_lists_keep_their_types(wrong):
    with pytest.raises(UserError, match="pruning.locations.* but should (be a valid|have at least 1 item)"):
        validate(TrialConfig, {"pruning": {"locations": wrong}}, "x")


def test_a_setting_that_records_leave_out_is_read_as_its_default():
    trial = TrialConfig(prompt=PromptConfig())
    plain = canonical(trial)
    assert "name" not in plain["prompt"] and value_at(plain, "prompt.name") == "coupled"
    assert value_at(canonical(TrialConfig()), "prompt.name") is None
    other = canonical(TrialConfig(prompt=PromptConfig(name="own")))
    assert value_at(other, "prompt.name") == "own"


@pytest.mark.parametrize(
    "rule, is_noted",
    [
        ("seed: {grid: [0, 1]}", True),
        ("pruning.keep_rate: {grid: [1.0, 0.5]}", False),
        ("pruning.drop_counts: {grid: [[8, 8, 8, 8]]}", False),
    ],
)
def test_a_sweep_that_prunes_nothing_says_so(rule, is_noted, tmp_path, capsys):
    sweep = (ROOT / "sweeps/locations.yaml").read_text().replace("../search_spaces/locations.yaml", "space.yaml")
    (tmp_path / "sweep.yaml").write_text(sweep.replace(" keep_rate: 0.6,", ""))
    (tmp_path / "space.yaml").write_text(rule)
    plan = make_plan(load_sweep(str(tmp_path / "sweep.yaml"), [f"root={tmp_path}/runs"]))
    print_plan(plan, [], plan.size)
    assert ("keep_rate is 1 in all trials, so nothing is pruned" in capsys.readouterr().err) is is_noted


def test_a_search_over_keep_rates_is_not_said_to_prune_nothing(tmp_path):
    (tmp_path / "space.yaml").write_text("pruning.keep_rate: {uniform: [0.5, 1.0]}")
    changes = [f"spaces=[{tmp_path}/space.yaml]", "search={method: optuna, samples: 2}", f"root={tmp_path}/runs"]
    assert make_plan(load_sweep("scores", [*changes, "report.claims=[]"])).prunes()
