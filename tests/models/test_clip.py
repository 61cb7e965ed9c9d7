import pytest
import timm
import torch

import patchrank
from patchrank.data.dataset_factory import load_split
from patchrank.data.digits import scenes as digits
from patchrank.layers.prompts import Prompts
from patchrank.models.embed import embed_unpruned
from patchrank.models.pretrained import TEXT_CFGS, WEIGHTS
from patchrank.models.text import create_text_tower
from patchrank.utils.errors import UserError


@pytest.mark.slow
def test_zero_shot_accuracy_of_the_shipped_pair(clip):
    """At least 90 % on every test digit, and an unseen template costs at most 2 points."""
    split = load_split("digits", "test")
    embeddings = embed_unpruned(clip, split)

    def accuracy(templates):
        answers = (embeddings @ clip.zero_shot_head(split.classes, templates).T).argmax(-1)
        return 100 * (answers == torch.as_tensor(split.labels)).float().mean().item()

    seen = accuracy(split.templates)
    assert seen >= 90
    assert accuracy((digits.UNSEEN_TEMPLATE,)) >= seen - 2


def test_shipped_weights_are_small_and_half_precision():
    from safetensors.torch import load_file

    path = WEIGHTS / "patchrank_clip_digits.safetensors"
    assert path.stat().st_size <= 10e6
    assert {t.dtype for t in load_file(path).values()} == {torch.float16}


def test_the_unseen_template_is_unseen():
    from patchrank.data.digits.captions import NOUNS, OPENERS, TAILS

    assert digits.UNSEEN_TEMPLATE not in {o + n + t for o in OPENERS for n in NOUNS for t in TAILS}


@torch.no_grad()
def test_head_averages_templates_and_is_cached(clip):
    head = clip.zero_shot_head(("zero", "one"), ("a {}.", "the {}"))
    z = clip.encode_text(["a one.", "the one"]).mean(0)
    torch.testing.assert_close(head[1], z / z.norm())
    assert clip.zero_shot_head(("zero", "one"), ("a {}.", "the {}")) is head


@pytest.mark.parametrize("device", ["mps", "meta", "nosuch", "cuda:99"])
def test_a_device_that_cannot_be_used_is_refused_in_one_short_line(device):
    from patchrank.utils.device import check_device

    if device == "mps" and torch.backends.mps.is_available():
        device = "mps:99"
    with pytest.raises(UserError, match=f"device '{device}' cannot be used here") as caught:
        check_device(device)
    assert len(str(caught.value)) < 300
    check_device("cpu")


def test_other_weights_empty_the_cache_of_heads(clip):
    head = clip.zero_shot_head(("four",), ("a {}.",))
    clip.load_state_dict(clip.state_dict())
    assert clip.zero_shot_head(("four",), ("a {}.",)) is not head


def test_a_cached_head_may_stand_in_a_graph(clip):
    with torch.inference_mode():
        head = clip.zero_shot_head(("two", "three"), ("a {}.",))
    z = torch.randn(1, 64, requires_grad=True)
    (z @ head.T).sum().backward()
    assert z.grad is not None


@torch.no_grad()
def test_our_text_tower_reads_clips_own_weights():
    """The same random weights in open_clip's CLIP and in ours give the same embeddings."""
    import open_clip

    vision = open_clip.CLIPVisionCfg(layers=1, width=32, head_width=16, patch_size=16, image_size=32)
    text = open_clip.CLIPTextCfg(context_length=77, vocab_size=49408, width=64, heads=4, layers=3)
    theirs = open_clip.CLIP(64, vision, text).eval()
    ours = create_text_tower(**TEXT_CFGS["patchrank_clip_digits"]).eval()
    ours.load_state_dict({k: v for k, v in theirs.state_dict().items() if not k.startswith(("visual", "logit"))})
    tokens = open_clip.tokenize(["a photo of the number three.", "seven"])
    torch.testing.assert_close(ours(tokens), theirs.encode_text(tokens))


