"""The text tower on no more tokens than there are, and sets of prompts."""

import pytest
import torch

from patchrank.models.captions import template_set
from patchrank.models.text import create_text_tower, encode_tokens, text_shape, tokenize
from patchrank.utils.errors import UserError

TEXTS = ["a dog", "a photo of a Mexican hairless dog (xoloitzcuintli), a type of pet.", "x " * 100]


@pytest.fixture
def text():
    torch.manual_seed(0)
    return create_text_tower(width=32, heads=2, layers=3, output_dim=16, quick_gelu=True).eval()


@torch.no_grad()
@pytest.mark.parametrize("texts", [TEXTS, TEXTS[:2], TEXTS[:1]])
def test_leaving_out_what_follows_the_end_changes_nothing(text, texts):
    tokens = tokenize(texts)
    torch.testing.assert_close(encode_tokens(text, tokens), text(tokens), atol=1e-6, rtol=0)


@torch.no_grad()
def test_positions_after_the_last_end_are_not_run(text):
    seen = []
    text.transformer.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[1]))
    encode_tokens(text, tokenize(TEXTS[:1]))
    assert seen == [4]  # start, a, dog, end


@torch.no_grad()
def test_a_tower_that_looks_both_ways_is_run_whole(text):
    text.pool_type = "last"
    tokens = tokenize(TEXTS[:2])
    assert torch.equal(encode_tokens(text, tokens), text(tokens))


@torch.no_grad()
def test_a_hook_on_the_whole_tower_fires_and_what_it_gives_counts(text):
    tokens = tokenize(TEXTS[:2])
    expected = encode_tokens(text, tokens)
    text.register_forward_hook(lambda module, args, output: 2 * output)
    torch.testing.assert_close(encode_tokens(text, tokens), 2 * expected, atol=1e-5, rtol=0)
    assert encode_tokens(text, tokens, torch.zeros(1, 32)).shape == (2, 16)


def test_clips_own_tokens():
    assert tokenize(["a photo of a cat."])[0, :9].tolist() == [49406, 320, 1125, 539, 320, 2368, 269, 49407, 0]
    assert tokenize(["707-320"])[0].argmax() == 8  # seven tokens between start and end


def test_template_sets_are_openais():
    assert template_set("plain") == ("a photo of a {}.",)
    assert len(template_set("openai7")) == 7 and len(set(template_set("openai80"))) == 80
    assert set(template_set("openai7")) < set(template_set("openai80"))
    assert template_set("openai80")[0] == "a bad photo of a {}." and template_set("openai7")[0] == "itap of a {}."
    with pytest.raises(UserError, match="did you mean 'openai80'"):
        template_set("openai81")


def test_shape_of_a_tower(text):
    assert text_shape(text) == (32, 3, 16, 77, 4.0)
