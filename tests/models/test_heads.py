"""Zero-shot heads: what classes and templates may be, and the line on what they may not be."""

import warnings

import numpy as np
import pytest
import torch
from PIL import Image

import patchrank
from patchrank.layers.prompts import Prompts
from patchrank.utils.errors import UserError

PLAIN = ("a photo of a {}.",)


@pytest.mark.parametrize("classes", [["cat", "dog"], np.array(["cat", "dog"]), (name for name in ("cat", "dog"))])
def test_names_in_any_kind_of_list_give_one_head(clip, classes):
    assert torch.equal(clip.zero_shot_head(classes, PLAIN), clip.zero_shot_head(("cat", "dog"), PLAIN))


def test_two_classes_may_have_one_name(clip):
    head = clip.zero_shot_head(["crane", "crane"], PLAIN)
    assert len(head) == 2 and torch.equal(head[0], head[1])


@pytest.mark.parametrize(
    "classes, rule",
    [
        ("cat", "classes must be a list, as in ['cat', 'dog'], but is 'cat' (str)"),
        (b"cat", "classes must be a list"),
        (None, "classes must be a list, as in ['cat', 'dog'], but is 'None' (NoneType)"),
        (np.array("cat"), "classes must be a list"),
        ({"cat": 0}, "classes must be a list"),
        ({"cat", "dog"}, "classes must be a list"),  # which has no order, as labels have
        ([], "classes must hold one or more, as in ['cat', 'dog'], but there are none"),
        (["cat", 3], "classes: the one at place 1 is 3, and must be a name"),
        (["cat", ""], "classes: the one at place 1 is '', and must be a name"),
        ([["cat"]], "classes: the one at place 0 is ['cat'], and must be a name"),
    ],
)
def test_what_is_no_list_of_names_is_refused(clip, classes, rule):
    prompts = Prompts("T", 2, 64, 64)
    for head in (lambda: clip.zero_shot_head(classes, PLAIN), lambda: clip.prompted_head(classes, prompts)):
        with pytest.raises(UserError) as caught:
            head()
        assert str(caught.value).startswith(rule) and len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    "templates, rule",
    [
        ("a {}.", "templates must be a list, as in ['a photo of a {}.'], but is 'a {}.' (str)"),
        (str.upper, "templates must be a list"),
        ((), "templates must hold one or more, as in ['a photo of a {}.'], but there are none"),
        (["a photo"], "templates: the one at place 0 is 'a photo', but must have one place for the class name"),
        (["a {}.", "{} and {}"], "templates: the one at place 1 is '{} and {}', but must have one place"),
        (["a {c}."], "templates: the one at place 0 is 'a {c}.', but must have one place"),
        (["a {0}."], "templates: the one at place 0 is 'a {0}.', but must have one place"),
        (["a {}}."], "templates: the one at place 0 is 'a {}}.', but must have one place"),
        ([str], "templates: the one at place 0 is <class 'str'>, but must have one place"),
        ([3], "templates: the one at place 0 is 3, but must have one place"),
        ([len], "templates: <built-in function len> gives 3 for 'cat', and must give a sentence"),
    ],
)
def test_what_is_no_list_of_templates_is_refused(clip, templates, rule):
    with pytest.raises(UserError) as caught:
        clip.zero_shot_head(["cat"], templates)
    assert str(caught.value).startswith(rule)


def test_functions_are_templates_as_open_clips_are(clip):
    names = ["zero_one", "two"]
    head = clip.zero_shot_head(names, [lambda c: f"a photo of a {c}.", "the {}"])
    assert torch.equal(head, clip.zero_shot_head(names, ["a photo of a {}.", "the {}"]))


def test_heads_of_functions_are_kept_by_what_the_functions_say(clip, tmp_path, monkeypatch):
    """Each lambda is another object, and one object may come to say something else."""
    word = "cat"
    template = lambda c: f"a {word} and a {c}"  # noqa: E731
    first = clip.zero_shot_head(["dog"], [template])
    assert clip.zero_shot_head(["dog"], [lambda c: f"a cat and a {c}"]) is first
    word = "cow"
    assert not torch.equal(clip.zero_shot_head(["dog"], [template]), first)
    monkeypatch.setattr(clip, "heads", str(tmp_path))  # where large ones are kept between processes
    names = [f"class {n}" for n in range(300)]
    large = clip.zero_shot_head(names, [template])
    word = "cat"
    assert not torch.equal(clip.zero_shot_head(names, [template]), large)
    assert len(list(tmp_path.iterdir())) == 2


