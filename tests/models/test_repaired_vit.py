"""A tower with a repair in the place of its head: where it is used, what it belongs to, and what it leaves alone."""

import copy

import pytest
import torch
from helpers import tiny_open_clip
from helpers.learned_tokens import create as create_prompts
from helpers.tiny_clip import create_pair, create_tower

import patchrank
from patchrank.io.tensor_file import write_tensors
from patchrank.layers.predictors import create_predictor
from patchrank.layers.repair import Repair
from patchrank.models.repair_files import describe_repair, load_repair, save_repair
from patchrank.utils.errors import UserError

IMAGES = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
DATA = {"images": 60, "ridge": 0.1, "data": []}


def write_for(tower, path, name="tiny"):
    """A repair of random weights for the pruning in force."""
    generator = torch.Generator().manual_seed(5)
    shift = 0.1 * torch.randn(tower.head.weight.shape, generator=generator)
    repair = Repair(tower.head.weight.detach().float() + shift, torch.ones(len(shift)))
    repair.about = describe_repair(tower, name) | DATA
    save_repair(repair, path)
    return repair


@pytest.fixture
def tower():
    return create_tower(keep_rate=0.5, reducer="center")


@pytest.fixture
def path(tower, tmp_path):
    write_for(tower, tmp_path / "repair.safetensors")
    return str(tmp_path / "repair.safetensors")


def test_every_way_to_a_pruned_embedding_uses_it_and_no_other_does(tower, path):
    before, whole = tower(IMAGES), tower.forward_whole(IMAGES)
    macs, state, names = tower.macs(), tower.state_dict(), tower.blocks_sha256()
    entering = tower.forward_head(tower.forward_features(IMAGES), pre_logits=True)
    scores = tower.forward_pruned(IMAGES).scores
    tower.set_pruning(repair_path=path)
    repair = load_repair(path)
    expected = entering @ repair.weight.T + repair.bias
    assert (expected - before).abs().max() > 0.1
    assert torch.allclose(tower(IMAGES), expected, atol=1e-5)
    assert torch.allclose(tower.forward_pruned(IMAGES).embedding, expected, atol=1e-5)
    assert torch.allclose(tower.forward_head(tower.forward_features(IMAGES)), expected, atol=1e-5)
    assert torch.equal(tower.forward_whole(IMAGES), whole)  # the tower as it came
    assert torch.equal(tower.forward_pruned(IMAGES, scores).embedding, before)  # scores from outside
    assert tower.macs() == macs and tower.blocks_sha256() == names
    assert tower.state_dict().keys() == state.keys() and not any(p is repair.weight for p in tower.parameters())
    tower.set_pruning(repair_path=None)
    assert torch.equal(tower(IMAGES), before)


def test_it_has_no_gradient_and_the_blocks_keep_theirs(tower, path):
    tower.set_pruning(repair_path=path)
    tower(IMAGES).sum().backward()
    assert tower.head.weight.grad is None and tower.blocks[0].mlp.fc1.weight.grad is not None


def test_where_nothing_leaves_it_is_not_used_but_must_be_there(tower, path):
    plain = create_tower()
    tower.set_pruning(repair_path=path)
    tower.set_pruning(keep_rate=1.0)
    assert tower.repair is None and torch.equal(tower(IMAGES), plain(IMAGES))
    tower.set_pruning(keep_rate=0.5)  # what it was solved for
    assert tower.repair is not None
    with pytest.raises(UserError, match="repair file none.safetensors"):
        plain.set_pruning(repair_path="none.safetensors")
    built = create_tower(keep_rate=0.5, reducer="center", repair_path=path)
    assert torch.equal(built(IMAGES), tower(IMAGES))


