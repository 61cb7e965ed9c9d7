"""Reducers that merge tokens: held against a loop over single tokens, and against what must not change."""

import pytest
import timm
import torch
from helpers.macs import counted

from patchrank.layers.predictors import create_predictor
from patchrank.layers.reducers import REDUCERS, TokenState, create_reducer
from patchrank.models.pruned_vit import PrunedVisionTransformer
from patchrank.utils.errors import UserError

MERGING = sorted(name for name in REDUCERS if REDUCERS[name].merges)
RANKERS = sorted(set(REDUCERS) - {*MERGING, "golden", "prior"})
NATIVE = {"locations": tuple(range(1, 13)), "drop_counts": (4,) * 12}  # ToMe's r = 4 in every layer


def prune(tower, reducer, **settings):
    torch.manual_seed(4)
    given = {"predictor": create_predictor("mix_mlp", 64, (8, 8))} if REDUCERS[reducer].fitted else {}
    tower.set_pruning(reducer=reducer, **given, **settings)


def naive_tome(tokens, sizes, keys, count):
    """ToMe on one image, with the class token in front as its authors count: lists of tokens, token by token."""
    keys = torch.nn.functional.normalize(keys, dim=-1)
    a, b = list(range(0, len(tokens), 2)), list(range(1, len(tokens), 2))
    edges = []
    for i in a[1:]:  # the class token at place 0 stays
        similar = [float(keys[i] @ keys[j]) for j in b]
        edges.append((max(similar), i, b[similar.index(max(similar))]))
    edges = sorted(edges, key=lambda edge: -edge[0])[:count]
    total = {j: tokens[j] * sizes[j] for j in range(len(tokens))}
    grown = {j: float(sizes[j]) for j in range(len(tokens))}
    for _, i, j in edges:
        total[j], grown[j] = total[j] + tokens[i] * sizes[i], grown[j] + float(sizes[i])
    gone = {i for _, i, _ in edges}
    order = [i for i in a if i not in gone] + b
    return torch.stack([total[j] / grown[j] for j in order]), torch.tensor([grown[j] for j in order]), order


