"""Learned text tokens, the head that they make, and the pair that carries them."""

import pytest
import torch
import torch.nn.functional as F
from helpers.learned_tokens import TEXT_WIDTH, WIDTH, B, create
from torch import nn

from patchrank.data.dataset_factory import load_split
from patchrank.layers.prompts import Prompts
from patchrank.models.clip import Clip
from patchrank.models.embed import embed_unpruned, evaluate
from patchrank.models.text import create_text_tower, encode_tokens, tokenize
from patchrank.utils.errors import UserError

CLASSES, TEMPLATES = ("zero", "big_cat", "xoloitzcuintli"), ("a photo of a {}.", "the {}")


@pytest.fixture
def pair(tower):
    """Random towers of different widths."""
    torch.manual_seed(2)
    text = create_text_tower(width=TEXT_WIDTH, heads=2, layers=2, output_dim=WIDTH)
    return Clip("random", tower, text).eval()


def test_the_start_is_seeded_and_leaves_global_generators_alone():
    state = torch.get_rng_state()
    first, second, other = create(seed=1, bias=True), create(seed=1, bias=True), create(seed=2, bias=True)
    assert torch.equal(torch.get_rng_state(), state)
    assert first.sha256() == second.sha256() != other.sha256()
    assert [tuple(p.shape) for p in first.parameters()] == [(B, TEXT_WIDTH), (WIDTH, TEXT_WIDTH), (WIDTH,)]
    wide = Prompts("TV", 64, 256, 256)
    assert wide.to_visual.bias is None and wide.num_tokens == 64
    assert wide.text.std().item() == pytest.approx(0.02, rel=0.05) and abs(wide.text.mean()) < 1e-3
    bound = nn.Linear(256, 256).weight.abs().max().item()  # PyTorch's default: uniform within 1 / sqrt(256)
    assert wide.to_visual.weight.abs().max().item() == pytest.approx(bound, rel=1e-3)
    torch.testing.assert_close(wide.visual(), wide.text @ wide.to_visual.weight.T)


def test_it_may_start_from_words(pair):
    words = pair.embed_words("a photo of a")
    assert torch.equal(words, pair.text.token_embedding(torch.tensor([320, 1125, 539, 320])))
    assert torch.equal(create(words=words).text, words)
    specific = create("T", words=words, classes=CLASSES)
    assert specific.text.shape == (3, B, TEXT_WIDTH) and torch.equal(specific.text[1], words)
    with pytest.raises(UserError, match=r"must be \(4, 32\).*are \(2, 32\)"):
        create(words=words[:2])


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"mode": "TVV"}, "did you mean 'TV'"),
        ({"num_tokens": 0}, "at least 1, but is 0"),
        ({"classes": CLASSES}, "need mode 'T'.* mode is 'TV'"),
        ({"mode": "V", "classes": CLASSES}, "need mode 'T'"),
        ({"mode": "T", "classes": ()}, "there are none"),
        ({"image_dim": None}, "need image_dim"),
    ],
)
def test_impossible_prompts_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        create(**changes)


def by_hand(text, ids, prompts):
    """All 77 positions through open_clip's own parts."""
    x = text.token_embedding(ids)
    x = torch.cat([x[:, :1], prompts.expand(len(x), -1, -1), x[:, 1 + prompts.shape[-2] :]], dim=1)
    x = text.ln_final(text.transformer(x + text.positional_embedding, attn_mask=text.attn_mask))
    return x[torch.arange(len(x)), (ids == 49407).int().argmax(1)] @ text.text_projection


@torch.no_grad()
@pytest.mark.parametrize("classes", [None, CLASSES])
def test_the_head_is_that_of_an_unsliced_tower(pair, classes):
    prompts = create("T", classes=classes)
    prompts.text.mul_(20)
    ids = tokenize(["X X X X zero.", "X X X X big cat.", "X X X X xoloitzcuintli."])
    expected = F.normalize(by_hand(pair.text, ids, prompts.text), dim=-1)
    head = pair.prompted_head(CLASSES, prompts)
    torch.testing.assert_close(head, expected, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(pair.prompted_head(CLASSES, prompts), head, atol=0, rtol=0)  # ids are remembered
    plain = F.normalize(pair.text(ids), dim=-1)
    assert (head - plain).abs().max() > 1e-3  # learned tokens, not the placeholders, are read


@torch.no_grad()
def test_heads_of_many_classes_are_made_in_parts(pair, monkeypatch):
    prompts = create("T", classes=CLASSES)
    whole = pair.prompted_head(CLASSES, prompts)
    monkeypatch.setattr("patchrank.models.text.BATCH_SIZE", 2)
    torch.testing.assert_close(pair.prompted_head(CLASSES, prompts), whole, atol=1e-6, rtol=1e-5)


def test_a_name_that_leaves_no_room_is_named(pair):
    name = "cat " * 60
    room = 77 - 60 - 3  # start, full stop and end
    assert pair.prompted_head([name], create("T", num_tokens=room)).shape == (1, WIDTH)
    for b in (room + 1, 100):
        with pytest.raises(UserError, match=rf"class 'cat cat.*' does not fit behind {b} learned tokens.*try {room}"):
            pair.prompted_head(["dog", name], create("T", num_tokens=b))


def test_a_tower_that_is_not_causal_takes_no_learned_tokens(pair):
    pair.text.pool_type = "last"
    with pytest.raises(UserError, match="need a causal text tower"):
        encode_tokens(pair.text, tokenize(["X X X X zero."]), create("T").text)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("mode", ["T", "V", "TV"])
def test_gradients_reach_the_prompts_and_nothing_else(pair, images, mode, checkpointing):
    pair.requires_grad_(False)
    pair.visual.set_grad_checkpointing(checkpointing)
    pair.visual.set_pruning(keep_rate=0.5, predictor_init="random")
    prompts, before = create(mode), pair.sha256()
    pair.set_prompts(prompts)
    written = pair.zero_shot_head(CLASSES, TEMPLATES)
    head = pair.prompted_head(CLASSES, prompts) if prompts.inserts_text else written
    (pair.encode_image(images) @ head.T).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in prompts.parameters())
    assert len(list(prompts.parameters())) == (1 if mode == "T" else 2)
    assert all(p.grad is None for p in pair.parameters())
    assert pair.sha256() == before