@pytest.mark.parametrize(
    "changes, told",
    [
        ({"keep_rate": 0.25}, "solved for drops 8 before layer 2, but the pruning has drops 12 before layer 2; try"),
        ({"locations": (1,)}, "solved for drops 8 before layer 2, but the pruning has drops 8 before layer 1; try"),
        ({"reducer": "random"}, "solved for reducer 'center', but the pruning has reducer 'random'; try"),
    ],
)
def test_other_settings_are_refused_unless_it_is_given_or_none(tower, path, changes, told):
    tower.set_pruning(repair_path=path)
    expected = tower(IMAGES)
    with pytest.raises(UserError, match=told):
        tower.set_pruning(**changes)
    assert torch.equal(tower(IMAGES), expected) and tower.pruning.keep_rate == 0.5
    with pytest.raises(UserError, match=told):
        tower.set_pruning(repair_path=path, **changes)
    tower.set_pruning(repair_path=None, **changes)
    assert tower.repair is None


def test_settings_that_change_nothing_of_what_is_left_go_on(tower, path):
    tower.set_pruning(repair_path=path)
    tower.set_pruning(cls_only_last=False, seed=3)
    tower.set_pruning(drop_counts=(8,), leftovers="drop")  # the same schedule, said differently
    assert tower.repair is not None
    tower.set_pruning(drop_counts=None, align=3)  # 9 of 17 tokens in a sequence, which is a multiple of 3
    assert tower.repair is not None


@pytest.mark.parametrize("which, told", [("blocks", "with weights"), ("head", "with head")])
def test_another_tower_is_refused(tower, path, which, told):
    other = create_tower(keep_rate=0.5, reducer="center")
    part = other.blocks[0].mlp.fc1 if which == "blocks" else other.head
    with torch.no_grad():
        part.weight.add_(0.01)
    with pytest.raises(UserError, match=f"solved for tiny {told} .*, but this tower's"):
        other.set_pruning(repair_path=path)
    assert other.repair is None and other.pruning.repair_path is None
    tower.set_pruning(repair_path=path)
    with pytest.raises(UserError, match=told):
        tower.load_state_dict(other.state_dict())
    narrow = create_tower(keep_rate=0.5, reducer="center", num_classes=5)
    with pytest.raises(UserError, match=r"of shape \(24, 64\), but this tower's projection has \(5, 64\)"):
        narrow.set_pruning(repair_path=path)


def test_another_predictor_is_refused(tower, tmp_path):
    first, second = (create_predictor("mix_mlp", 64, (4, 4), dim=8) for _ in range(2))
    tower.set_pruning(predictor=first)
    write_for(tower, tmp_path / "r.safetensors")
    tower.set_pruning(repair_path=tmp_path / "r.safetensors")
    with pytest.raises(UserError, match="solved with predictor weights .*, but those in use are"):
        tower.set_pruning(predictor=second)
    tower.set_pruning(predictor=first)
    assert tower.repair is not None


def write_headless(tower, path):
    """A repair that is solved for the same tower without a head."""
    tower = copy.deepcopy(tower)
    tower.reset_classifier(0)
    weight = torch.eye(64) + 0.1 * torch.randn(64, 64, generator=torch.Generator().manual_seed(5))
    save_repair(Repair(weight, torch.ones(64), describe_repair(tower, "tiny") | DATA), path)
    return str(path)


@pytest.mark.parametrize("num_classes", [24, 64, 0])  # 64 is the width, so that shapes tell nothing
def test_what_was_solved_without_a_head_stands_before_one(num_classes, tmp_path):
    tower = create_tower(keep_rate=0.5, reducer="center", num_classes=num_classes)
    path = write_headless(tower, tmp_path / "r.safetensors")
    macs, entering = tower.macs().image, tower.forward_head(tower.forward_features(IMAGES), pre_logits=True)
    whole = tower.forward_whole(IMAGES)
    tower.set_pruning(repair_path=path)
    expected = tower.head(entering @ tower.repair.weight.T + tower.repair.bias)
    for found in (tower(IMAGES), tower.forward_pruned(IMAGES).embedding):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert tower.repair_leads is (num_classes > 0) and tower.macs().image == macs + 64 * 64
    assert torch.equal(tower.forward_whole(IMAGES), whole)
    tower.reset_classifier(7)  # the head is not what it was solved for
    assert torch.allclose(tower(IMAGES), tower.head(entering @ tower.repair.weight.T + tower.repair.bias), atol=1e-5)


