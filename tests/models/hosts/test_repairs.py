"""Repairs of models that were pruned in place: where their own call uses one, and what it leaves alone."""

import copy

import pytest
import torch
from helpers import toy_hosts

import patchrank
from patchrank.layers.repair import Repair, own_projection
from patchrank.models.repair_files import describe_repair, save_repair
from patchrank.utils.errors import UserError

DROPPING = dict(locations=(3,), keep_rate=0.5, reducer="center")
MERGING = dict(locations=(2, 3), keep_rate=0.5, reducer="tome")
PAIRS = {"CLIPModel": "CLIP", "SiglipModel": "Siglip"}
KINDS = [*toy_hosts.HOSTS, *PAIRS, "ViTForImageClassification"]
DIM = toy_hosts.DIM


def create(name):
    if name.startswith("timm"):
        return toy_hosts.create(name)
    transformers = pytest.importorskip("transformers")
    if name in toy_hosts.OF_TRANSFORMERS:
        return toy_hosts.create(name)
    torch.manual_seed(0)
    if name == "ViTForImageClassification":
        config = transformers.ViTConfig(**toy_hosts.HF, intermediate_size=64, num_labels=5)
        return transformers.ViTForImageClassification(config).eval()
    text = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=99)
    config = getattr(transformers, f"{PAIRS[name]}Config")
    vision = toy_hosts.HF | dict(intermediate_size=64)
    return getattr(transformers, name)(config(text_config=text, vision_config=vision)).eval()


def write_for(tower, path, name="toy"):
    """A repair of random weights for the tower and the pruning in force."""
    generator = torch.Generator().manual_seed(5)
    weight, bias = (part.float() for part in own_projection(tower.head, tower.embed_dim))
    shift = 0.1 * torch.randn(weight.shape, generator=generator)
    about = describe_repair(tower, name) | {"images": 60, "ridge": 0.1, "data": []}
    save_repair(Repair(weight + shift, bias + 1, about), path)
    return str(path)


def own_call(model, x):
    """What a model's own call gives of its embedding: with its pooler or classifier, where it has one."""
    if type(model).__name__ in PAIRS:
        return toy_hosts.pooled(model.get_image_features(x))
    if type(model).__name__ in ("ViTModel", "ViTForImageClassification"):
        return model(x)[1 if type(model).__name__ == "ViTModel" else "logits"]
    return toy_hosts.embedding(model, x)


def behind(model, embedding):
    """The same of a tower's embedding."""
    if type(model).__name__ == "ViTModel":
        return model.pooler.activation(model.pooler.dense(embedding))
    return model.classifier.forward(embedding) if hasattr(model, "classifier") else embedding


@pytest.fixture
def x():
    return toy_hosts.images()


@pytest.fixture(params=KINDS)
def model(request):
    return create(request.param)


