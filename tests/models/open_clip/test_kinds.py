"""What people have in place of open_clip's model: one line that says what to pass instead."""

import numpy as np
import pytest
import timm
import torch
from helpers.tiny_open_clip import create, images_of
from torch import nn

import patchrank
from patchrank.models.open_clip.pair import from_open_clip
from patchrank.utils.errors import UserError


class VisionTransformer(nn.Module):
    """OpenAI's image tower at toy size, with its own names."""

    def __init__(self, input_resolution: int = 32, patch_size: int = 16, width: int = 32, output_dim: int = 16):
        super().__init__()
        self.input_resolution, self.output_dim = input_resolution, output_dim
        self.conv1 = nn.Conv2d(3, width, patch_size, patch_size, bias=False)
        self.class_embedding = nn.Parameter(torch.randn(width))
        self.positional_embedding = nn.Parameter(torch.randn((input_resolution // patch_size) ** 2 + 1, width))
        self.ln_pre, self.ln_post = nn.LayerNorm(width), nn.LayerNorm(width)
        self.transformer = nn.Sequential(nn.MultiheadAttention(width, 2))
        self.proj = nn.Parameter(torch.randn(width, output_dim))


class CLIP(nn.Module):
    """OpenAI's pair: `clip.load` gives one of this class, from a module of this name."""

    def __init__(self):
        super().__init__()
        self.context_length, self.visual = 77, VisionTransformer()
        self.token_embedding, self.transformer = nn.Embedding(100, 32), nn.Sequential(nn.MultiheadAttention(32, 2))


VisionTransformer.__module__ = CLIP.__module__ = "clip.model"  # the package is not installed here


class CLIPModel(nn.Module):
    """The parts of transformers' own, by their names."""

    def __init__(self):
        super().__init__()
        self.text_model, self.vision_model = nn.Linear(2, 2), nn.Linear(2, 2)


class Scripted(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def wrapped(model: nn.Module) -> nn.Module:
    return nn.DataParallel(model)


@pytest.mark.parametrize(
    "make, kind, cure",
    [
        (CLIP, "clip.model.CLIP", "try open_clip.create_model('ViT-B-16-quickgelu', pretrained='openai')"),
        (lambda: torch.jit.script(Scripted()), "torch.jit", "try open_clip.create_model"),
        (lambda: wrapped(create()), "DataParallel", "pass its .module, and wrap the model afterwards"),
        (lambda: wrapped(patchrank.prune_open_clip(create())), "DataParallel", "pass its .module"),
        (lambda: torch.compile(create()), "OptimizedModule", "pass the model as it was before torch.compile"),
        (CLIPModel, "CLIPModel", "or patchrank.create_clip(NAME, checkpoint=FILE)"),
        (lambda: timm.create_model("vit_tiny_patch16_224"), "VisionTransformer", "pass the whole model"),
        (lambda: create().visual, "VisionTransformer", "pass the whole model"),
        (lambda: timm.create_model("patchrank_clip_digits"), "PrunedVisionTransformer", "so use its set_pruning"),
        (lambda: patchrank.create_clip("patchrank_clip_digits"), "Clip", "so use clip.visual.set_pruning"),
        (lambda: (create(), None, None), "tuple", "pass the model itself, as open_clip.create_model makes it"),
        (lambda: create().state_dict(), "OrderedDict", "pass the model itself"),
        (lambda: "ViT-B-16", "str", "pass the model itself"),
        (lambda: None, "NoneType", "pass the model itself"),
    ],
)
def test_what_is_no_model_of_open_clip_is_told_what_to_pass(make, kind, cure):
    thing = make()
    for function in (patchrank.prune_open_clip, from_open_clip):
        with pytest.raises(UserError) as caught:
            function(thing)
        told = str(caught.value)
        assert (
            told.startswith(f"{function.__name__} takes a model of open_clip, but got ") and len(told.splitlines()) == 1
        )
        assert kind in told and cure in told


@pytest.mark.parametrize(
    "make, kind, cure",
    [
        (CLIP, "clip.model.CLIP", "try open_clip.create_model('ViT-B-16-quickgelu', pretrained='openai')"),
        (lambda: wrapped(create()), "DataParallel", "pass its .module, and wrap the model afterwards"),
        (lambda: torch.compile(create()), "OptimizedModule", "pass the model as it was before torch.compile"),
        (lambda: patchrank.create_clip("patchrank_clip_digits"), "Clip", "so use clip.visual.set_pruning"),
        (lambda: (create(), None, None), "tuple", "pass the model itself"),
        (lambda: "ViT-B-16", "str", "pass the model itself"),
    ],
)
def test_what_no_door_takes_is_told_what_to_pass(make, kind, cure):
    thing = make()
    for function in (patchrank.prune, patchrank.unprune):
        with pytest.raises(UserError) as caught:
            function(thing)
        told = str(caught.value)
        assert told.startswith(f"{function.__name__} takes a model of timm, transformers or open_clip, but got ")
        assert len(told.splitlines()) == 1 and kind in told and cure in told


@pytest.mark.parametrize("wrong, instead", [(0.6, "keep_rate=0.6"), (np.float32(0.5), "keep_rate=0.5"), ("f", "pred")])
def test_a_setting_in_the_predictors_place_is_told_what_to_pass(wrong, instead, tower):
    model, before = create(), (tower.pruning, tower.drop_counts)
    visual = model.visual
    for call in (lambda: patchrank.prune_open_clip(model, wrong, locations=(2,)), lambda: tower.set_pruning(wrong)):
        with pytest.raises(
            UserError, match=r"^predictor must be a module .nn.Module. or None, but is .*; try " + instead
        ):
            call()
    assert model.visual is visual and (tower.pruning, tower.drop_counts) == before


@pytest.mark.filterwarnings("ignore")
@torch.no_grad()
def test_a_model_is_quantised_after_it_is_pruned():
    def quantise(model):
        return torch.ao.quantization.quantize_dynamic(model, {nn.Linear})

    quantised = quantise(create())
    with pytest.raises(UserError, match="quantised weights .try to quantise them after prune_open_clip"):
        patchrank.prune_open_clip(quantised, keep_rate=0.5, reducer="center", locations=(2,))
    model = quantise(patchrank.prune_open_clip(create(), keep_rate=0.5, reducer="center", locations=(2,)))
    assert model.encode_image(images_of(model)).isfinite().all()


@torch.no_grad()
def test_a_model_is_pruned_before_it_is_wrapped():
    model = patchrank.prune_open_clip(create(), keep_rate=0.5, reducer="random")
    images = images_of(model)
    assert torch.equal(wrapped(model)(images)[0], model(images)[0])


def test_a_model_is_unpruned_once():
    model = patchrank.prune_open_clip(create())
    patchrank.unprune(model)
    with pytest.raises(UserError, match="unprune needs a model from prune_open_clip, but this CLIP is not"):
        patchrank.unprune(model)