@torch.no_grad()
def test_tome_equals_a_loop_over_tokens():
    torch.manual_seed(0)
    tokens, keys, sizes = torch.randn(3, 17, 8), torch.randn(3, 17, 4), torch.randint(1, 6, (3, 17)).float()
    sizes[:, 0] = 1
    places = torch.arange(16).expand(3, -1)
    state = TokenState(tokens[:, 1:], places, tokens[:, 0], sizes[:, 1:], homes=places, metric=keys[:, 1:])
    state = create_reducer("tome").reduce(state, 11)
    for image in range(3):
        expected, grown, order = naive_tome(tokens[image], sizes[image], keys[image], 5)
        torch.testing.assert_close(state.tokens[image], expected[1:], atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(state.sizes[image], grown[1:])
        assert state.index[image].tolist() == [place - 1 for place in order[1:]]


@torch.no_grad()
def test_the_whole_tower_with_tome_equals_a_loop_over_layers(tower, images):
    """Explicit attention matrices with log sizes, and the loop over tokens above; nothing shared with the product."""
    prune(tower, "tome", **NATIVE)
    for image in images[:2]:
        x, sizes = tower.embed(image[None])[0], torch.ones(65)
        for block in tower.blocks:
            attn = block.attn
            q, k, v = attn.qkv(block.norm1(x)).view(len(x), 3, attn.num_heads, -1).permute(1, 2, 0, 3)
            weights = (q @ k.transpose(1, 2) / attn.head_dim**0.5 + sizes.log()).softmax(-1)
            x = x + attn.proj((weights @ v).transpose(0, 1).flatten(1))
            x, sizes, _ = naive_tome(x, sizes, k.mean(0), 4)
            x = x + block.mlp(block.norm2(x))
        expected = tower.forward_head(tower.norm(x[None]))
        torch.testing.assert_close(tower(image[None]), expected, atol=1e-5, rtol=1e-4)
        features = tower.forward_features(image[None])
        torch.testing.assert_close(tower.forward_head(features), expected, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_guided_merge_without_protection_by_keys_is_tome(tower, images):
    prune(tower, "tome", **NATIVE)
    expected = tower.forward_pruned(images)
    prune(tower, "guided_merge", metric="keys", protection=0.0, **NATIVE)
    out = tower.forward_pruned(images)
    assert torch.equal(out.embedding, expected.embedding) and torch.equal(out.source, expected.source)
    tower.set_pruning(protection=0.5)
    assert not torch.equal(tower(images), expected.embedding)
    tower.set_pruning(protection=0.0, metric="features")
    assert not torch.equal(tower(images), expected.embedding)


def naive_upward(tokens, sizes, metric, importance, count, protection):
    """Ranked matching on one image, token by token; returns tokens, sizes and places of those that stay."""
    order = sorted(range(len(tokens)), key=lambda i: (-float(importance[i]), i))
    unit = torch.nn.functional.normalize(metric, dim=-1)
    cost = lambda i, j: float(sizes[i] * sizes[j] / (sizes[i] + sizes[j]) * (1 - unit[i] @ unit[j]))  # noqa: E731
    cheapest = {}
    for place, i in enumerate(order[1:], 1):
        cheapest[i] = min(cost(i, j) for j in order[:place]) * float((protection * importance[i]).exp())
    gone = sorted(cheapest, key=cheapest.get)[:count]
    kept = [i for i in order if i not in gone]
    total, grown = {j: tokens[j] * sizes[j] for j in kept}, {j: float(sizes[j]) for j in kept}
    for i in gone:
        j = min(kept, key=lambda j: cost(i, j))
        total[j], grown[j] = total[j] + tokens[i] * sizes[i], grown[j] + float(sizes[i])
    return torch.stack([total[j] / grown[j] for j in kept]), torch.tensor([grown[j] for j in kept]), kept


@torch.no_grad()
@pytest.mark.parametrize("protection", [0.0, 0.5, 3.0])
def test_ranked_matching_equals_a_loop_over_tokens(protection):
    torch.manual_seed(0)
    tokens, metric, row = torch.randn(3, 16, 8), torch.randn(3, 16, 4), torch.rand(3, 16)
    sizes, places = torch.randint(1, 6, (3, 16)).float(), torch.arange(16).expand(3, -1)
    state = TokenState(tokens, places, tokens[:, 0], sizes, homes=places, metric=metric, cls_row=row)
    state = create_reducer("attention_merge", protection=protection).reduce(state, 9)
    for image in range(3):
        z = (row[image] - row[image].mean()) / row[image].std(correction=0)
        expected, grown, kept = naive_upward(tokens[image], sizes[image], metric[image], z, 7, protection)
        torch.testing.assert_close(state.tokens[image], expected, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(state.sizes[image], grown)
        assert state.index[image].tolist() == kept


@torch.no_grad()
@pytest.mark.parametrize("reducer, usual", [("guided_merge", 0.1), ("rank_merge", 0.8), ("attention_merge", 0.5)])
def test_protection_that_nobody_names_is_the_reducers_own(tower, images, reducer, usual):
    embeddings = []
    for protection in (None, usual, 2 * usual):
        prune(tower, reducer, drop_counts=(20, 10), locations=(4, 5), protection=protection)
        embeddings.append(tower(images))
    assert torch.equal(embeddings[0], embeddings[1]) and not torch.equal(embeddings[0], embeddings[2])


@torch.no_grad()
def test_the_most_important_token_never_goes_and_one_can_be_all_that_is_left(tower, images):
    scores = torch.randn(4, 64, generator=torch.Generator().manual_seed(2))
    prune(tower, "rank_merge", drop_counts=(63,), locations=(4,))
    out = tower.forward_pruned(images, scores)
    assert torch.equal(out.kept[:, 0], scores.argmax(-1)) and (out.source == 0).all()


@torch.no_grad()
def test_protected_tokens_do_not_go(tower, images):
    prune(tower, "guided_merge", protection=100.0, drop_counts=(16,), locations=(4,))
    scores = torch.randn(4, 64, generator=torch.Generator().manual_seed(2))
    out = tower.forward_pruned(images, scores)
    gone = scores[:, 1::2].argsort(dim=-1, stable=True)[:, :16] * 2 + 1  # the least important of those that may go
    expected = [sorted(set(range(64)) - set(row)) for row in gone.tolist()]
    assert [sorted(row) for row in out.kept.tolist()] == expected
    assert torch.equal(out.scores, scores)


@torch.no_grad()
@pytest.mark.parametrize("metric", ["features", "keys"])
@pytest.mark.parametrize("location", [1, 5])
def test_what_a_ranking_leaves_merges_into_its_most_similar_kept_token(tower, images, metric, location):
    """By hand, image by image, for tokens that leave at once before a layer."""
    scores = torch.randn(4, 64, generator=torch.Generator().manual_seed(2))
    prune(tower, "center", leftovers="merge", metric=metric, keep_rate=0.25, locations=(location,))
    out, order = tower.forward_pruned(images, scores), scores.argsort(dim=-1, descending=True)
    x, block = tower.forward_prefix(images, location), tower.blocks[location - 1]
    if metric == "features":
        compared = block.norm1(x)
    else:  # keys of the layer before; layer 1 has none and takes its own
        layer = max(location - 1, 1)
        block = tower.blocks[layer - 1]
        qkv = block.attn.qkv(block.norm1(tower.forward_prefix(images, layer)))
        compared = qkv.view(4, 65, 3, block.attn.num_heads, -1)[:, :, 1].mean(2)
    compared = torch.nn.functional.normalize(compared[:, 1:], dim=-1)
    for image in range(4):
        kept, gone = order[image, :16].tolist(), order[image, 16:].tolist()
        homes = {patch: slot for slot, patch in enumerate(kept)}
        for patch in gone:
            homes[patch] = int((compared[image, kept] @ compared[image, patch]).argmax())
        assert out.source[image].tolist() == [homes[patch] for patch in range(64)]
        assert out.kept[image].tolist() == kept
    members = torch.nn.functional.one_hot(out.source, 16).float()  # (4, 64, 16)
    merged = members.transpose(1, 2) @ x[:, 1:] / members.sum(1)[..., None]
    x, bias = torch.cat([x[:, :1], merged], 1), torch.nn.functional.pad(members.sum(1).log(), (1, 0))[:, None, None]
    for block in tower.blocks[location - 1 :]:
        x = block(x, attn_mask=bias)
    torch.testing.assert_close(out.embedding, tower.forward_head(tower.norm(x)), atol=1e-5, rtol=1e-4)
    own, grid = tower.forward_pruned(images), tower.forward_features(images)[:, 1:]  # by the reducer's own ranking
    at_home = grid.gather(1, own.kept.gather(1, own.source)[..., None].expand(-1, -1, 64))
    torch.testing.assert_close(grid, at_home)  # each patch shows the token that it lives in


@torch.no_grad()
def test_a_share_of_what_leaves_can_be_dropped(tower, images):
    scores = torch.arange(64.0).expand(4, -1)
    prune(tower, "center", leftovers="merge", drop_share=0.5, keep_rate=0.25, locations=(3,))
    out = tower.forward_pruned(images, scores)
    assert (out.source[:, :24] == -1).all() and (out.source[:, 24:] >= 0).all()  # the lowest half of 48
    assert (tower.forward_features(images)[:, 1:].abs().sum(-1) == 0).sum(-1).tolist() == [24] * 4
    tower.set_pruning(drop_share=1.0)
    merged = tower.forward_pruned(images, scores)
    tower.set_pruning(leftovers="drop")
    torch.testing.assert_close(merged.embedding, tower.forward_pruned(images, scores).embedding, atol=1e-6, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("reducer", [*MERGING, *RANKERS])
@pytest.mark.parametrize("locations", [(4, 6, 8, 10), (1, 3, 5), (10, 12)])
def test_the_contract_of_merging(tower, images, reducer, locations):
    """Places, source map, batching, features and head, MACs."""
    leftovers = {} if reducer in MERGING else {"leftovers": "merge"}
    first = REDUCERS[reducer].first_location
    prune(tower, reducer, keep_rate=0.5, locations=tuple(max(first, layer) for layer in locations), **leftovers)
    out = tower.forward_pruned(images)
    skipped = REDUCERS[reducer].site == "mid" and 12 in locations  # of the middle of the last layer nothing is read
    assert out.kept.shape[1] == (48 if skipped else 32)
    assert all(len(set(kept)) == len(kept) for kept in out.kept.tolist())
    assert torch.equal(out.source.gather(1, out.kept), torch.arange(out.kept.shape[1]).expand(4, -1))
    alone = [tower.forward_pruned(image[None]) for image in images]
    assert torch.equal(torch.cat([one.source for one in alone]), out.source)
    torch.testing.assert_close(tower(images), out.embedding, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(tower.forward_head(tower.forward_features(images)), out.embedding, atol=1e-5, rtol=1e-5)
    assert counted(lambda: tower(images)) == len(images) * tower.macs().image
    assert tower.macs().matching > 0


@torch.no_grad()
@pytest.mark.parametrize(
    "reducer",
    [pytest.param(name, marks=pytest.mark.slow) for name in "rank_merge diffrate evit predictor evit_drop".split()],
)
def test_half_precision_export_and_compilation(images, reducer):
    torch.manual_seed(0)
    settings = dict(depth=3, keep_rate=0.5, locations=(1, 2), reducer=reducer, predictor_init="random")
    settings |= {} if reducer in MERGING else {"leftovers": "merge"}
    tower = timm.create_model("patchrank_clip_digits", **settings).eval()
    expected = tower(images)
    torch.compiler.reset()  # other towers were compiled in this process, and torch counts them all
    compiled = torch.compile(tower, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(images), expected, atol=1e-5, rtol=1e-5)
    exported = torch.export.export(tower, (images,))
    torch.testing.assert_close(exported.module()(images), expected, atol=1e-5, rtol=1e-5)
    assert tower.bfloat16()(images.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"reducer": "tome", "leftovers": "merge"}, "'tome' merges by a rule of its own, so leftovers 'merge' says"),
        ({"reducer": "tome", "leftovers": "drop"}, "try it without `leftovers`"),
        ({"reducer": "tome", "drop_counts": (33,), "locations": (4,)}, "33 of 64 patch tokens .* merges at most 32"),
        ({"reducer": "feature_merge", "keep_rate": 0.2, "locations": (4,)}, "half of those .* try more"),
        ({"reducer": "center", "leftovers": "melt"}, "leftovers 'melt' does not exist"),
        ({"reducer": "guided_merge", "drop_counts": (8,), "locations": (4,)}, "no weights to rank by"),
        ({"reducer": "center", "budget": 0.1}, "budget 0.1 cannot be kept.* try earlier locations"),
    ],
)
def test_impossible_settings_are_refused(tower, images, settings, message):
    expected = tower(images)
    with pytest.raises(UserError, match=message):
        tower.set_pruning(**settings)
    assert torch.equal(tower(images), expected)


class Still(torch.nn.Module):
    """Attention of another kind, without heads or keys."""

    def forward(self, x, attn_mask=None, is_causal=False):
        return x


@pytest.mark.parametrize("settings", [{"reducer": "tome"}, {"reducer": "center", "leftovers": "merge"}])
def test_a_layer_without_keys_matters_only_where_they_are_read(images, settings):
    tower = timm.create_model("patchrank_clip_digits", depth=4, locations=(4,)).eval()
    tower.blocks[0].attn = Still()
    with pytest.raises(UserError, match="layer 1 has Still"):
        tower.set_pruning(locations=(1, 3), budget=0.8, metric="keys", **settings)
    tower.set_pruning(locations=(3,), budget=0.8, metric="keys", **settings)
    assert tower(images).isfinite().all() and tower.macs().matching > 0


def test_merging_by_keys_needs_no_class_token():
    shape = dict(img_size=32, patch_size=8, embed_dim=64, depth=2, num_heads=2, num_classes=24, locations=(2,))
    shape |= dict(class_token=False, global_pool="")
    tower = PrunedVisionTransformer(reducer="tome", drop_counts=(5,), **shape).eval()
    assert tower(torch.randn(1, 3, 32, 32)).shape == (1, 11, 24)
    with pytest.raises(UserError, match="this tower has no class token"):
        tower.set_pruning(reducer="evit")


def test_scores_from_outside_are_refused_where_nothing_ranks(tower, images):
    prune(tower, "tome", drop_counts=(8,), locations=(4,))
    with pytest.raises(UserError, match="'tome' chooses inside a layer and takes no scores"):
        tower.forward_pruned(images, torch.randn(4, 64))


def lengths(tower):
    """How long the sequence is behind each location."""
    left, total = [], tower.num_patches + tower.num_leading_tokens
    for count in tower.drop_counts:
        total -= count
        left.append(total)
    return left


@pytest.mark.parametrize(
    "settings",
    [
        {"reducer": "center", "locations": (4, 6, 8, 10), "taper": 0.8},
        {"reducer": "tome", "locations": tuple(range(2, 11)), "taper": 0.8},
        {"reducer": "evit", "locations": (2, 5, 8)},
    ],
)
def test_aligned_lengths_stay_within_a_budget_and_near_a_keep_rate(tower, settings):
    tower.set_pruning(budget=0.6, align=8, **settings)
    most, counts = 0.6 * tower.macs_unpruned().image, tower.drop_counts
    assert not any(length % 8 for length in lengths(tower)) and tower.macs().image <= most
    locations = tuple(tower.pruner.drops)
    for place in range(len(counts)):
        if counts[place] - 8 >= (place == 0):  # so many given back would be more than the budget
            fewer = tuple(count - 8 * (n == place) for n, count in enumerate(counts))
            tower.set_pruning(locations=locations, drop_counts=fewer, align=1)
            assert tower.macs().image > most
    tower.set_pruning(drop_counts=None, budget=None, keep_rate=0.5, align=16, **settings)
    assert lengths(tower)[-1] == 32  # of 33
    with pytest.raises(UserError, match="budget 0.1 cannot be kept.* or a smaller align"):
        tower.set_pruning(budget=0.1)
    with pytest.raises(UserError, match="pruning: align 16 rounds counts, but drop_counts 9, 9 say .* try align 1"):
        tower.set_pruning(drop_counts=(9, 9), locations=(4, 6))
    assert lengths(tower)[-1] == 32


@pytest.mark.parametrize("budget", [0.75, 0.65, 0.55, 0.47])
@pytest.mark.parametrize(
    "settings",
    [
        {"reducer": "center", "locations": (4,)},
        {"reducer": "center", "locations": (4, 6, 8), "leftovers": "merge", "taper": 0.5},
        {"reducer": "tome", "locations": tuple(range(1, 13))},
        {"reducer": "feature_merge", "locations": (2, 3, 4, 5, 6), "taper": 0.6},
    ],
)
def test_a_budget_is_kept_within_one_token(tower, budget, settings):
    tower.set_pruning(budget=budget, **settings)
    most, counts = budget * tower.macs_unpruned().image, tower.drop_counts
    assert tower.macs().image <= most
    locations = [layer for layer, count in tower.pruner.drops.items() if count]
    for place in range(len(counts)):
        fewer = [count - (n == place) for n, count in enumerate(counts)]
        if fewer[0]:
            tower.set_pruning(locations=tuple(locations), drop_counts=tuple(fewer))
            assert tower.macs().image > most  # no token more could have stayed anywhere
    tower.set_pruning(drop_counts=None)
    tower.set_pruning(budget=1.0)
    assert tower.drop_counts == ()
