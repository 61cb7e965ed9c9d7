import json
from typing import get_args

import numpy as np
import pytest

from patchrank.config import Claim, TrialConfig, validate
from patchrank.report.claims import is_about, judge
from patchrank.report.measures import MEASURES
from patchrank.report.results import Setting
from patchrank.utils.errors import UserError
from patchrank.utils.stats import Interval, holm, paired_interval

DIGITS, SCENES = 60, 2
N = DIGITS * SCENES  # images of a task


def claim(**parts):
    return validate(Claim, {"say": "It holds", "of": {}, "measure": "accuracy"} | parts, "sweep.yaml")


def ids(task, n=N, split="test"):
    return np.array([f"{task}/{split}/{i % DIGITS:04d}-{i // DIGITS}" for i in range(n)])


def setting(arrays, tasks=("digits",), **changes):
    """Arrays {name: values of every task, or {task: values}}, a list of them for seeds; changes: section__key=value."""
    config = TrialConfig(pruning={"keep_rate": 0.6}).model_dump(mode="json") | {"controls": []}  # as it comes from disk
    config["data"]["tasks"] = list(tasks)
    for path, value in changes.items():
        section, key = path.split("__")
        config[section] = config[section] | {key: value}
    seeds, rows = [], []
    for seed, per_seed in enumerate(arrays if isinstance(arrays, list) else [arrays]):
        rows.append({"config": config | {"seed": seed}, "metrics": {}})
        of_seed = {}
        for name, values in per_seed.items():
            of_seed |= {f"{task}.{name}": values[task] if isinstance(values, dict) else values for task in tasks}
            for task in tasks:
                split = "val" if name.startswith(("val_", "matching")) else "test"
                names = f"{task}.val_ids" if split == "val" else f"{task}.ids"
                of_seed[names] = ids(task, len(of_seed[f"{task}.{name}"]), split)
        seeds.append(of_seed)
    return Setting(rows, seeds)


def right(share, n=N, seed=0):
    return np.random.default_rng(seed).random(n) < share


def worse(answers, count):
    """The same answers, with the first `count` right ones wrong."""
    answers = answers.copy()
    answers[np.flatnonzero(answers)[:count]] = False
    return answers


def against_random(ours, theirs, **more):
    return [setting({"right_pruned": ours}, **more)] + [
        setting({"right_pruned": theirs}, pruning__reducer="random", **more)
    ]


BEATS_RANDOM = {"of": {"pruning.reducer": "predictor"}, "against": {"pruning.reducer": "random"}}


@pytest.mark.parametrize(
    "lost, rule, verdict",
    [
        (20, {}, "true"),
        (-20, {}, "refuted"),
        (1, {}, "open"),
        (0, {}, "open"),
        (0, {"at_least": -0.3}, "true"),
        (-20, {"at_least": -0.3}, "refuted"),
        (-1, {"at_least": -0.3}, "open"),
        (20, {"at_least": 5}, "true"),
        (20, {"at_least": 40}, "refuted"),
        (0, {"within": 0.5}, "true"),
        (1, {"within": 5}, "true"),
        (20, {"within": 5}, "refuted"),
        (-20, {"within": 5}, "refuted"),
        (1, {"within": 0.5}, "open"),
    ],
)
def test_verdicts(lost, rule, verdict):
    full = right(0.9)
    ours, theirs = (full, worse(full, lost)) if lost >= 0 else (worse(full, -lost), full)
    judgement = judge(claim(**BEATS_RANDOM, **rule), against_random(ours, theirs))
    (comparison,) = judgement.comparisons
    assert (judgement.verdict, comparison.verdict) == (verdict, verdict)
    assert comparison.interval.estimate == pytest.approx(100 * lost / N)
    assert (comparison.interval.n, comparison.interval.clusters) == (N, DIGITS)


def test_differences_are_paired():
    theirs = worse(right(0.6), 0)
    ours = theirs.copy()
    ours[np.flatnonzero(~theirs)[:6]] = True  # 5 points, far less than what images differ by
    assert judge(claim(**BEATS_RANDOM), against_random(ours, theirs)).verdict == "true"
    shuffled = np.random.default_rng(0).permutation(theirs)
    assert judge(claim(**BEATS_RANDOM), against_random(ours, shuffled)).verdict == "open"


