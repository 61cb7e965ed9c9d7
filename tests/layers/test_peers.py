"""Published peers and free controls: each held against its formula, image by image and token by token."""

from dataclasses import replace

import pytest
import torch
from helpers.macs import counted

from patchrank.layers.prompts import Prompts
from patchrank.layers.reducers import REDUCERS, Reducer, TokenState, create_reducer, register_reducer
from patchrank.utils.errors import UserError


def state_of(batch=3, num=16, width=8, **fields):
    torch.manual_seed(0)
    index = torch.arange(num).expand(batch, -1)
    row = torch.rand(batch, num) / num
    return TokenState(
        torch.randn(batch, num, width), index, torch.randn(batch, width), homes=index, cls_row=row, **fields
    )


def zscored(x):
    return (x - x.mean(-1, keepdim=True)) / x.std(-1, unbiased=False, keepdim=True)


def test_members_without_any_attention_fuse_into_a_finite_token():
    state = replace(state_of(), cls_row=torch.eye(16)[:3])  # all attention goes to one patch, as it does once rounded
    assert create_reducer("evit_norm").reduce(state, 11).tokens.isfinite().all()


@torch.no_grad()
@pytest.mark.parametrize("name", ["evit", "evit_norm"])
def test_the_fused_token_equals_its_formula(name):
    state = state_of()
    out = create_reducer(name).reduce(state, 11)  # a net loss of 5: 10 stay, and 6 become one
    for image in range(3):
        row = state.cls_row[image]
        order = sorted(range(16), key=lambda place: -float(row[place]))
        fused, total = torch.zeros(8), sum(float(row[place]) for place in order[10:])
        for place in order[10:]:
            fused += row[place] * state.tokens[image, place] / (total if name == "evit_norm" else 1)
        torch.testing.assert_close(out.tokens[image, :10], state.tokens[image, order[:10]])
        torch.testing.assert_close(out.tokens[image, 10], fused)
        assert out.index[image].tolist() == order[:11]  # the fused token stands at its most attended member
        assert [int(out.homes[image, place]) for place in order] == [*range(10), *[10] * 6]
    assert out.tokens.shape[1] == 11 and out.sizes is None


@torch.no_grad()
@pytest.mark.parametrize("reducer", ["evit", "evit_norm", "evit_drop"])
def test_a_whole_tower_with_evit_equals_a_loop_over_layers(tower, images, reducer):
    """Explicit attention matrices of each layer; a fused token is a patch like any other at the next location."""
    drops, fuses = {1: 9, 4: 20}, reducer != "evit_drop"
    tower.set_pruning(reducer=reducer, locations=tuple(drops), drop_counts=tuple(drops.values()))
    for image in images[:2]:
        x = tower.embed(image[None])[0]
        for layer, block in enumerate(tower.blocks, 1):
            attn = block.attn
            q, k, v = attn.qkv(block.norm1(x)).view(len(x), 3, attn.num_heads, -1).permute(1, 2, 0, 3)
            weights = (q @ k.transpose(1, 2) / attn.head_dim**0.5).softmax(-1)
            x = x + attn.proj((weights @ v).transpose(0, 1).flatten(1))
            if layer in drops:
                row, patches = weights.mean(0)[0, 1:], x[1:]
                order = row.argsort(descending=True)
                stay = len(row) - drops[layer] - fuses
                gone = row[order[stay:], None] * patches[order[stay:]]
                fused = gone.sum(0, keepdim=True) / (row[order[stay:]].sum() if reducer == "evit_norm" else 1)
                x = torch.cat([x[:1], patches[order[:stay]], *([fused] if fuses else [])])
            x = x + block.mlp(block.norm2(x))
        expected = tower.forward_head(tower.norm(x[None]))
        torch.testing.assert_close(tower(image[None]), expected, atol=1e-6, rtol=1e-5)


