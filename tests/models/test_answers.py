"""What towers without a text tower answer: by their own classifier, and by the nearest labelled images."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers.textless import create_textless

from patchrank.data.dataset_factory import load_split
from patchrank.models.answers import NEIGHBOURS, TEMPERATURE, Neighbours, known_labels, places_apart
from patchrank.models.clip import macs_row
from patchrank.models.embed import embed_unpruned, evaluate


@pytest.fixture(scope="module")
def split():
    return load_split("digits", "val", 30)


@pytest.fixture(scope="module")
def train():
    return load_split("digits", "adapt", 60)


def test_twenty_neighbours_vote_by_their_cosine():
    generator = torch.Generator().manual_seed(0)
    index, queries = (torch.randn(count, 6, generator=generator) for count in (50, 9))
    labels = torch.randint(4, (50,), generator=generator)
    found = Neighbours(index, labels).answers(queries)
    for query, answer in zip(queries, found):
        cosine = torch.cosine_similarity(query[None], index)
        votes = [0.0] * 4
        for place in cosine.argsort(descending=True)[:20]:
            votes[labels[place]] += float((cosine[place] / 0.07).exp())
        assert answer == np.argmax(votes)
    assert (NEIGHBOURS, TEMPERATURE) == (20, 0.07)


def test_one_near_neighbour_outweighs_many_far_ones():
    index = torch.tensor([[1.0, 0.02], *[[0.6, 0.8]] * 5])
    few = Neighbours(index, torch.tensor([1, 0, 0, 0, 0, 0]))  # fewer than twenty, so all of them vote
    assert few.answers(torch.tensor([[1.0, 0.0], [0.5, 0.9]])).tolist() == [1, 0]


def test_no_image_and_no_group_of_a_split_answers_for_it(split, train):
    assert places_apart(train, split) == list(range(60))
    assert places_apart(split, split) == []
    ours = replace(split.first(3), ids=["new/0", "new/1", "new/2"])  # other scenes of the same digits
    assert set(places_apart(split, ours)).isdisjoint({0, 1, 2})
    alone = replace(split, groups=None, unit="image")
    assert places_apart(alone, alone.take([0, 2])) == [1, *range(3, 30)]


def test_neighbours_answer_beside_drift_and_nothing_else_does(split, train):
    clip = create_textless(keep_rate=0.4, reducer="random")
    neighbours = Neighbours(embed_unpruned(clip, train), torch.tensor(train.labels))
    found = evaluate(clip, split, ["random"], neighbours=neighbours, quiet=True)
    row = found.row()
    assert found.answers == {} and set(row) == {
        *("knn_accuracy", "knn_accuracy_unpruned", "knn_accuracy_random", "knn_agreement", "cosine")
    }
    unpruned = neighbours.answers(embed_unpruned(clip, split))
    assert row["knn_accuracy_unpruned"] == pytest.approx(100 * np.mean(unpruned == np.asarray(split.labels)))
    assert row["knn_accuracy_random"] == row["knn_accuracy"] and 0 < row["knn_agreement"] < 100
    assert row["cosine"] < 0.999 and set(evaluate(clip, split, quiet=True).row()) == {"cosine"}


def test_a_classifier_reads_embeddings_that_are_not_normalised(split):
    clip = create_textless(classifier=True, keep_rate=0.3, reducer="random")
    images = torch.cat([images for images, _ in split.batches(clip.transform(), 30)])
    with torch.no_grad():
        raw = clip.visual(images)
        mean = raw.mean(0)
        clip.classifier.weight.zero_()[0] = mean / mean.norm()
        clip.classifier.bias.zero_()[1] = mean.norm() / 2  # which wins over every unit vector, and over no embedding
    assert mean.norm() > 3
    found = evaluate(clip, split, quiet=True)
    assert (found.answers["pruned"] == 0).all() and (found.answers["unpruned"] == 0).all()
    assert found.labels is None and set(found.row()) == {"agreement", "cosine"}


def test_accuracy_of_a_classifier_needs_names_that_both_sides_have(split):
    clip = create_textless(classifier=True)
    assert known_labels(clip, split) is None
    clip.class_names = ("Nine, 9", "eight", "seven", "six", "five", "four", "three", "two_", "one", "ZERO, nought")
    assert known_labels(clip, split).tolist() == [9 - label for label in split.labels]
    assert {"accuracy", "accuracy_unpruned"} < evaluate(clip, split, quiet=True).row().keys()
    clip.class_names = ("nine, eight", "eight, big", *clip.class_names[2:])  # nobody knows which `eight` is meant
    assert known_labels(clip, split) is None
    unknown = replace(split, classes=()), replace(split, labels=None)
    assert [known_labels(clip, each) for each in unknown] == [None, None]


def test_captions_cost_nothing_where_there_is_no_text_tower(clip):
    assert "gmacs_text" in macs_row(clip) and "gmacs_text" not in macs_row(create_textless())
