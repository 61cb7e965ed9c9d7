"""Text towers of transformers' pairs, beside the models themselves."""

import pytest
import torch
import torch.nn.functional as F
from helpers import toy_hosts, toy_hub

from patchrank.layers.macs import text_macs
from patchrank.layers.prompts import create_prompt
from patchrank.models.clip import create_clip, macs_row
from patchrank.models.text import text_shape
from patchrank.utils.errors import UserError

WORDS = ["a photo of a cat", "the dog on a sofa, seen from above . . . . . ."]  # the second is cut


@pytest.mark.parametrize("name", toy_hub.PAIRS)
@torch.no_grad()
def test_texts_and_answers_are_the_models_own(name, tmp_path):
    pytest.importorskip("transformers")
    model, x = toy_hub.create_pair(name), toy_hosts.images()
    clip = create_clip(toy_hub.write(model, tmp_path / "toy"))
    how = dict(padding="max_length", truncation=True, max_length=12, return_tensors="pt")
    inputs = toy_hub.tokenizer()(WORDS, **how)
    assert torch.equal(clip.tokenize(WORDS), inputs.input_ids) and clip.context_length == 12
    expected = F.normalize(toy_hosts.pooled(model.get_text_features(**inputs)), dim=-1)
    torch.testing.assert_close(clip.encode_text(WORDS), expected, atol=1e-6, rtol=0)
    own = model(pixel_values=x, **inputs).logits_per_image - getattr(model, "logit_bias", 0)
    ours = clip.encode_image(x) @ clip.encode_text(WORDS).T * clip.logit_scale.exp()
    torch.testing.assert_close(ours, own, atol=1e-4, rtol=0)
    head = clip.zero_shot_head(["cat", "dog"], ["a photo of a {}."])
    expected = clip.encode_text(["a photo of a cat.", "a photo of a dog."])
    torch.testing.assert_close(head, expected, atol=1e-6, rtol=0)
    assert text_shape(clip.text) == (24, 2, 20 if name == "CLIPModel" else 32, 12, 2.0)
    assert macs_row(clip)["gmacs_text"] == text_macs(*text_shape(clip.text)) / 1e9
    with pytest.raises(UserError, match="learned text tokens need a causal text tower"):
        clip.prompted_head(["cat"], create_prompt("coupled", "TV", 2, 24, clip.visual.embed_dim))