def naive_diffrate(tokens, sizes, row, k, merging):
    order = sorted(range(len(row)), key=lambda place: -float(row[place]))
    kept, homes = order[:k], {place: [tokens[place]] for place in order[:k]}
    grown, source = {place: float(sizes[place]) for place in kept}, dict(zip(kept, range(k)))
    for place in order[k : k + merging]:
        similar = [float(torch.nn.functional.cosine_similarity(tokens[place], tokens[other], dim=0)) for other in kept]
        slot = similar.index(max(similar))
        homes[kept[slot]].append(tokens[place])
        grown[kept[slot]] += max(similar[slot], 0.0) * float(sizes[place])
        source[place] = slot
    tokens = torch.stack([torch.stack(homes[place]).mean(0) for place in kept])
    return tokens, torch.tensor([grown[place] for place in kept]), [source.get(place, -1) for place in range(len(row))]


@torch.no_grad()
@pytest.mark.parametrize("drop_share, merging", [(0.0, 9), (0.5, 4), (1.0, 0)])
def test_diffrate_equals_a_loop_over_tokens(drop_share, merging):
    state = state_of(sizes=torch.randint(1, 6, (3, 16)).float())
    out = create_reducer("diffrate", drop_share=drop_share).reduce(state, 7)
    for image in range(3):
        expected = naive_diffrate(state.tokens[image], state.sizes[image], state.cls_row[image], 7, merging)
        torch.testing.assert_close(out.tokens[image], expected[0], atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(out.sizes[image], expected[1])
        assert out.homes[image].tolist() == expected[2]


@torch.no_grad()
def test_diffrate_takes_its_share_from_the_settings(tower, images):
    tower.set_pruning(reducer="diffrate", drop_share=0.25, drop_counts=(16, 8), locations=(3, 5))
    assert (tower.forward_pruned(images).source == -1).sum(1).tolist() >= [4 + 2] * 4
    tower.set_pruning(drop_share=0.0)
    assert (tower.forward_pruned(images).source >= 0).all()


@torch.no_grad()
@pytest.mark.parametrize("reducer", ["avit", "avit_flipped", "avit_channel"])
def test_avit_sums_a_channel_over_the_layers_so_far(tower, images, reducer):
    tower.set_pruning(reducer=reducer, locations=(4,), drop_counts=(24,), seed=7)
    channel, sign = tower.pruner.reducer.channel, 1 if reducer == "avit_flipped" else -1
    assert (channel == 0) == (reducer != "avit_channel")
    scores = sign * sum(zscored(tower.forward_prefix(images, layer)[:, 1:, channel]) for layer in (2, 3, 4))
    kept = tower.forward_pruned(images).kept
    assert torch.equal(kept, scores.topk(40).indices.sort(dim=1).values)


@torch.no_grad()
def test_avit_goes_on_with_those_that_are_left(tower, images):
    tower.set_pruning(reducer="avit", locations=(2, 3), drop_counts=(24, 10))
    first = zscored(tower.forward_prefix(images, 2)[:, 1:, 0])
    index = (-first).topk(40).indices.sort(dim=1).values
    x = tower.forward_prefix(images, 2)
    x = torch.cat([x[:, :1], x[:, 1:].gather(1, index[..., None].expand(-1, -1, 64))], dim=1)
    later = zscored(tower.blocks[1](x)[:, 1:, 0]) + first.gather(1, index)
    expected = index.gather(1, (-later).topk(30).indices.sort(dim=1).values)
    assert torch.equal(tower.forward_pruned(images).kept, expected)


def test_the_channel_is_drawn_by_the_seed():
    drawn = [create_reducer("avit_channel", embed_dim=64, seed=seed).channel for seed in range(20)]
    assert drawn == [create_reducer("avit_channel", embed_dim=64, seed=seed).channel for seed in range(20)]
    assert len(set(drawn)) > 5 and all(0 < channel < 64 for channel in drawn)


@torch.no_grad()
def test_patches_of_many_different_pixels_stay(tower, images):
    tower.set_pruning(reducer="pixel_variance", locations=(1,), keep_rate=0.5)
    out = tower.forward_pruned(images)
    for image, scores in zip(images, out.scores):
        for place in (0, 9, 63):
            row, column = 8 * (place // 8), 8 * (place % 8)
            variance = image[:, row : row + 8, column : column + 8].flatten().var(unbiased=False)
            torch.testing.assert_close(scores[place], variance)
    assert torch.equal(out.kept, out.scores.argsort(dim=1, descending=True, stable=True)[:, :32])


@torch.no_grad()
def test_the_tokens_that_an_mlp_changed_most_stay(tower, images):
    tower.set_pruning(reducer="mlp_shift", locations=(3,), drop_counts=(24,))
    x, block = tower.forward_prefix(images, 2), tower.blocks[1]
    x = x + block.attn(block.norm1(x))
    shift = block.mlp(block.norm2(x))[:, 1:].norm(dim=-1)
    assert torch.equal(tower.forward_pruned(images).kept, shift.topk(40).indices.sort(dim=1).values)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"reducer": "avit", "locations": (1, 3)}, "'avit' ranks by what earlier layers did, so locations begin at 2"),
        ({"reducer": "mlp_shift", "locations": (1,)}, "leave at 1; try 2 or a later layer"),
        ({"reducer": "evit", "leftovers": "merge"}, "'evit' merges by a rule of its own"),
        ({"reducer": "evit", "locations": (3,), "drop_counts": (63,)}, "63 of 64 patch tokens .* at most 62 at once"),
    ],
)
def test_what_peers_cannot_do_is_refused(tower, settings, message):
    with pytest.raises(UserError, match=message):
        tower.set_pruning(**{"keep_rate": 0.5, **settings})
    assert tower.pruner is None