@torch.no_grad()
def test_each_mode_puts_learned_tokens_where_it_says(pair, images):
    plain, written = pair.encode_image(images), pair.zero_shot_head(CLASSES, TEMPLATES)
    for mode, visual, textual in [("T", False, True), ("V", True, False), ("TV", True, True)]:
        prompts = create(mode)
        pair.set_prompts(prompts)
        assert pair.prompts is prompts
        assert (not torch.equal(pair.encode_image(images), plain)) == visual
        head = pair.zero_shot_head(CLASSES, TEMPLATES)
        assert torch.equal(head, pair.prompted_head(CLASSES, prompts) if textual else written)
    with pytest.raises(UserError, match="of mode V, beside which text is hand-written"):
        pair.prompted_head(CLASSES, create("V"))
    pair.set_prompts(None)
    assert pair.prompts is None and torch.equal(pair.encode_image(images), plain)
    assert torch.equal(pair.zero_shot_head(CLASSES, TEMPLATES), written)


@torch.no_grad()
def test_cached_heads_depend_on_what_is_learned(pair, tmp_path, monkeypatch):
    monkeypatch.setattr("patchrank.models.zero_shot.KEEP_FROM", 1)
    pair.heads, prompts = str(tmp_path), create("T")
    written = pair.zero_shot_head(CLASSES, TEMPLATES)
    pair.set_prompts(prompts)
    first = pair.zero_shot_head(CLASSES, TEMPLATES)
    assert pair.zero_shot_head(CLASSES, TEMPLATES) is first
    prompts.text.add_(1.0)  # a training step
    second = pair.zero_shot_head(CLASSES, TEMPLATES)
    assert not torch.equal(first, second) and not torch.equal(first, written)
    assert len(list(tmp_path.iterdir())) == 3
    pair._heads.clear()
    assert torch.equal(pair.zero_shot_head(CLASSES, TEMPLATES), second)  # from its file


def test_a_head_made_in_inference_mode_leaves_training_possible(pair):
    pair.set_prompts(prompts := create("T"))
    with torch.inference_mode():
        pair.zero_shot_head(CLASSES, TEMPLATES)
        pair.prompted_head(CLASSES[:2], prompts)
    pair.prompted_head(CLASSES[:2], prompts).sum().backward()
    assert prompts.text.grad is not None


def test_class_specific_prompts_refuse_other_classes(pair):
    pair.set_prompts(create("T", classes=CLASSES))
    pair.zero_shot_head(CLASSES, TEMPLATES)
    with pytest.raises(UserError, match="class 0 is 'zero', not 'one'"):
        pair.zero_shot_head(("one", *CLASSES[1:]), TEMPLATES)
    with pytest.raises(UserError, match="classes of its own: 3, not 2"):
        pair.zero_shot_head(CLASSES[:2], TEMPLATES)


def test_prompts_of_another_width_are_refused(pair, images):
    expected = pair.encode_image(images)
    with pytest.raises(UserError, match="of text width 16, but the text tower of random has 32"):
        pair.set_prompts(Prompts("T", B, 16))
    with pytest.raises(UserError, match=r"shape \(b, 64\).*have \(4, 32\)"):
        pair.set_prompts(Prompts("TV", B, TEXT_WIDTH, 32))
    assert pair.prompts is None and torch.equal(pair.encode_image(images), expected)


def test_evaluation_of_a_prompted_pair(clip):
    split = load_split("digits", "val", 12).loaded(clip.transform(), 1 << 30)
    prompts = Prompts("TV", B, 64, 64)
    try:
        clip.set_prompts(prompts)
        clip.visual.set_pruning(keep_rate=0.5)
        found = evaluate(clip, split, controls=["random"], quiet=True)
        whole = F.normalize(embed_unpruned(clip, split), dim=-1)
        pruned = F.normalize(clip.visual(split.tensors), dim=-1)
        answers = (pruned @ clip.prompted_head(split.classes, prompts).T).argmax(-1)
    finally:
        clip.set_prompts(None)
    assert found.answers["pruned"].tolist() == answers.tolist()
    clip.visual.set_pruning(keep_rate=1.0)  # "unpruned" is the pair as it came, without prompts of either tower
    as_it_came = F.normalize(clip.visual(split.tensors), dim=-1)
    torch.testing.assert_close(whole, as_it_came, atol=1e-6, rtol=1e-5)
    plain = (as_it_came @ clip.zero_shot_head(split.classes, split.templates).T).argmax(-1)
    assert found.answers["unpruned"].tolist() == plain.tolist()
    assert found.kept.shape == (12, 32) and found.kept.max() < 64
    assert 0.5 < found.row()["cosine"] < 1
