"""Learned tokens in the image tower: where they stand, what never happens to them, and what they cost."""

import copy

import pytest
import timm
import torch
import torch.nn.functional as F
from helpers.learned_tokens import WIDTH, B, create
from helpers.macs import counted
from torch import nn

from patchrank.golden.scores import score_images
from patchrank.layers import pruning
from patchrank.layers.class_token import cls_row
from patchrank.layers.macs import vision_macs
from patchrank.utils.errors import UserError


class Fixed(nn.Module):
    """Visual tokens without a map, large enough to matter."""

    def __init__(self, count=B, width=WIDTH):
        super().__init__()
        self.tokens = nn.Parameter(torch.randn(count, width, generator=torch.Generator().manual_seed(5)))

    def visual(self):
        return self.tokens


@torch.no_grad()
@pytest.mark.parametrize("registers", [0, 2])
def test_prompts_stand_between_prefix_and_patches_before_norm_pre(images, registers):
    torch.manual_seed(0)
    tower, prompts = timm.create_model("patchrank_clip_digits", reg_tokens=registers).eval(), Fixed()
    nn.init.normal_(tower.norm_pre.bias)
    plain = tower.embed(images)
    tower.set_prompts(prompts)
    prefix, x = 1 + registers, tower.embed(images)
    assert (tower.num_prefix_tokens, tower.num_prompt_tokens, tower.num_leading_tokens) == (prefix, B, prefix + B)
    assert x.shape == (4, prefix + B + 64, WIDTH)
    assert torch.equal(x[:, :prefix], plain[:, :prefix]) and torch.equal(x[:, prefix + B :], plain[:, prefix:])
    torch.testing.assert_close(x[:, prefix : prefix + B], tower.norm_pre(prompts.tokens).expand(4, -1, -1))


def masked(tower, images, scores):
    """The oracle: full sequences, prompts too, with the keys of dropped patches masked from their location on."""
    order, alive, x, leading = pruning.rank(scores), 64, tower.embed(images), tower.num_leading_tokens
    for layer, block in enumerate(tower.blocks, 1):
        alive -= tower.pruner.drops.get(layer, 0)
        keys = torch.zeros(len(x), x.shape[1], dtype=torch.bool)
        keys[:, :leading] = True
        keys.scatter_(1, order[:, :alive] + leading, True)
        x = block(x, attn_mask=keys[:, None, None, :].expand(-1, 1, x.shape[1], -1))
    return tower.forward_head(tower.norm(x))


@torch.no_grad()
@pytest.mark.parametrize("locations", [(4, 6, 8, 10), (1, 3, 5, 7), (12,)])
@pytest.mark.parametrize("cls_only_last", [True, False])
def test_removing_patches_equals_masking_their_keys(tower, images, locations, cls_only_last):
    scores = torch.randn(4, 64, generator=torch.Generator().manual_seed(2))
    tower.set_prompts(Fixed())
    tower.set_pruning(keep_rate=0.4, locations=locations, reducer="golden", cls_only_last=cls_only_last)
    embedding = tower.forward_pruned(images, scores).embedding
    torch.testing.assert_close(embedding, masked(tower, images, scores), atol=1e-6, rtol=1e-5)
    without = copy.deepcopy(tower)
    without.set_prompts(None)
    assert (without.forward_pruned(images, scores).embedding - embedding).abs().max() > 1e-3  # they matter


