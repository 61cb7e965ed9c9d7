"""Commands with towers that have no text tower."""

import json

import numpy as np
import pytest
from helpers.textless import create_textless
from PIL import Image

from patchrank import evaluate, retrieval
from patchrank.cli import flags
from patchrank.data.dataset_factory import load_split
from patchrank.golden import __main__ as golden
from patchrank.prompt import __main__ as prompt
from patchrank.retrieval import retrieval as search
from patchrank.utils.errors import UserError
from patchrank.visualize import __main__ as visualize
from patchrank.visualize import draw_rankings, rank_pictures, split_pictures

MODEL = ["--model", "timm:toy"]
PRUNED = [*MODEL, "--keep-rate", "0.4", "--locations", "2", "--reducer", "random"]


@pytest.fixture(params=[False, True], ids=["alone", "classifier"])
def classifier(request, monkeypatch):
    """Commands get a toy whatever their name says: with a classifier, or without."""
    takes = ("keep_rate", "locations", "reducer")

    def create(name, device, img_size, checkpoint, prompts, **pruning):
        return create_textless(request.param, **{key: pruning[key] for key in takes if key in pruning})

    monkeypatch.setattr(flags, "create_clip", create)
    for name in ("BUCKET_IMAGES", "KNN_IMAGES"):  # drawing scenes takes longer than a toy
        monkeypatch.setattr(evaluate, name, 60)
    return request.param


@pytest.fixture
def photos(tmp_path):
    """Labelled pictures of three colours, under names that are no words."""
    for place, name in enumerate(("été 1", "#2 (x)", "c")):
        (tmp_path / name).mkdir()
        for n in range(12):
            pixels = np.zeros((30, 40, 3), np.uint8)
            pixels[:, :, place] = 120 + 10 * n
            pixels[n : n + 9, n : n + 9] = 255 - 20 * n
            Image.fromarray(pixels).save(tmp_path / name / f"{n} & ü.png")
    return str(tmp_path)


def row_of(capsys):
    return json.loads(capsys.readouterr().out)


def test_evaluation_of_a_labelled_folder(classifier, photos, capsys):
    evaluate.main([*PRUNED, "--data", "folder", "--data-root", photos, "--split", "val"])
    row = row_of(capsys)
    assert row["n_knn_images"] == len(load_split("folder", "train", root=photos))
    assert row["knn_accuracy_unpruned"] > 50 and 0 < row["cosine"] < 1
    assert ("agreement" in row) == classifier and "accuracy" not in row and "gmacs_text" not in row


def test_no_image_is_query_and_index(classifier, photos, capsys):
    where = ["--data", "folder", "--data-root", photos]
    evaluate.main([*PRUNED, *where])
    out = capsys.readouterr()
    assert "all images of split 'train' are among those of 'all'; try --split val" in out.err
    assert "knn_accuracy" not in out.out
    evaluate.main([*PRUNED, *where, "--limit", "10", "--knn-images", "12"])
    row = row_of(capsys)
    train = load_split("folder", "train", 12, photos).ids
    assert row["n_knn_images"] == len(set(train) - set(load_split("folder", "all", 10, photos).ids)) < 12


def test_pairs_with_text_have_neighbours_where_they_are_asked_for(capsys):
    evaluate.main(["--limit", "20", "--knn-images", "40"])
    row = row_of(capsys)
    assert row["n_knn_images"] == 40 and row["knn_accuracy"] == row["knn_accuracy_unpruned"]
    with pytest.raises(UserError, match="--knn-images goes with --task classification"):
        evaluate.main(["--task", "retrieval", "--knn-images", "40"])


def test_buckets(classifier, capsys):
    evaluate.main([*PRUNED, "--limit", "12", "--bucket-rates", "0.3,0.5"])
    row = row_of(capsys)
    assert "cosine_bucketed" in row and "accuracy_bucketed" not in row


def test_retrieval_leaves_texts_out_and_says_so_where_they_were_asked_for(classifier, photos, tmp_path_factory, capsys):
    where, names = ["--data", "folder", "--data-root", photos], tmp_path_factory.mktemp("names") / "names.yaml"
    names.write_text("classes: [red, green, blue]")
    for asked in ([], ["--vocabulary", str(names)]):
        retrieval.main([*PRUNED, *where, *asked])
        out = capsys.readouterr()
        row = json.loads(out.out)
        assert ("toy has no text tower, so texts are left out" in out.err) == bool(asked)
        assert not any("text" in key for key in row) and 0 < row["drift_mean"] and row["image_recall@1"] <= 100


def test_prompts_are_refused(classifier, tmp_path, capsys):
    with pytest.raises(UserError, match="toy has no text tower"):
        prompt.main([*PRUNED, "--mode", "V", "--loss", "distill", "--out", str(tmp_path / "p.safetensors")])
    assert list(tmp_path.iterdir()) == []


def test_pictures(classifier, photos, tmp_path, capsys):
    image, out = f"{photos}/c/1 & ü.png", str(tmp_path / "picture.png")
    visualize.main([*MODEL, "--image", image, "--rank", "random", "--locations", "2", "--out", out])
    assert Image.open(out).size[0] > 500
    found = rank_pictures(create_textless(classifier), split_pictures(load_split("digits", "val", 2)), locations=(2,),
                          window=1, remove_at=2)  # fmt: skip
    assert list(found.rows)[: 2 if classifier else 1] == (["confidence"] if classifier else []) + ["preservation"]
    kept = found.rows["random"][2]
    assert (kept.answers is None, kept.drift is None) == (not classifier, classifier)
    if classifier:
        assert found.pictures.classes[3] == "class 3" and kept.probabilities.max() <= 1
    else:
        clip = create_textless(keep_rate=0.4, reducer="random")
        drift = search(clip, load_split("digits", "val", 2), quiet=True).drift
        np.testing.assert_allclose(kept.drift, drift, atol=1e-6)


def test_rankers_that_need_answers():
    pictures = split_pictures(load_split("digits", "val", 1))
    with pytest.raises(UserError, match="'confidence' needs a model that answers: a text tower or a classifier"):
        draw_rankings(create_textless(), pictures, ["confidence"], locations=(2,))
    with pytest.raises(UserError, match="'label' needs the images' labels"):
        draw_rankings(create_textless(classifier=True), pictures, ["label"], locations=(2,))


def test_golden_scores_of_photographs(classifier, photos, tmp_path_factory, capsys):
    out = str(tmp_path_factory.mktemp("shards"))
    where = ["--data", "folder", "--data-root", photos, "--split", "val", "--limit", "4", "--out", out]
    golden.main([*MODEL, *where, "--window", "1", "--remove-at", "2"])
    with open(f"{capsys.readouterr().out.strip()}/manifest.json") as file:
        assert json.load(file)["metrics"] == ["confidence"] * classifier + ["preservation"]
