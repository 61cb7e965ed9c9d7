"""Trials of towers without a text tower, from golden shards to the report."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers.textless import create_textless

from patchrank.config import Objective, ReportConfig, TrialConfig
from patchrank.data.dataset_factory import load_split
from patchrank.golden.make_shards import make_shards, shard_folder
from patchrank.golden.scores import score_images
from patchrank.golden.shards import read_manifest, stream
from patchrank.report.page import write_report
from patchrank.report.results import read_settings, read_trial
from patchrank.trial import inputs as inputs_module
from patchrank.trial.forecast import Work, count_trial
from patchrank.trial.inputs import Inputs
from patchrank.trial.requirements import ResolvedTrial, TrialContext
from patchrank.trial.run import figures_of, run_trial
from patchrank.tune.best import choose
from patchrank.utils.errors import UserError

BASE = {
    "data": {"tasks": ["digits"], "n_train": 60, "n_val": 24, "n_test": 20},
    "golden": {"window": 1, "remove_at": 2},
    "predictor": {"epochs": 2},
    "pruning": {"locations": [2], "keep_rate": 0.4},
}


def trial_of(**changes):
    return ResolvedTrial(TrialConfig.model_validate(BASE | changes))


@pytest.fixture(scope="module")
def inputs():
    return Inputs(create_textless(), trial_of().config.data)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(tmp_path_factory.mktemp("textless"))


@pytest.fixture(scope="module")
def records(inputs, folder):
    """Of a predictor with a control, of a repair, and of a ranking that is not fitted."""
    changes = {"controls": ["random"]}, {"repair": {"images": 60}}, {"pruning": BASE["pruning"] | {"reducer": "random"}}
    return [run_trial(trial_of(**each), inputs, folder, f"{folder}/shards", "t", quiet=True) for each in changes]


def test_a_trial_measures_drift_and_neighbours(records, folder):
    first, metrics = records[0], records[0]["metrics"]
    assert {"val_cosine", "cosine", "matching_rate", "val_knn_accuracy", "knn_accuracy_random"} < metrics.keys()
    assert not {"accuracy", "agreement", "val_accuracy", "gmacs_text"} & metrics.keys()
    arrays = dict(np.load(f"{folder}/trials/{first['id']}.npz", allow_pickle=False))
    for prefix, part in (("val_", "val"), ("", "test")):
        right, ids = arrays[f"digits.{prefix}knn_right_pruned"], load_split("digits", part).ids
        assert metrics[f"{prefix}knn_accuracy"] == pytest.approx(100 * right.mean())
        assert arrays[f"digits.{prefix}ids"].tolist() == ids[: len(right)]
        assert metrics[f"{prefix}knn_agreement"] == pytest.approx(100 * arrays[f"digits.{prefix}knn_same"].mean())
    assert "digits.same" not in arrays and "digits.right_pruned" not in arrays
    repaired = records[1]["metrics"]
    assert repaired["n_repair_images"] == 60 and repaired["val_cosine"] != metrics["val_cosine"]


def test_the_index_is_embedded_once_and_of_pairs_never(inputs, records, clip, monkeypatch):
    asked = []
    monkeypatch.setattr(inputs_module, "embed_unpruned", lambda clip, split: asked.append(split.split))
    assert inputs.neighbours("digits", "val").labels.tolist() == load_split("digits", "adapt", 60).labels
    pair = Inputs(clip, trial_of().config.data)
    assert pair.neighbours("digits", "val") is None and asked == []


def test_a_forecast_counts_the_index_once(inputs):
    trial = trial_of(pruning=BASE["pruning"] | {"reducer": "random"})
    context, work = TrialContext(trial, inputs), Work()
    count_trial(context, 0, work)
    forwards = work.forwards
    count_trial(context, 0, work)
    assert forwards == 3 * (24 + 20) + 60 and work.forwards == forwards + 24 + 20


def test_a_report_is_about_neighbours(records, folder):
    rows = [json.loads(json.dumps(each)) for each in records]
    config = ReportConfig(table="toy", claims=[{"say": "It holds", "of": {"pruning.reducer": "random"}, **CLAIM}])
    by = [Objective(metric="val_knn_accuracy", mode="max"), Objective(metric="gmacs", mode="min")]
    report = write_report(rows, folder, config, ["pruning.reducer", "repair"], "toy", objectives=by)
    page = open(report.path).read()
    assert "k-NN accuracy" in report.table and "at random (control)" in page and "k-NN accuracy, val" in page
    assert "Zero-shot" not in page and "by a vote of the 20 nearest training images" in page
    setting = read_settings([read_trial(folder, rows[0])])[0]
    assert setting.worth == "k-NN accuracy" and setting.shown("unpruned") == "knn_unpruned"
    assert [each["verdict"] for each in json.load(open(f"{folder}/claims.json"))["claims"]] != ["not measured"]


CLAIM = {"measure": "knn_accuracy", "against": "unpruned", "at_least": -100.0}


@pytest.mark.parametrize("kept, worth", [("same", "agreement"), ("cosine", "100 cosine")])
def test_a_report_without_labels_is_about_agreement_or_cosine(records, folder, kept, worth, tmp_path):
    row, arrays = read_trial(folder, json.loads(json.dumps(records[2])))
    arrays = {key: each for key, each in arrays.items() if "knn" not in key}
    arrays |= {f"digits.{part}same": np.ones(count, bool) for part, count in (("", 20), ("val_", 24)) if kept == "same"}
    row["metrics"] = {key: each for key, each in row["metrics"].items() if "knn" not in key} | {"agreement": 100.0}
    (tmp_path / "trials").mkdir()
    np.savez(tmp_path / "trials" / f"{row['id']}.npz", **arrays)
    report = write_report([row], str(tmp_path), ReportConfig(table="toy"), [], "toy")
    assert worth in report.table and read_settings([(row, arrays)])[0].worth == worth


def test_unlabelled_images_leave_drift_alone(inputs, folder, monkeypatch):
    known = inputs_module.load_part
    monkeypatch.setattr(inputs_module, "load_part", lambda *args: replace(known(*args), labels=None, classes=()))
    trial = trial_of(pruning=BASE["pruning"] | {"reducer": "random"})
    blind = Inputs(inputs.clip, inputs.data)
    metrics = run_trial(trial, blind, folder, f"{folder}/shards", "t", quiet=True)["metrics"]
    assert "val_cosine" in metrics and not any("accuracy" in key or "agreement" in key for key in metrics)
    assert figures_of(TrialContext(trial, blind)) == {"val_cosine"}


def test_a_classifier_has_golden_scores_of_its_answers(tmp_path):
    clip, split = create_textless(classifier=True), load_split("digits", "adapt", 6)
    folder = shard_folder(clip, split, str(tmp_path), window=1, remove_at=2, metric="confidence")
    samples = list(stream(make_shards(clip, split, folder, quiet=True)))
    assert read_manifest(folder.path)["metrics"] == ["confidence", "preservation"]
    images = torch.stack([clip.transform()(split.image(i)) for i in range(6)])
    expected = score_images(clip.visual, images, None, window=1, remove_at=2, classifier=clip.classifier).scores
    np.testing.assert_allclose(np.stack([each.scores for each in samples]), expected.float().numpy(), atol=1e-5)
    headed = create_textless().visual  # the same tower with the classifier as its own head
    headed.head, headed.num_classes = clip.classifier, 10
    theirs = score_images(headed, images, None, window=1, remove_at=2, classifier=True).scores
    torch.testing.assert_close(theirs, expected)
    clip.class_names = split.classes
    named = shard_folder(clip, split, str(tmp_path), window=1, remove_at=2, metric="label")
    assert named.header["metrics"] == ["label", "confidence", "preservation"]


@pytest.mark.parametrize(
    "classifier, metric, words",
    [
        (False, "confidence", "neither a text tower nor a classifier; try preservation"),
        (False, "label", "neither a text tower nor a classifier; try preservation"),
        (True, "label", "do not have the names of the classifier's classes; try preservation"),
    ],
)
def test_metrics_that_cannot_be_had(classifier, metric, words, tmp_path):
    split = load_split("digits", "adapt", 3)
    with pytest.raises(UserError, match=words):
        shard_folder(create_textless(classifier), split, str(tmp_path), metric=metric)


def test_prompts_are_refused_before_anything_is_computed(inputs, tmp_path):
    with pytest.raises(UserError, match="toy has no text tower"):
        run_trial(trial_of(prompt={"mode": "V"}), inputs, str(tmp_path), str(tmp_path), "t", quiet=True)
    assert list(tmp_path.iterdir()) == []


def test_a_choice_by_a_figure_that_is_not_there_names_what_is(records):
    with pytest.raises(UserError, match="none has val_accuracy.*try .* val_cosine, val_knn_accuracy"):
        choose(records, [Objective(metric="val_accuracy", mode="max")], [])
    assert choose(records, [Objective(metric="val_knn_accuracy", mode="max")], []) in records