def test_one_that_was_solved_with_a_head_of_that_many_classes_takes_its_place(tmp_path):
    tower = create_tower(keep_rate=0.5, reducer="center", num_classes=64)
    write_for(tower, tmp_path / "r.safetensors")
    entering = tower.forward_head(tower.forward_features(IMAGES), pre_logits=True)
    tower.set_pruning(repair_path=tmp_path / "r.safetensors")
    assert not tower.repair_leads
    torch.testing.assert_close(tower(IMAGES), entering @ tower.repair.weight.T + tower.repair.bias)
    plain = create_tower(keep_rate=0.5, reducer="center", num_classes=64)
    plain.reset_classifier(0)
    with pytest.raises(UserError, match="with head"):
        plain.set_pruning(repair_path=tmp_path / "r.safetensors")


def test_before_a_head_any_head_may_run(tmp_path):
    tower = create_tower(keep_rate=0.5, reducer="center")
    tower.set_pruning(repair_path=write_headless(tower, tmp_path / "r.safetensors"))
    before = tower(IMAGES)
    tower.head.register_forward_hook(lambda module, args, output: 2 * output)
    assert torch.allclose(tower(IMAGES), 2 * before)
    other = create_tower(keep_rate=0.5, reducer="center")
    torch.nn.init.ones_(other.head.weight)
    tower.load_state_dict(other.state_dict())
    other = create_tower(keep_rate=0.5, reducer="center")
    torch.nn.init.ones_(other.blocks[0].mlp.fc1.weight)
    with pytest.raises(UserError, match="with weights"):
        tower.load_state_dict(other.state_dict())


def test_before_a_head_that_head_may_be_quantised(tmp_path):
    tower = create_tower(keep_rate=0.5, reducer="center")
    path = write_headless(tower, tmp_path / "r.safetensors")
    tower.head = torch.ao.nn.quantized.dynamic.Linear(64, 24)
    tower.set_pruning(repair_path=path)
    assert tower.repair_leads
    write_for(create_tower(keep_rate=0.5, reducer="center"), path)
    with pytest.raises(UserError, match="are quantised"):
        tower.set_pruning(repair_path=path)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_same_tower_in_half_precision_takes_it(tower, tmp_path, dtype):
    tower.set_pruning(predictor=create_predictor("mix_mlp", 64, (4, 4), dim=8))
    path = tmp_path / "r.safetensors"
    write_for(tower, path)
    rounded = copy.deepcopy(tower).to(dtype)
    rounded.set_pruning(repair_path=path)
    assert rounded.repair.weight.dtype == dtype and rounded(IMAGES.to(dtype)).dtype == dtype
    tower.set_pruning(repair_path=path)
    assert torch.equal(tower.to(dtype).repair.weight, rounded.repair.weight)  # it follows the tower


def test_a_block_of_other_settings_gives_it_back(tmp_path):
    clip = create_pair()
    clip.visual.set_pruning(keep_rate=0.5, reducer="center")
    write_for(clip.visual, tmp_path / "r.safetensors")
    plain = clip.encode_image(IMAGES)
    with clip.applied(repair_path=tmp_path / "r.safetensors"):
        repaired = clip.encode_image(IMAGES)
        with clip.applied(repair_path=None, keep_rate=0.25):
            assert clip.visual.repair is None
        assert torch.equal(clip.encode_image(IMAGES), repaired)
    assert torch.equal(clip.encode_image(IMAGES), plain) and not torch.equal(repaired, plain)


def test_what_would_be_lost_beside_it_is_refused(tower, path, tmp_path):
    tower.set_pruning(repair_path=path)
    with pytest.raises(UserError, match="solved without prompts"):
        tower.set_prompts(create_prompts("V"))
    with pytest.raises(UserError, match="the head that is reset"):
        tower.reset_classifier(10)
    hook = tower.head.register_forward_hook(lambda *_: None)
    with pytest.raises(UserError, match="takes the place of the tower's head"):
        tower(IMAGES)
    hook.remove()
    tower(IMAGES)
    prompted = create_tower(keep_rate=0.5, reducer="center")
    prompted.set_prompts(create_prompts("V"))
    with pytest.raises(UserError, match="solved without prompts"):
        prompted.set_pruning(repair_path=path)


