"""A tower and a pair that serve several threads give each what it would get alone."""

import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import timm
import torch
from helpers.learned_tokens import B, create

from patchrank.layers.norm_gains import layer_norms
from patchrank.layers.prompts import Prompts

CLASSES = [("zero", "one"), ("two", "three", "four"), ("five", "six")]


@pytest.fixture
def switching_often():
    """Threads take turns so often that one is stopped at any place sooner or later."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def in_threads(calls, count=300, threads=4):
    """What each of many calls gave, in turn and side by side."""
    alone = [call() for call in calls]
    with ThreadPoolExecutor(threads) as pool:
        return alone, [each.result() for each in [pool.submit(call) for call in calls * (count // len(calls))]]


def assert_same(alone, together):
    wrong = sum(not torch.equal(alone[n % len(alone)], found) for n, found in enumerate(together))
    assert not wrong, f"{wrong} of {len(together)} answers differ"


@torch.inference_mode()
@pytest.mark.parametrize("reducer, hooked", [("predictor", False), ("cls_attention", False), ("cls_attention", True)])
def test_the_three_forwards_of_a_pruned_and_prompted_tower_side_by_side(images, reducer, hooked, switching_often):
    torch.manual_seed(0)
    shape = {"depth": 2, "locations": (1, 2), "keep_rate": 0.5, "reducer": reducer, "predictor_init": "random"}
    tower = timm.create_model("patchrank_clip_digits", **shape).eval()
    for block in tower.blocks if hooked else ():  # norms and attention are then listened to, each thread to its own
        block.register_forward_pre_hook(lambda block, args: None)
    prompts = create("V", num_norms=len(layer_norms(tower)))
    prompts.norm_gains.copy_(torch.randn(prompts.norm_gains.shape, generator=torch.Generator().manual_seed(3)))
    tower.set_prompts(prompts)

    def call(forward, image):
        def run():
            with torch.inference_mode():  # a setting of each thread's own
                found = forward(image[None])
            return getattr(found, "embedding", found)

        return run

    forwards = (tower, tower.forward_whole, tower.forward_pruned)
    alone, together = in_threads([call(forward, image) for image in images[:2] for forward in forwards])
    assert_same(alone, together)
    assert not torch.allclose(alone[0], alone[1], atol=1e-2)  # prompts and pruning matter
    assert tower.num_prompt_tokens == B and torch.equal(tower(images[:1]), alone[0])


def test_class_embeddings_of_several_sets_of_classes_side_by_side(clip, switching_often, monkeypatch):
    prompts = Prompts("T", 2, 64, 64)
    monkeypatch.setattr("patchrank.models.text.encode_tokens", lambda tower, ids, learned: ids.float())  # fast
    calls = [lambda classes=classes: clip.prompted_head(classes, prompts) for classes in CLASSES]
    assert_same(*in_threads(calls, count=1500, threads=8))
