import json
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.image_files import write

from patchrank.data.dataset_factory import load_split
from patchrank.retrieval import main, retrieval
from patchrank.utils.errors import UserError

N = 40


@pytest.fixture(scope="module")
def split(clip):
    """The first validation images, decoded once."""
    return load_split("digits", "val", N).loaded(clip.transform(), 1 << 30)


CAPTIONS = {  # of a few images, as many as Flickr30k has or fewer; some are equal, also of two images
    0: ("a zero", "nothing", "a zero"),
    1: ("a one", "a digit"),
    2: ("a digit", "something", "the number two", "2", "a picture of a two"),
    3: ("nothing",),
}


def recall_by_hand(queries, candidates, right, k):
    """Share of queries of whose right candidates one is among the k nearest, by sorting all of them."""
    cosine = F.normalize(queries.double(), dim=-1) @ F.normalize(candidates.double(), dim=-1).T
    found = cosine.argsort(dim=1, descending=True)[:, :k].tolist()
    return 100 * float(np.mean([bool(own & set(places)) for own, places in zip(right, found)]))


@torch.no_grad()
def test_any_of_several_captions_counts(clip, split):
    captions = [CAPTIONS.get(i, (f"picture {i}", f"drawing number {i}")) for i in range(N)]
    clip.visual.set_pruning(keep_rate=0.4)
    found = retrieval(clip, replace(split, captions=captions), ks=(1, 3, 10), quiet=True)
    texts = sorted({text for own in captions for text in own})
    vectors = clip.encode_text(texts)
    own_texts = [{texts.index(text) for text in own} for own in captions]
    own_images = [{i for i, own in enumerate(captions) if text in own} for text in texts]
    row = found.row()
    assert row["n_images"] == N and row["n_texts"] == len(texts) == 2 * (N - 4) + 8
    for end, images in (("", found.pruned), ("_unpruned", found.unpruned)):
        for k in (1, 3, 10):
            by_hand = recall_by_hand(images, vectors, own_texts, k)
            assert row[f"text_recall@{k}{end}"] == pytest.approx(by_hand)
            by_hand = recall_by_hand(vectors, images, own_images, k)
            assert row[f"text_to_image_recall@{k}{end}"] == pytest.approx(by_hand)
    assert 0 < row["text_recall@1"] < row["text_recall@10"] < 100


def test_the_order_and_number_of_equal_captions_changes_nothing(clip, split):
    clip.visual.set_pruning(keep_rate=0.6)
    captions = [(f"a {split.classes[label]}", f"digit {i}") for i, label in enumerate(split.labels)]
    row = retrieval(clip, replace(split, captions=captions), quiet=True).row()
    turned = [own[::-1] * (1 + i % 3) for i, own in enumerate(captions)]
    assert retrieval(clip, replace(split, captions=turned), quiet=True).row() == pytest.approx(row)


def test_one_caption_is_a_text_or_a_tuple_of_one(clip, split, capsys):
    texts = [f"number {i % 7}" for i in range(N)]
    row = retrieval(clip, replace(split, captions=texts), quiet=True).row()
    assert retrieval(clip, replace(split, captions=[(text,) for text in texts]), quiet=True).row() == row
    assert capsys.readouterr().err == ""
    retrieval(clip, replace(split, captions=["", *texts[1:]]), quiet=True)
    assert "digits/val: some images have an empty caption, which counts as a text" in capsys.readouterr().err
    with pytest.raises(UserError, match=f"digits/val: image {split.ids[3]} has no caption, but must have one or more"):
        retrieval(clip, replace(split, captions=[*texts[:3], (), *texts[4:]]), quiet=True)


def test_a_csv_of_five_captions_an_image(tmp_path, capsys):
    """From the file to the row: images are counted once, captions each."""
    images = load_split("digits", "val", 12)
    lines = ["path,caption"]
    for i in range(12):
        write(tmp_path / f"{i}.png", images.content(i))
        lines += [f"{i}.png,caption {n} of image {i}" for n in range(5)]
    write(tmp_path / "flickr.csv", "\n".join(lines))
    main(["--data", "folder", "--data-root", str(tmp_path / "flickr.csv"), "--limit", "8", "--keep-rate", "0.6"])
    row = json.loads(capsys.readouterr().out)
    assert (row["n_images"], row["n_texts"]) == (8, 40) and {"text_recall@10", "text_to_image_recall@5"} <= set(row)