def test_a_digit_counts_once_whatever_task_and_scene_it_stands_in():
    tasks = ("digits", "digits_full", "digits_ink")
    ours, theirs = np.ones(N, bool), np.ones(N, bool)
    for scene in range(SCENES):
        theirs[scene * DIGITS + np.arange(3)] = False  # 3 digits gained in every one of 6 pictures,
        ours[scene * DIGITS + 3] = False  # 1 lost in all of them
    judgement = judge(claim(**BEATS_RANDOM), against_random(ours, theirs, tasks=tasks))
    assert judgement.verdict == "open"
    assert judgement.comparisons[0].images == f"{3 * N} images of {DIGITS} digits"
    differences = np.tile(100.0 * ours - 100.0 * theirs, 3)
    assert paired_interval(differences, 0, np.arange(3 * N)).low > 0  # 18 against 6 pictures would have been a win


def test_seeds_are_averaged_image_by_image():
    one, two = right(0.8, seed=1), right(0.8, seed=2)
    ours = setting([{"right_pruned": one}, {"right_pruned": two}])
    theirs = setting({"right_pruned": one}, pruning__reducer="random")
    theirs.config["seed"] = 7  # partners need not share their seeds
    (comparison,) = judge(claim(**BEATS_RANDOM), [ours, theirs]).comparisons
    expected = paired_interval(50.0 * one + 50.0 * two, 100.0 * one, np.tile(np.arange(DIGITS), SCENES))
    assert comparison.interval == expected


def test_against_the_same_trials_unpruned_answers():
    full = right(0.9)
    ours = setting({"right_pruned": worse(full, 2), "right_unpruned": full, "val_right_pruned": full[:60]})
    judgement = judge(claim(against="unpruned", at_least=-5), [ours])
    assert judgement.verdict == "true"
    assert judgement.comparisons[0].interval.estimate == pytest.approx(-200 / N)
    assert judge(claim(against="unpruned", measure="val_accuracy"), [ours]).missing == ["no val_unpruned"]


def test_against_the_position_prior_on_validation_images():
    generator = np.random.default_rng(0)
    prior = generator.uniform(60, 70, 80)
    ours = setting({"right_pruned": right(0.9), "matching": prior + 2, "matching_prior": prior})
    (comparison,) = judge(claim(against="prior", measure="matching"), [ours]).comparisons
    assert comparison.interval[:3] == pytest.approx((2, 2, 2)) and comparison.interval.n == 80


def test_against_a_number_or_nothing():
    ours = setting({"same": worse(np.ones(N, bool), 3), "cosine": np.linspace(0.98, 1, N)})
    number = judge(claim(measure="agreement", against=90), [ours])
    assert number.verdict == "true" and number.figure.startswith("+7.50 [") and number.figure.endswith(" points")
    level = judge(claim(measure="agreement", at_least=90), [ours])
    assert level.verdict == "true" and level.figure.startswith("97.50 [") and level.figure.endswith("] %")
    cosine = judge(claim(measure="cosine", at_least=0.995), [ours])
    assert cosine.verdict == "refuted" and cosine.figure.startswith("0.9900 [0.98") and cosine.figure.endswith("]")


def test_each_task_with_holm():
    tasks = ("digits", "digits_full", "digits_ink")
    full = np.ones(N, bool)
    lost = dict(zip(tasks, (20, 5, 0)))
    theirs = {task: worse(full, count) for task, count in lost.items()}
    judgement = judge(claim(**BEATS_RANDOM, each=["task"]), against_random(full, theirs, tasks=tasks))
    assert [each.what for each in judgement.comparisons] == [{"task": task} for task in tasks]
    assert [each.verdict for each in judgement.comparisons] == ["true", "true", "open"]
    assert judgement.verdict == "open"
    assert {each.interval.n for each in judgement.comparisons} == {N}
    adjusted = holm([each.interval.p for each in judgement.comparisons])
    assert [each.holm_p for each in judgement.comparisons] == adjusted.tolist()
    assert judgement.figure.startswith(
        "wins 2, loses 0, not told apart 1 of 3 (after Holm: 2, 0, 1); from +0.00 to +16"
    )


def test_holm_takes_back_what_luck_explains():
    rates = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8]
    full, pairs = np.ones(N, bool), []
    for rate in rates:  # 5 digits for, none against, at one rate only
        theirs = worse(full, 5) if rate == 0.1 else full
        pairs += against_random(full, theirs, pruning__keep_rate=rate)
    judgement = judge(claim(**BEATS_RANDOM, each=["pruning.keep_rate"]), pairs)
    assert "wins 1, loses 0, not told apart 7 of 8 (after Holm: 0, 0, 8)" in judgement.line()