@torch.no_grad()
def test_prompts_are_never_dropped_even_where_one_patch_is_left(tower, images):
    lengths, prompts = [], Fixed()
    for block in tower.blocks:
        block.norm2.register_forward_pre_hook(lambda module, args: lengths.append(args[0].shape[1]))
    tower.set_prompts(prompts)
    tower.set_pruning(keep_rate=0.001, locations=(1, 11), reducer="cls_attention", cls_only_last=False)
    out = tower.forward_pruned(images)
    assert lengths == [1 + B + 32] * 10 + [1 + B + 1] * 2
    assert out.kept.shape == (4, 1) and out.kept.max() < 64
    scores = torch.zeros(4, 64).scatter(1, out.kept, 1.0)
    tower.set_pruning(reducer="golden", locations=(1,))
    alone = tower.forward_pruned(images, scores).embedding
    torch.testing.assert_close(alone, masked(tower, images, scores), atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_class_attention_ranks_patches_alone(tower, images):
    tower.set_prompts(Fixed())
    tower.set_pruning(keep_rate=0.5, locations=(1,), reducer="cls_attention")
    row = cls_row(tower.blocks[0], tower.embed(images))
    assert row.shape == (4, 1 + B + 64)  # softmax over all tokens
    expected = pruning.rank(row[:, 1 + B :])[:, :32].sort(-1).values
    assert torch.equal(tower.forward_pruned(images).kept, expected)


@torch.no_grad()
def test_the_predictor_sees_class_token_and_patches_of_prompted_features(tower, images):
    seen = []

    class Spy(nn.Module):
        def forward(self, cls, patches):
            seen.append((cls, patches))
            return patches.sum(-1)

    tower.set_prompts(Fixed())
    tower.set_pruning(keep_rate=0.5, predictor=Spy())
    tower(images)
    x = tower.forward_prefix(images, 4)
    assert x.shape[1] == 1 + B + 64
    assert torch.equal(seen[0][0], x[:, 0]) and torch.equal(seen[0][1], x[:, 1 + B :])


@torch.no_grad()
@pytest.mark.parametrize("reducer", ["random", "cls_attention", "center"])
def test_shared_tokens_include_prompts(tower, images, reducer):
    tower.set_prompts(Fixed())
    tower.set_pruning(keep_rate=0.5, reducer=reducer)
    tokens = tower.forward_prefix(images, tower.shared_layer)
    assert torch.equal(tower.forward_pruned(images, tokens=tokens).embedding, tower(images))


@torch.no_grad()
@pytest.mark.parametrize("keep_rate", [1.0, 0.5])
def test_features_have_timms_shapes_without_prompts(tower, images, keep_rate):
    tower.set_prompts(Fixed())
    tower.set_pruning(keep_rate=keep_rate, reducer="center")
    features = tower.forward_features(images)
    assert features.shape == (4, 65, 64)
    assert (features[:, 1:].abs().sum(-1) == 0).sum(-1).tolist() == [64 - 64 * keep_rate] * 4
    torch.testing.assert_close(tower.forward_head(features), tower(images), atol=1e-6, rtol=1e-6)
    final, maps = tower.forward_intermediates(images, [0, 11], return_prefix_tokens=True)
    assert torch.equal(final, features)
    assert [(patches.shape, prefix.shape) for patches, prefix in maps] == [((4, 64, 8, 8), (4, 1, 64))] * 2
    first = tower.blocks[0](tower.embed(images))
    torch.testing.assert_close(maps[0][0].flatten(2).transpose(1, 2), first[:, 1 + B :])


@torch.no_grad()
def test_averages_are_of_patches_alone(images):
    tower = timm.create_model("patchrank_clip_digits", global_pool="avg").eval()
    tower.set_prompts(Fixed())
    x = tower.embed(images)
    for block in tower.blocks:
        x = block(x)
    expected = tower.head(tower.fc_norm(tower.norm(x)[:, 1 + B :].mean(1)))
    for embedding in (tower(images), tower.forward_head(tower.forward_features(images))):
        torch.testing.assert_close(embedding, expected, atol=1e-6, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("settings", [{}, {"cls_only_last": True}, {"keep_rate": 0.5, "reducer": "cls_attention"}])
def test_without_prompts_nothing_changes_by_a_bit(tower, images, settings):
    tower.set_pruning(**settings)
    before = [tower(images), tower.forward_features(images), tower.forward_prefix(images, 3)]
    weights, names = tower.blocks_sha256(), list(tower.state_dict())
    tower.set_prompts(Fixed())
    prompted = tower(images)
    assert not torch.allclose(prompted, before[0], atol=1e-4)
    assert tower.blocks_sha256() == weights and list(tower.state_dict()) == names
    assert len(list(tower.parameters())) == len(names)
    assert torch.equal(copy.deepcopy(tower)(images), prompted)
    tower.set_prompts(None)
    after = [tower(images), tower.forward_features(images), tower.forward_prefix(images, 3)]
    assert all(torch.equal(x, y) for x, y in zip(before, after))


@torch.no_grad()
def test_prompts_outlast_changes_of_pruning(tower, images):
    tower.set_prompts(Fixed())
    expected = tower(images)
    tower.set_pruning(keep_rate=0.5, reducer="random")
    tower.set_pruning(keep_rate=1.0)
    assert torch.equal(tower(images), expected)


@torch.no_grad()
def test_prompts_count_in_aligned_lengths(images):
    tower = timm.create_model("patchrank_clip_digits", reducer="center", keep_rate=0.6, align=8).eval()
    plain, counts = tower(images), (9, 8, 8)  # 65 tokens to 56, 48, 40
    assert tower.drop_counts == counts
    tower.set_prompts(Fixed())
    assert tower.drop_counts == (5, 8, 8, 8) and tower(images).isfinite().all()  # 69 to 64, 56, 48, 40
    tower.set_prompts(None)
    assert tower.drop_counts == counts and torch.equal(tower(images), plain)
    tower.set_pruning(align=55, reducer="tome")
    with pytest.raises(UserError, match="align 55 cannot be kept: of 165 tokens in a sequence at most 32"):
        tower.set_prompts(Fixed(100))
    assert tower.prompts is None and tower.num_leading_tokens == 1


@torch.no_grad()
def test_prompts_follow_the_towers_precision(tower, images):
    tower.set_prompts(create())
    half = copy.deepcopy(tower).bfloat16()
    assert half(images.bfloat16()).dtype == torch.bfloat16
    assert tower.prompts.text.dtype == torch.float32


@pytest.mark.slow
def test_compiled_and_exported_towers_take_prompts_along(images):
    tower = timm.create_model("patchrank_clip_digits", depth=2, locations=(2,)).eval()
    prompts = create()
    tower.set_prompts(prompts)
    tower.set_pruning(keep_rate=0.5, reducer="center")
    compiled, expected = torch.compile(tower, backend="eager", fullgraph=True), tower(images)
    torch.testing.assert_close(compiled(images), expected)
    compiled(images).sum().backward()
    assert prompts.text.grad is not None and prompts.to_visual.weight.grad is not None
    exported = torch.export.export(tower, (images,))
    torch.testing.assert_close(exported.module()(images), expected, atol=1e-6, rtol=1e-5)


def test_prompts_that_fit_no_tower_are_refused_and_change_nothing(tower, images):
    expected = tower(images)
    for prompts, message in [
        (Fixed(width=32), r"shape \(b, 64\) for this image tower, but have \(4, 32\)"),
        (create("T"), "of mode T, which has no visual part"),
    ]:
        with pytest.raises(UserError, match=message):
            tower.set_prompts(prompts)
    assert torch.equal(tower(images), expected)
    tower.set_prompts(Fixed())
    with pytest.raises(UserError, match="attention masks do not go together with pruning or prompts"):
        tower(images, is_causal=True)
    with pytest.raises(UserError, match="fixed image size"):
        timm.create_model("patchrank_clip_digits", dynamic_img_size=True).set_prompts(Fixed())
    with pytest.raises(UserError, match="patch_drop_rate"):
        timm.create_model("patchrank_clip_digits", patch_drop_rate=0.5).set_prompts(Fixed())


@pytest.mark.parametrize("settings", [{}, {"keep_rate": 0.5}, {"keep_rate": 0.5, "reducer": "cls_attention"}])
@pytest.mark.parametrize("locations", [(4, 6, 8, 10), (1, 12)])
def test_prompts_are_counted(tower, images, settings, locations):
    tower.set_prompts(Fixed())
    tower.set_pruning(locations=locations, predictor_init="random", **settings)
    assert counted(lambda: tower(images)) == len(images) * tower.macs().image
    tower.set_pruning(keep_rate=1.0)
    assert tower.macs().vision > tower.macs_unpruned().vision  # which is of the tower as it came
    tower.set_prompts(None)
    assert tower.macs() == tower.macs_unpruned()


def test_prompted_clip_b16_has_its_known_cost():
    with torch.device("meta"):
        tower, prompts = timm.create_model("patchrank_clip_b16"), Fixed(16, 768)
    tower.set_prompts(prompts.to("meta"))
    assert tower.macs().vision / 1e9 == pytest.approx(19.0433, abs=1e-4)
    assert tower.macs_unpruned().vision / 1e9 == pytest.approx(17.5635, abs=1e-4)
    assert vision_macs(tower, (4, 6, 8, 10), (20, 20, 20, 20)) / 1e9 == pytest.approx(15.3785, abs=1e-4)


@torch.no_grad()
def test_windows_of_a_prompted_tower_equal_a_naive_loop(tower, images):
    tower.set_prompts(Fixed())
    golden = score_images(tower, images[:2], window=4, stride=4, remove_at=3, batch_size=3)
    z = F.normalize(tower(images[:2]).double(), dim=-1)
    for w, square in enumerate(pruning.windows((8, 8), 4, 4).tolist()):
        left = [*range(1 + B), *(1 + B + t for t in range(64) if t not in square)]
        piece = tower.forward_suffix(tower.forward_prefix(images[:2], 3)[:, left], 3)
        expected = 1 - (z * F.normalize(piece.double(), dim=-1)).sum(-1)
        torch.testing.assert_close(golden.windows[:, 0, w], expected, atol=1e-7, rtol=1e-3)