@pytest.mark.parametrize(
    "needs, site, message",
    [
        (("cls_rows",), "before", "needs 'cls_rows', which no tower gives; did you mean 'cls_row'"),
        ("pixels", "before", r"needs must be a tuple of names; try needs = \('pixels',\)"),
        (("cls_row", "shift"), "mid", "needs 'shift' in mid-block, but the MLP runs only after"),
    ],
)
def test_needs_that_no_tower_gives_are_refused(tower, needs, site, message):
    kind = type("Own", (Reducer,), {"needs": needs, "site": site})
    register_reducer("own")(kind)
    try:
        with pytest.raises(UserError, match=message):
            tower.set_pruning(reducer="own", keep_rate=0.5)
    finally:
        del REDUCERS["own"]


@torch.no_grad()
def test_a_reducer_may_need_several_things_at_once(tower, images):
    seen = {}

    class Curious(Reducer):
        needs = ("pixels", "shift", "sample_key", "cls_row")

        def reduce(self, state, k):
            seen.update({name: getattr(state, name).shape for name in self.needs})
            return state.best(state.cls_row * state.shift, k)

    register_reducer("curious")(Curious)
    try:
        tower.set_pruning(reducer="curious", locations=(3,), keep_rate=0.5)
        tower(images)
    finally:
        del REDUCERS["curious"]
    assert seen == {"pixels": (4, 64, 192), "shift": (4, 64), "sample_key": (4,), "cls_row": (4, 64)}


@torch.no_grad()
def test_a_reducer_of_ones_own_sees_where_patches_went_in_every_forward(tower, images):
    seen = []

    class Reading(REDUCERS["tome"]):
        def reduce(self, state, k):
            seen.append(state.homes.clone())
            return super().reduce(state, k)

    register_reducer("reading")(Reading)
    try:
        tower.set_pruning(reducer="reading", locations=(3, 5), keep_rate=0.5)
        tower(images)
        tower.forward_pruned(images)
    finally:
        del REDUCERS["reading"]
    assert len(seen) == 4 and torch.equal(seen[1], seen[3]) and not torch.equal(seen[0], seen[1])


@torch.no_grad()
@pytest.mark.parametrize(
    "settings",
    [{"reducer": "evit"}, {"reducer": "diffrate"}, {"reducer": "evit_drop", "leftovers": "merge", "metric": "keys"}],
)
def test_peers_never_see_prompts_and_macs_count_them(tower, images, settings):
    tower.set_pruning(locations=(1, 4), drop_counts=(20, 12), cls_only_last=False, **settings)
    tower.set_prompts(Prompts("V", 3, 64, 64))
    out = tower.forward_pruned(images)
    assert out.kept.shape == (4, 32) and 0 <= int(out.kept.min()) <= int(out.kept.max()) < 64
    projecting = 3 * 64 * 64  # of the prompts themselves, once for all images of a call
    assert counted(lambda: tower(images)) == len(images) * tower.macs().image + projecting