@torch.no_grad()
def test_a_model_and_the_tower_inside_give_the_same_repaired_embedding(model, x, tmp_path):
    whole, modules, keys = own_call(model, x), dict(model.named_modules()), list(model.state_dict())
    tower = patchrank.find_tower(patchrank.prune(model, **MERGING))
    pruned, kept = own_call(model, x), tower.forward_pruned(x)
    path = write_for(tower, tmp_path / "repair.safetensors")
    entering = tower.forward_head(tower.forward_features(x), pre_logits=True)
    patchrank.prune(model, repair_path=path)
    found, repaired = own_call(model, x), tower.forward_pruned(x).embedding
    expected = entering @ tower.repair.weight.T + tower.repair.bias
    assert (found - pruned).abs().max() > 1e-3
    for same, other in ((repaired, expected), (tower(x), expected), (found, behind(model, expected))):
        torch.testing.assert_close(same, other, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(behind(model, tower.forward_whole(x)), whole, atol=1e-5, rtol=1e-5)
    assert list(model.state_dict()) == keys and dict(model.named_modules()).keys() >= modules.keys()
    patchrank.prune(model, keep_rate=1.0)
    assert torch.equal(own_call(model, x), whole)
    patchrank.prune(model, repair_path=None, **MERGING)
    assert torch.equal(own_call(model, x), pruned) and torch.equal(tower.forward_pruned(x).embedding, kept.embedding)
    patchrank.prune(model, repair_path=path)
    assert torch.equal(own_call(patchrank.unprune(model), x), whole)
    assert dict(model.named_modules()) == modules


@pytest.mark.parametrize("name", ["timm vit", "SiglipVisionModel"])
@torch.no_grad()
def test_features_of_all_tokens_stay_as_they_are(name, x, tmp_path):
    def features():
        return model.forward_features(x) if name == "timm vit" else model(x).last_hidden_state

    model = patchrank.prune(create(name), **DROPPING)
    before = features()
    patchrank.prune(model, repair_path=write_for(patchrank.find_tower(model), tmp_path / "r.safetensors"))
    assert torch.equal(features(), before)
    if name != "timm vit":  # a tuple stays one
        (last, pooled), named = model(x, return_dict=False), model(x)
        assert torch.equal(last, before) and torch.equal(pooled, named.pooler_output)


@pytest.mark.parametrize("name", ["timm vit", "CLIPVisionModelWithProjection"])
@torch.no_grad()
def test_scores_from_outside_use_the_own_head(name, x, tmp_path):
    model = patchrank.prune(create(name), **DROPPING)
    tower, scores = patchrank.find_tower(model), torch.rand(len(x), toy_hosts.NUM_PATCHES)
    before = tower.forward_pruned(x, scores).embedding
    patchrank.prune(model, repair_path=write_for(tower, tmp_path / "r.safetensors"))
    assert torch.equal(tower.forward_pruned(x, scores).embedding, before)


@pytest.mark.parametrize("name", ["timm vit", "CLIPModel", "ViTForImageClassification"])
@torch.no_grad()
def test_another_head_is_found_out(name, x, tmp_path):
    model = patchrank.prune(create(name), **DROPPING)
    path = write_for(patchrank.find_tower(model), tmp_path / "r.safetensors")
    place = {"timm vit": "head", "CLIPModel": "visual_projection"}.get(name, "classifier")
    own, other = getattr(model, place), torch.nn.Linear(DIM, getattr(model, place).out_features)
    setattr(model, place, other)
    without = own_call(model, x)  # nothing hangs there as long as there is no repair
    setattr(model, place, own)
    patchrank.prune(model, repair_path=path)
    setattr(model, place, other)
    with pytest.raises(UserError, match=f"the model's {place} was changed; try patchrank.unprune"):
        own_call(model, x)
    patchrank.prune(model, repair_path=None)
    assert torch.equal(own_call(model, x), without)


@torch.no_grad()
def test_it_belongs_to_one_tower_head_schedule_and_predictor(x, tmp_path):
    model = patchrank.prune(create("timm vit"), **DROPPING)
    path, before = write_for(patchrank.find_tower(model), tmp_path / "r.safetensors"), model(x)
    for settings, told in (
        (dict(keep_rate=0.25), "solved for drops 8 before layer 3, but the pruning has drops 12 before layer 3"),
        (dict(reducer="random"), "solved for reducer 'center'"),
        (dict(reducer="predictor", predictor_init="random"), "solved for reducer 'center'"),
    ):
        with pytest.raises(UserError, match=told):
            patchrank.prune(model, repair_path=path, **settings)
        assert torch.equal(model(x), before)
    for part, told in (("blocks.0.mlp.fc1", "with weights"), ("head", "with head")):
        other = create("timm vit")
        other.get_submodule(part).weight.add_(0.01)
        modules = dict(other.named_modules())
        with pytest.raises(UserError, match=f"solved for toy {told} .*, but this tower's"):
            patchrank.prune(other, repair_path=path, **DROPPING)
        assert dict(other.named_modules()) == modules


@torch.no_grad()
def test_copies_and_precisions_take_it_along(x, tmp_path):
    model = patchrank.prune(create("CLIPModel"), **DROPPING)
    patchrank.prune(model, repair_path=write_for(patchrank.find_tower(model), tmp_path / "r.safetensors"))
    found, twin = own_call(model, x), copy.deepcopy(model)
    patchrank.prune(model, repair_path=None)
    assert torch.equal(own_call(twin, x), found) and not torch.allclose(own_call(model, x), found, atol=1e-3)
    low = own_call(twin.bfloat16(), x.bfloat16())
    assert low.dtype is torch.bfloat16 and torch.nn.functional.cosine_similarity(low.float(), found).min() > 0.99


@torch.no_grad()
def test_a_model_without_a_pooler_has_no_place_for_it(x, tmp_path):
    model = patchrank.prune(create("ViTForImageClassification").vit, **DROPPING)
    path, before = write_for(patchrank.find_tower(model), tmp_path / "r.safetensors"), model(x).last_hidden_state
    with pytest.raises(UserError, match="repair_path: this ViTModel has no pooler"):
        patchrank.prune(model, repair_path=path)
    assert torch.equal(model(x).last_hidden_state, before)


def headless(name, path):
    """A repair that is solved for the same tower without its head."""
    model = create(name)
    model = model.vision_model if name == "CLIPModel" else model
    if name.startswith("timm"):
        model.reset_classifier(0)
    tower = patchrank.find_tower(patchrank.prune(model, **DROPPING))
    return write_for(tower, path)


@pytest.mark.parametrize("name", ["timm vit", "timm average", "CLIPModel"])
@torch.no_grad()
def test_what_was_solved_without_a_head_stands_before_it(name, x, tmp_path):
    path = headless(name, tmp_path / "r.safetensors")
    model = patchrank.prune(create(name), **DROPPING)
    tower = patchrank.find_tower(model)
    macs, plain = tower.macs().image, tower.forward_head(tower.forward_features(x), pre_logits=True)
    patchrank.prune(model, repair_path=path)
    expected = tower.head.forward(plain @ tower.repair.weight.T + tower.repair.bias)
    for found in (own_call(model, x), tower(x), tower.forward_pruned(x).embedding):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert tower.repair_leads and tower.macs().image == macs + DIM * DIM


@pytest.mark.slow
@torch.no_grad()
def test_one_graph_of_a_repaired_model(model, x, tmp_path):
    patchrank.prune(model, **MERGING)
    patchrank.prune(model, repair_path=write_for(patchrank.find_tower(model), tmp_path / "r.safetensors"))
    expected = own_call(model, x)
    torch.compiler.reset()
    found = torch.compile(lambda x: own_call(model, x), fullgraph=True)(x)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