def test_partners_share_what_against_does_not_change():
    full, low = np.ones(N, bool), worse(np.ones(N, bool), 40)
    pairs = against_random(full, worse(full, 20), pruning__keep_rate=0.8)
    pairs += against_random(worse(low, 1), low, pruning__keep_rate=0.4)  # beats neither its partner nor the other
    judgement = judge(claim(**BEATS_RANDOM, each=["pruning.keep_rate"]), pairs)
    assert [each.verdict for each in judgement.comparisons] == ["true", "open"]


def test_every_combination_of_each():
    full = np.ones(N, bool)
    pairs = [
        part
        for rate in (0.8, 0.4)
        for part in against_random(full, worse(full, 20), tasks=("digits", "digits_ink"), pruning__keep_rate=rate)
    ]
    judgement = judge(claim(**BEATS_RANDOM, each=["task", "pruning.keep_rate"]), pairs)
    assert [tuple(each.what.values()) for each in judgement.comparisons] == [
        ("digits", 0.8),
        ("digits_ink", 0.8),
        ("digits", 0.4),
        ("digits_ink", 0.4),
    ]
    assert judgement.verdict == "true"


def test_oracles_are_compared_on_their_images_of_every_task():
    tasks, few = ("digits", "digits_ink"), 30
    theirs = np.concatenate([worse(np.ones(few, bool), 12), np.ones(N - few, bool)])
    oracle = setting({"right_pruned": np.ones(few, bool)}, tasks, pruning__reducer="golden")
    ours = setting({"right_pruned": theirs}, tasks)
    parts = {"of": {"pruning.reducer": "golden"}, "against": {"pruning.reducer": "predictor"}}
    for sides in (parts, {"of": parts["against"], "against": parts["of"]}):
        judgement = judge(claim(**sides), [oracle, ours])
        (comparison,) = judgement.comparisons
        assert abs(comparison.interval.estimate) == pytest.approx(100 * 12 / few)
        assert (comparison.interval.n, comparison.interval.clusters) == (2 * few, few)
        assert f"{2 * few} images of {few} digits" in judgement.line()


def test_only_an_oracle_may_have_fewer_images():
    with pytest.raises(UserError, match="claim 'It holds': the two sides have different images of task 'digits'"):
        judge(claim(**BEATS_RANDOM), against_random(right(0.9), right(0.9)[:50]))
    pair = against_random(right(0.9), right(0.9))
    pair[1].arrays[0]["digits.ids"] = pair[1].arrays[0]["digits.ids"][::-1]
    with pytest.raises(UserError, match="different images"):
        judge(claim(**BEATS_RANDOM), pair)


def test_what_a_run_does_not_hold_is_not_measured():
    ours, theirs = against_random(right(0.9), right(0.5))
    absent = judge(claim(of={"pruning.keep_rate": 0.123}), [ours, theirs])
    assert absent.verdict == "not measured" and absent.comparisons == []
    assert absent.line() == "**not measured**: It holds: no such setting in this run"
    assert judge(claim(**BEATS_RANDOM), [ours]).missing == ["nothing to compare with"]
    assert judge(claim(of={"pruning.reducer": "predictor"}, measure="kendall"), [ours]).missing == ["no kendall"]
    one = against_random(*np.ones((2, 1), bool))
    assert judge(claim(**BEATS_RANDOM), one).missing == ["one digit alone"]


def test_a_part_that_is_missing_leaves_a_claim_open():
    full = np.ones(N, bool)
    pairs = against_random(full, worse(full, 20), pruning__keep_rate=0.8)
    pairs += against_random(full, worse(full, 20), pruning__keep_rate=0.4)[:1]
    judgement = judge(claim(**BEATS_RANDOM, each=["pruning.keep_rate"]), pairs)
    assert judgement.verdict == "open" and judgement.comparisons[0].verdict == "true"
    assert "not measured: 40 %: nothing to compare with" in judgement.line()


def test_what_is_ambiguous_must_be_said():
    pairs = [part for rate in (0.4, 0.8) for part in against_random(*np.ones((2, N), bool), pruning__keep_rate=rate)]
    with pytest.raises(UserError, match="claim 'It holds': several settings .* differ in pruning.keep_rate; say which"):
        judge(claim(**BEATS_RANDOM), pairs)
    with pytest.raises(UserError, match="differ in pruning.reducer"):
        judge(claim(each=["pruning.keep_rate"]), pairs)