def test_it_is_no_part_of_a_tower_that_is_saved(tmp_path):
    import timm

    tower = timm.create_model("patchrank_clip_digits", keep_rate=0.5, reducer="center").eval()
    write_for(tower, tmp_path / "r.safetensors")
    tower.set_pruning(repair_path=tmp_path / "r.safetensors")
    with pytest.raises(UserError, match="set_pruning\\(repair_path=None\\) first"):
        patchrank.save_pretrained(tower, tmp_path / "saved")
    tower.set_pruning(repair_path=None)
    patchrank.save_pretrained(tower, tmp_path / "saved")
    again = timm.create_model(
        f"local-dir:{tmp_path / 'saved'}", pretrained=True, repair_path=str(tmp_path / "r.safetensors")
    )
    assert again.repair is not None


@pytest.mark.parametrize("kind", ["native", "timm"])
def test_models_of_open_clip_take_it(tmp_path, kind):
    model = tiny_open_clip.create(kind)
    images = tiny_open_clip.images_of(model)
    before, keys = model.encode_image(images), model.state_dict().keys()
    patchrank.prune_open_clip(model, keep_rate=0.5, reducer="center", locations=(4,))
    trunk = model.visual.trunk
    write_for(trunk, tmp_path / "r.safetensors")
    pruned = model.encode_image(images)
    patchrank.prune_open_clip(model, repair_path=tmp_path / "r.safetensors")
    assert not torch.allclose(model.encode_image(images), pruned, atol=1e-3)
    assert model.state_dict().keys() == keys
    assert torch.equal(patchrank.unprune(model).encode_image(images), before)


def test_a_repair_of_a_projection_is_refused_where_that_stands_behind_the_tower(tmp_path):
    native, behind = tiny_open_clip.create(), tiny_open_clip.create("timm", timm_proj="linear")
    for model in (native, behind):
        patchrank.prune_open_clip(model, keep_rate=0.5, reducer="center", locations=(4,))
    write_for(native.visual.trunk, tmp_path / "r.safetensors")
    images = tiny_open_clip.images_of(behind)
    before = behind.encode_image(images)
    with pytest.raises(UserError, match="of shape .* but this tower's projection has"):
        patchrank.prune_open_clip(behind, repair_path=tmp_path / "r.safetensors")
    assert torch.equal(behind.encode_image(images), before)


@pytest.mark.parametrize(
    "tensors, about, told",
    [
        ({"weight": torch.zeros(2, 3)}, None, "must hold a weight"),
        ({"weight": torch.zeros(2, 3), "bias": torch.zeros(3)}, None, "must hold a weight"),
        ({"weight": torch.full((2, 3), torch.nan), "bias": torch.zeros(2)}, None, "finite numbers"),
        ({"weight": torch.zeros(2, 3), "bias": torch.zeros(2)}, {"model": {"name": "x"}}, "must name a model"),
        ({"weight": torch.zeros(2, 3), "bias": torch.zeros(2)}, {"model": 3}, "must name a model"),
    ],
)
def test_damaged_files_are_refused(tower, tmp_path, tensors, about, told):
    full = describe_repair(tower, "tiny") | DATA | (about or {})
    write_tensors(tmp_path / "r.safetensors", "repair", tensors, full)
    with pytest.raises(UserError, match=told):
        load_repair(tmp_path / "r.safetensors")
    write_tensors(tmp_path / "p.safetensors", "predictor", tensors, full)
    with pytest.raises(UserError, match="names no repair"):
        load_repair(tmp_path / "p.safetensors")


@pytest.mark.slow
def test_it_compiles(tower, path):
    tower.set_pruning(repair_path=path)
    with torch.no_grad():
        assert torch.allclose(torch.compile(tower, backend="eager", fullgraph=True)(IMAGES), tower(IMAGES), atol=1e-6)