@torch.no_grad()
def test_quick_gelu_image_tower_reads_open_clips_weights():
    """Random open_clip weights through our checkpoint filter, at toy depth: the same embeddings."""
    import open_clip
    import timm

    from patchrank.models.checkpoints.filter import checkpoint_filter_fn

    vision = open_clip.CLIPVisionCfg(layers=2, width=64, head_width=16, patch_size=16, image_size=64)
    theirs = open_clip.CLIP(32, vision, open_clip.CLIPTextCfg(layers=1, width=16, heads=1), quick_gelu=True).eval()
    shape = {"img_size": 64, "embed_dim": 64, "depth": 2, "num_heads": 4, "num_classes": 32, "locations": (1, 2)}
    ours = timm.create_model("patchrank_clip_b16", **shape).eval()
    ours.load_state_dict(checkpoint_filter_fn(theirs.state_dict(), ours))
    images = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(ours(images), theirs.encode_image(images), atol=1e-5, rtol=1e-5)


def test_what_cannot_be_had_is_said(tmp_path):
    with pytest.raises(UserError, match="did you mean 'patchrank_clip_digits'"):
        patchrank.create_clip("patchrank_clip_digit")
    with pytest.raises(UserError, match="not in the cache .* give a checkpoint file"):
        patchrank.create_clip("patchrank_clip_b16")
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"\x80\x04pickle")
    with pytest.raises(UserError, match="broken.safetensors: .*a pickle that torch.save did not write"):
        patchrank.create_clip("patchrank_clip_digits", checkpoint=broken)


def state_of(clip):
    tower = clip.visual
    return tower.pruning, tower.pruner, tower.prompts, clip.prompts, timm.models.get_model_args(tower)


def test_what_is_applied_is_gone_after_its_block_also_where_blocks_are_nested(clip):
    clip.visual.set_pruning(keep_rate=0.9, reducer="center")
    outer, inner = Prompts("V", 2, 64, 64), Prompts("TV", 3, 64, 64)
    before = state_of(clip)
    with clip.applied(prompts=outer, keep_rate=0.5):
        within = state_of(clip)
        assert clip.visual.pruning.keep_rate == within[-1]["keep_rate"] == 0.5 and clip.visual.prompts is outer
        with clip.applied(prompts=inner, reducer="random", seed=3):
            assert clip.prompts is inner and clip.visual.num_prompt_tokens == 3
            assert (clip.visual.pruning.keep_rate, clip.visual.pruning.reducer) == (0.5, "random")
            clip.set_prompts(None)
            clip.visual.set_pruning(keep_rate=0.3)
        assert state_of(clip) == within and clip.visual.num_prompt_tokens == 2
    assert state_of(clip) == before and "seed" not in before[-1] and clip.visual.num_prompt_tokens == 0


@pytest.mark.parametrize(
    "wrong", [{"keep_rate": 0.0}, {"reducr": "center"}, {"keep_rate": 0.4, "prompts": Prompts("V", 2, 32, 64)}]
)
def test_settings_that_do_not_fit_and_errors_inside_leave_the_pair_as_it_was(clip, wrong):
    before = state_of(clip)
    with pytest.raises(UserError), clip.applied(**wrong):
        pytest.fail("it was applied")
    assert state_of(clip) == before
    with pytest.raises(KeyError), clip.applied(prompts=Prompts("TV", 2, 64, 64), keep_rate=0.5):
        raise KeyError
    assert state_of(clip) == before


def test_a_tower_keeps_prompts_of_its_own_beside_those_that_are_applied(clip):
    own, other = Prompts("V", 2, 64, 64), Prompts("T", 2, 64, 64)
    with clip.applied():
        clip.visual.set_prompts(own)
        with clip.applied(prompts=other):
            assert clip.visual.prompts is None and clip.prompts is other
        assert clip.visual.prompts is own and clip.prompts is None