def test_one_factor_at_a_time_against_the_usual():
    full = np.ones(N, bool)
    usual = setting({"right_pruned": worse(full, 20)})
    wide = setting({"right_pruned": full}, golden__window=3)
    greedy = setting({"right_pruned": worse(full, 40)}, golden__rounds=4)
    parts = {"against": {"golden": {"window": 2, "rounds": 1}}, "each": ["golden"]}
    judgement = judge(claim(**parts), [usual, wide, greedy])
    assert [each.what["golden"] for each in judgement.comparisons] == [
        {"window": 3, "rounds": 1},
        {"window": 2, "rounds": 4},
    ]
    assert [each.verdict for each in judgement.comparisons] == ["true", "refuted"] and judgement.verdict == "refuted"
    assert "| window 3, rounds 1 | +16.67" in judgement.details()
    part = judge(claim(of={"golden": {"window": 3}}, against=100, within=1), [usual, wide, greedy])
    assert part.verdict == "true"


def test_line_and_table():
    pair = against_random(np.ones(N, bool), worse(np.ones(N, bool), 1))
    judgement = judge(claim(say="A | B", **BEATS_RANDOM), pair)
    low, high = judgement.comparisons[0].interval[1:3]
    text = f"+0.83 [{low:+.2f}, {high:+.2f}] points"
    assert judgement.line() == f"**not told apart**: A | B: {text}; 120 images of 60 digits"
    tasks = judge(claim(**BEATS_RANDOM, each=["task"]), against_random(*np.ones((2, N), bool), tasks=("a", "b|c")))
    head, rule, first, second = tasks.details().splitlines()
    assert head == "| task | difference, 95 % interval | p | p after Holm | verdict | images |"
    assert first == "| a | +0.00 [+0.00, +0.00] points | 1.0000 | 1.0000 | not told apart | 120 |"
    assert second.startswith("| b\\|c | +0.00 [") and head.count("|") == rule.count("|") == first.count("|")


def test_a_judgement_stands_in_json_with_all_its_figures():
    pair = against_random(np.ones(N, bool), worse(np.ones(N, bool), 9))
    for parts in ({}, {"each": ["task", "golden"]}, {"measure": "kendall"}, {"within": 2, "against": 99}):
        judgement = judge(claim(**BEATS_RANDOM | parts), pair)
        saved = json.loads(json.dumps(judgement.to_json(), allow_nan=False))
        assert (saved["verdict"], saved["missing"]) == (judgement.verdict, judgement.missing)
        assert Claim.model_validate(saved["claim"]) == judgement.claim and saved["overall"] is None
        assert len(saved["comparisons"]) == len(judgement.comparisons) == (parts.get("measure") != "kendall")
        for each, comparison in zip(saved["comparisons"], judgement.comparisons):
            assert Interval(**{name: each[name] for name in Interval._fields}) == comparison.interval
            told = [each[name] for name in ("what", "holm_p", "verdict", "images")]
            assert told == [comparison.what, comparison.holm_p, comparison.verdict, comparison.images]


def test_measures_are_those_of_results():
    assert set(get_args(Claim.model_fields["measure"].annotation)) == set(MEASURES)


@pytest.mark.parametrize(
    "parts, message",
    [
        ({"at_least": 1.0, "within": 1.0}, "at_least and within exclude each other"),
        ({"within": 0.0}, "within is 0.0, but should be greater than 0"),
        ({"at_least": float("nan")}, "at_least is nan, but should be a finite number"),
        ({"measure": "acuracy"}, "measure is 'acuracy', but should be 'accuracy'"),
        ({"of": {"pruning.keep_rat": 0.6}}, "'pruning.keep_rat' is no setting .* did you mean 'pruning.keep_rate'"),
        ({"of": {"golden": {"windw": 3}}}, "'golden.windw' is no setting .* did you mean 'golden.window'"),
        ({"of": {"seed": 0}}, "'seed' is no setting that can be compared"),
        ({"of": {"controls": []}}, "'controls' is no setting that can be compared"),
        ({"of": {"task": "digits"}}, "'task' is no setting that can be compared"),
        ({"each": ["tasks"]}, "'tasks' is no setting that can be compared; did you mean 'task'"),
        ({"against": {"pruning.reducr": "x"}}, "did you mean 'pruning.reducer'"),
        ({"against": {}}, "against changes nothing"),
        ({"of": {"golden": {"window": 3}}, "against": {"golden.window": 3}}, "against changes nothing"),
        ({"against": "unprunde"}, "accuracy against 'unprunde' cannot be compared; known: accuracy against unpruned"),
        ({"against": "prior"}, "accuracy against 'prior' cannot be compared"),
        ({"say": "two\nlines"}, "say is"),
        ({"share": 0.5, "within": 1.0}, "exclude each other"),
        ({"share": 0.5}, "share needs another side"),
        ({"task": "digits", "each": ["task"]}, "task names one task"),
        ({"expect": 3}, "key 'expect' does not exist"),
    ],
)
def test_claims_are_checked_when_they_are_read(parts, message):
    with pytest.raises(UserError, match=f"^sweep.yaml: .*{message}"):
        claim(**parts)


