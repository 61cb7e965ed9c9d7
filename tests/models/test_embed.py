"""The one loop over images: what it gives, and which layers it runs."""

import pytest
import torch
import torch.nn.functional as F

from patchrank.data.dataset_factory import load_split
from patchrank.layers.prompts import Prompts
from patchrank.models.embed import embed, embed_shared, embed_unpruned, evaluate, split_batches


@pytest.fixture(scope="module")
def split():
    return load_split("digits", "val", 20)


def calls_of(block, run):
    """How often a layer runs during a call, and what the call gives."""
    calls = []
    handle = block.register_forward_hook(lambda *_: calls.append(1))
    try:
        found = run()
    finally:
        handle.remove()
    return len(calls), found


@pytest.mark.parametrize("reducer", ["predictor", "cls_attention"])
def test_layers_that_pruning_does_not_touch_run_once_for_all_variants(clip, split, reducer):
    clip.visual.set_pruning(keep_rate=0.5, reducer=reducer)
    controls, first, fourth = ["random", "reversed"], clip.visual.blocks[0], clip.visual.blocks[3]
    count, found = calls_of(first, lambda: evaluate(clip, split, controls, batch_size=10, quiet=True))
    assert count == 2  # one for each batch
    unpruned = embed_unpruned(clip, split, batch_size=10)
    tokens = embed_shared(clip, split, batch_size=10)
    given = {"unpruned": unpruned, "tokens": tokens}
    count, again = calls_of(first, lambda: evaluate(clip, split, controls, batch_size=10, quiet=True, **given))
    assert count == 0
    for name in found.cosine:
        assert (found.cosine[name] == again.cosine[name]).all() and (found.answers[name] == again.answers[name]).all()
    assert (found.kept == again.kept).all()
    assert calls_of(fourth, lambda: evaluate(clip, split, batch_size=10, quiet=True))[0] == 4


@pytest.mark.parametrize("prompted", [False, True])
def test_each_variant_is_what_its_own_forward_gives(clip, split, prompted):
    clip.visual.set_pruning(keep_rate=0.5)
    with clip.applied(prompts=Prompts("V", 2, 64, 64, num_norms=26) if prompted else None), torch.no_grad():
        vectors, left = embed(clip, split_batches(clip, split, batch_size=10, quiet=True))
        for images, places in split.batches(clip.transform(), 10):
            here = slice(places.start, places.stop)
            pruned = clip.visual.forward_pruned(images)
            assert torch.equal(vectors["pruned"][here], F.normalize(pruned.embedding, dim=-1))
            assert torch.equal(vectors["unpruned"][here], F.normalize(clip.visual.forward_whole(images), dim=-1))
            assert torch.equal(left.kept[here], pruned.kept) and left.source is None
    assert list(vectors) == ["unpruned", "pruned"]


def test_only_what_is_asked_for_is_embedded(clip, split):
    clip.visual.set_pruning(keep_rate=0.5, reducer="center")
    batches = split_batches(clip, split, batch_size=10, quiet=True)
    count, found = calls_of(clip.visual.blocks[-2], lambda: embed(clip, batches, with_unpruned=False))
    assert count == 2 and list(found[0]) == ["pruned"]