def test_names_that_the_text_tower_cuts_are_told(clip):
    with pytest.warns(UserWarning, match="1 of 2 captions are longer than the 77 tokens .* such as 'a photo of a x x"):
        clip.zero_shot_head(["x " * 80, "cat"], PLAIN)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        clip.zero_shot_head(["x " * 69 + "x"], PLAIN)  # 77 tokens, with start and end
        clip.zero_shot_head(["unbelievably" * 20, "cat"][1:], PLAIN)


@pytest.mark.parametrize(
    "texts, rule",
    [
        ([], "texts must hold one or more, as in ['a cat', 'a dog'], but there are none"),
        (None, "texts must be a list"),
        ({"a": 1}, "texts must be a list"),
        (["a", 3], "texts: the one at place 1 is '3', and must be text"),
        ([["a"]], "texts: the one at place 0 is"),
    ],
)
def test_what_is_no_text_is_refused(clip, texts, rule):
    for takes in (clip.encode_text, clip.tokenize):
        with pytest.raises(UserError) as caught:
            takes(texts)
        assert str(caught.value).startswith(rule)


def test_one_text_is_one_text(clip):
    assert torch.equal(clip.encode_text("a cat"), clip.encode_text(["a cat"]))
    assert clip.tokenize("a cat").shape == (1, 77)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1", "I;16"])
def test_the_transform_takes_pictures_of_any_mode(clip, mode):
    assert clip.transform()(Image.new(mode, (70, 90))).shape == (3, 64, 64)


def test_the_transform_refuses_what_is_no_picture(clip):
    for thing in (np.zeros((64, 64, 3), np.uint8), "photo.jpg", None):
        with pytest.raises(UserError, match=f"takes a PIL image, but got a {type(thing).__name__}; try PIL.Image"):
            clip.transform()(thing)


@pytest.mark.parametrize(
    "arguments, rule",
    [
        (("ViT-B-16", "openai"), "pretrained is 'openai', .* try create_clip\\('patchrank_clip_b16.openai'\\)"),
        (("patchrank_clip_b16", "laion2b"), "try create_clip\\('patchrank_clip_b16.laion2b'\\)"),
        (("patchrank_clip_digits", None), "pretrained is None, but must be True or False"),
        (("ViT-L/14",), "open_clip's name for patchrank_clip_l14; try one of 'patchrank_clip_l14.openai', "),
        (("tf:vit_base_patch16_clip_224",), "model 'tf:vit_base_patch16_clip_224' does not exist"),
        ((3,), "model must be a name, such as 'patchrank_clip_b16', but is 3"),
    ],
)
def test_a_pair_asked_for_in_open_clips_way_is_told_in_ours(arguments, rule):
    with pytest.raises(UserError, match=rule):
        patchrank.create_clip(*arguments)


def test_prompts_must_be_prompts(clip):
    for tower, reader in ((clip, "load_prompts"), (clip.visual, "load_visual")):
        for thing in ("prompts.safetensors", {}, torch.nn.Linear(2, 2)):
            with pytest.raises(UserError, match=f"set_prompts takes .* but got a {type(thing).__name__}; try {reader}"):
                tower.set_prompts(thing)
    assert clip.prompts is None and clip.visual.prompts is None


def test_a_cache_that_cannot_be_written_costs_time_alone(clip, monkeypatch, recwarn):
    """As for a user without a home, whom containers have."""
    names = [f"thing {n}" for n in range(300)]
    for heads in ("/proc/none", "/dev/null"):
        monkeypatch.setattr(clip, "heads", heads)
        assert clip.zero_shot_head([f"{heads} {name}" for name in names], PLAIN).shape == (300, 64)
        assert "class embeddings are not kept (cannot write" in str(recwarn.pop(UserWarning).message)