def test_several_comparisons_have_one_interval_over_all_their_images():
    """Tasks share their digits, so that the interval over both is that of the digits' means, not of twice as many."""
    found = {name: right(share, seed=n) for n, (name, share) in enumerate({"digits": 0.9, "digits_full": 0.8}.items())}
    less = {task: worse(answers, 9) for task, answers in found.items()}
    both = judge(claim(**BEATS_RANDOM, each=["task"]), against_random(found, less, tasks=("digits", "digits_full")))
    joined = judge(claim(**BEATS_RANDOM), against_random(found, less, tasks=("digits", "digits_full")))
    assert both.overall == joined.comparisons[0].interval and joined.overall is None
    assert both.overall.clusters == DIGITS and both.overall.n == 2 * N
    assert "on average +7.50 [" in both.line()
    assert both.to_json()["overall"] == both.overall._asdict()


def test_a_loss_that_luck_explains_refutes_no_claim_of_several():
    full, pairs = np.ones(N, bool), []
    for rate in (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8):
        pairs += against_random(worse(full, 5) if rate == 0.1 else full, full, pruning__keep_rate=rate)
    judgement = judge(claim(**BEATS_RANDOM, each=["pruning.keep_rate"]), pairs)
    assert judgement.comparisons[0].verdict == "refuted" and judgement.verdict == "open"
    pairs = [part for rate in (0.1, 0.2) for part in against_random(worse(full, 40), full, pruning__keep_rate=rate)]
    assert judge(claim(**BEATS_RANDOM, each=["pruning.keep_rate"]), pairs).verdict == "refuted"


def prompted(arrays, mode, loss="cross_entropy", **changes):
    found = setting(arrays, **changes)
    for row in found.rows:
        row["config"]["prompt"] = {"mode": mode, "loss": loss}
    return found


def test_a_share_is_of_what_the_other_side_has():
    """1 - cosine of 4 thousandths against 10, and against 6."""
    ours = prompted({"cosine": np.full(N, 0.996)}, "V", "distill")
    claimed = claim(of={"prompt.loss": "distill"}, against={"prompt.mode": "none", "prompt.loss": "cross_entropy"},
                    measure="drift", share=0.5)  # fmt: skip
    far, near = (prompted({"cosine": np.full(N, value)}, "none") for value in (0.990, 0.994))
    assert judge(claimed, [ours, far]).verdict == "true"
    assert judge(claimed, [ours, far]).comparisons[0].interval.estimate == pytest.approx(1.0)
    assert judge(claimed, [ours, near]).verdict == "refuted"
    assert judge(claimed, [ours, far]).figure.startswith("0.5 of theirs less ours +1.0000 [")


def test_a_claim_may_be_about_one_task():
    right = {"digits": np.ones(N, bool), "digits_ink": np.arange(N) % 2 == 0}
    found = setting({"right_pruned": right, "right_unpruned": np.ones(N, bool)}, tasks=("digits", "digits_ink"))
    lost, none = (judge(claim(against="unpruned", task=task), [found]) for task in ("digits_ink", "digits"))
    assert lost.comparisons[0].interval.estimate == pytest.approx(-50) and lost.comparisons[0].interval.n == N
    assert none.comparisons[0].interval.estimate == 0
    missing = judge(claim(against="unpruned", task="digits_full"), [found])
    assert missing.verdict == "not measured" and "no task digits_full" in missing.figure


def test_a_list_stands_for_any_of_its_values_unless_the_setting_is_a_list():
    near, far = (setting({"right_pruned": np.ones(N, bool)}, pruning__keep_rate=rate) for rate in (0.8, 0.2))
    rates = claim(of={"pruning.keep_rate": [0.8, 0.5]})
    assert is_about(rates, near) and not is_about(rates, far)
    assert is_about(claim(of={"pruning.locations": [4, 6, 8, 10]}), near)
    assert not is_about(claim(of={"pruning.locations": [[4, 6, 8, 10], [1]]}), near)
    assert not is_about(claim(of={"prompt.mode": "TV"}), near)  # which has no prompts
