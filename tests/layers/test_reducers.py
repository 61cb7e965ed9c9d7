"""Every reducer keeps the same contract; those with a rule of their own are held against it by hand."""

import pytest
import timm
import torch
from timm.layers import Attention
from torch import nn

from patchrank.layers import pruning_block
from patchrank.layers.block_parts import run_block
from patchrank.layers.class_token import cls_row
from patchrank.layers.predictors import Prior, create_predictor, save_predictor
from patchrank.layers.pruning import rank
from patchrank.layers.reducers import REDUCERS, TokenState, create_reducer
from patchrank.utils.errors import UserError

ALL = sorted(REDUCERS)
MERGING = sorted(name for name in REDUCERS if REDUCERS[name].merges)  # tests/layers/test_matching.py has more of them
RANKERS = sorted(name for name in set(ALL) - set(MERGING) if REDUCERS[name].site == "before")
OWN = sorted(set(RANKERS) - {"golden"})  # golden has no scores of its own
FITTED = ["predictor", "prior"]
LOCATIONS = [(4, 6, 8, 10), (1, 3), (12,)]


def prune(tower, reducer, **settings):
    """Prunes by a reducer, as early as it can; fitted ones rank by something that is no tie."""
    torch.manual_seed(4)
    first = REDUCERS[reducer].first_location
    settings |= {"locations": tuple(max(first, layer) for layer in settings.get("locations", (4, 6, 8, 10)))}
    given = (
        {"predictor": create_predictor("mix_mlp", 64, (8, 8))}
        if REDUCERS[reducer].fitted and reducer != "prior"
        else {}
    )
    given |= {"predictor": Prior.from_scores(torch.randn(64), 64, (8, 8))} if reducer == "prior" else {}
    tower.set_pruning(reducer=reducer, **given, **{"keep_rate": 0.5, **settings})


def full_attention(block, x):
    """The row (B, L) of the class token from the explicit matrix."""
    attn, (batch, length, _) = block.attn, x.shape
    q, k, _ = attn.qkv(block.norm1(x)).view(batch, length, 3, attn.num_heads, -1).permute(2, 0, 3, 1, 4)
    return (q @ k.transpose(-2, -1) / attn.head_dim**0.5).softmax(-1).mean(1)[:, 0]


@torch.no_grad()
@pytest.mark.parametrize("reducer", ALL)
def test_keep_rate_1_is_the_plain_tower_bit_for_bit(tower, images, reducer):
    expected = tower(images)
    tower.set_pruning(reducer=reducer, keep_rate=1.0)
    assert torch.equal(tower(images), expected)


@torch.no_grad()
@pytest.mark.parametrize("reducer", RANKERS)
@pytest.mark.parametrize("locations", LOCATIONS)
def test_external_scores_win_over_any_reducer(tower, images, reducer, locations):
    scores = torch.randn(4, 64, generator=torch.Generator().manual_seed(2))
    prune(tower, reducer, locations=locations)
    out = tower.forward_pruned(images, scores)
    assert torch.equal(out.kept, rank(scores)[:, :32])
    assert torch.equal(out.scores, scores)


@torch.no_grad()
@pytest.mark.parametrize("reducer", OWN)
@pytest.mark.parametrize("locations", LOCATIONS)
def test_as_many_places_of_the_grid_are_kept_as_were_asked_for(tower, images, reducer, locations):
    prune(tower, reducer, keep_rate=0.4, locations=locations)
    out = tower.forward_pruned(images)
    assert out.kept.shape == (4, 26)
    assert all(len(set(kept)) == 26 and set(kept) <= set(range(64)) for kept in out.kept.tolist())
    assert out.scores is None or out.scores.shape == (4, 64)
    torch.testing.assert_close(tower(images), out.embedding, atol=1e-6, rtol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("reducer", OWN)
@pytest.mark.parametrize("locations", LOCATIONS)
def test_batching_changes_nothing(tower, images, reducer, locations):
    prune(tower, reducer, locations=locations)
    together = tower.forward_pruned(images)
    alone = [tower.forward_pruned(image[None]) for image in images]
    assert torch.equal(torch.cat([out.kept for out in alone]), together.kept)
    torch.testing.assert_close(torch.cat([out.embedding for out in alone]), together.embedding, atol=1e-6, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("reducer", OWN)
@pytest.mark.parametrize("locations", LOCATIONS)
def test_features_and_head_agree_with_forward(tower, images, reducer, locations):
    prune(tower, reducer, locations=locations)
    features = tower.forward_features(images)
    assert (features[:, 1:].abs().sum(-1) == 0).sum(-1).tolist() == [32] * 4
    torch.testing.assert_close(tower.forward_head(features), tower(images), atol=1e-6, rtol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("reducer", OWN)
def test_what_a_reducer_keeps_is_what_the_tower_computes_on(tower, images, reducer):
    """The oracle: the same tokens, kept by mask instead of by leaving, give the same embedding."""
    prune(tower, reducer, locations=(5,))
    out = tower.forward_pruned(images)
    alone = tower.forward_prefix(images, 5)
    alone = torch.cat([alone[:, :1], alone[:, 1:].gather(1, out.kept[..., None].expand(-1, -1, 64))], dim=1)
    torch.testing.assert_close(tower.forward_suffix(alone, 5), out.embedding, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    "reducer, leftovers", [*((name, None) for name in (*OWN, *MERGING)), ("predictor", "merge"), ("evit_drop", "merge")]
)
def test_gradients_pass_and_checkpointing_changes_nothing(tower, images, reducer, leftovers):
    prune(tower, reducer, leftovers=leftovers)
    grads = []
    for checkpointing in (False, True):
        tower.set_grad_checkpointing(checkpointing)
        tower.zero_grad()
        tower.train()(images).sum().backward()
        grads.append([p.grad for name, p in tower.named_parameters() if not name.startswith("pruner.")])
    assert all(grad is not None for grad in grads[0])
    for one, two in zip(*grads):
        torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-4)


@pytest.mark.slow
def test_exported_shapes_are_static(tower, images):
    prune(tower, "cls_attention", locations=(1, 6))
    exported = torch.export.export(tower, (images,))
    torch.testing.assert_close(exported.module()(images), tower(images), atol=1e-6, rtol=1e-5)


def check_compiled(images, reducer, backend):
    torch.manual_seed(0)
    locations = (REDUCERS[reducer].first_location, 3)
    settings = dict(depth=3, keep_rate=0.5, locations=locations, reducer=reducer, predictor_init="random")
    tower = timm.create_model("patchrank_clip_digits", **settings).eval()
    torch.compiler.reset()  # other towers were compiled in this process, and torch counts them all
    compiled = torch.compile(tower, fullgraph=True, backend=backend)
    torch.testing.assert_close(compiled(images), tower(images), atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize(
    "reducer",
    ["predictor"] + [pytest.param(name, marks=pytest.mark.slow) for name in sorted(set(OWN) - {"predictor"})],
)
def test_dynamo_sees_one_graph(images, reducer):
    check_compiled(images, reducer, "eager")


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("reducer", ["center", "cls_attention"])
def test_compiled_in_one_graph(images, reducer):
    check_compiled(images, reducer, "inductor")


@torch.no_grad()
@pytest.mark.parametrize("fused", [True, False])
def test_a_block_that_tells_its_row_computes_what_it_always_did(tower, fused):
    block, x = tower.blocks[3], torch.randn(3, 65, 64, generator=torch.Generator().manual_seed(5))
    block.attn.fused_attn = fused
    out, seen = run_block(block, x, wanted=["cls_row"])
    row = seen.cls_row
    torch.testing.assert_close(out, block(x), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(row, full_attention(block, x), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(cls_row(block, x), row, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(row.sum(-1), torch.ones(3))


@torch.no_grad()
@pytest.mark.parametrize("location", [1, 2, 4, 12])
def test_cls_attention_keeps_the_top_of_a_row_made_by_hand(tower, images, location):
    prune(tower, "cls_attention", locations=(location,))
    source = max(location - 1, 1)  # layer 1 has no layer before it and lends its own row
    row = full_attention(tower.blocks[source - 1], tower.forward_prefix(images, source))[:, 1:]
    out = tower.forward_pruned(images)
    assert torch.equal(out.kept, row.topk(32).indices.sort().values)
    assert out.scores is None


@torch.no_grad()
def test_cls_attention_ranks_anew_at_every_location(tower, images):
    """By hand, with plain blocks and a whole matrix: 32 tokens go before layer 3, 16 more before layer 6."""
    prune(tower, "cls_attention", drop_counts=(32, 16), locations=(3, 6))
    x, places = tower.embed(images), torch.arange(64).expand(4, -1)
    for layer, block in enumerate(tower.blocks, 1):
        row, x = full_attention(block, x)[:, 1:], block(x)
        if layer + 1 in (3, 6):
            kept = row.topk({3: 32, 6: 16}[layer + 1]).indices
            places = places.gather(1, kept)
            x = torch.cat([x[:, :1], x[:, 1:].gather(1, kept[..., None].expand(-1, -1, 64))], dim=1)
    out = tower.forward_pruned(images)
    assert torch.equal(out.kept, places.sort().values)
    torch.testing.assert_close(out.embedding, tower.forward_head(tower.norm(x)), atol=1e-6, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("reducer", OWN)
def test_half_precision_keeps_the_contract(tower, images, reducer):
    prune(tower, reducer)
    out = tower.bfloat16().forward_pruned(images.bfloat16())
    assert out.embedding.dtype == torch.bfloat16 and out.kept.shape == (4, 32)


@torch.no_grad()
def test_rows_are_made_only_where_they_decide(tower, images, monkeypatch):
    made = []

    def run(block, x, bias=None, wanted=(), middle=None):
        if wanted:
            made.append(list(tower.blocks).index(block) + 1)
        return run_block(block, x, bias, wanted, middle)

    monkeypatch.setattr(pruning_block, "run_block", run)
    prune(tower, "cls_attention", locations=(4, 6, 8, 10))
    tower(images)
    assert made == [3, 5, 7, 9]
    tower.forward_pruned(images, torch.randn(4, 64))
    prune(tower, "center")
    tower(images)
    assert made == [3, 5, 7, 9]


def test_among_ties_the_lower_place_stays_at_every_location():
    state = TokenState(torch.zeros(1, 4, 2), torch.arange(4)[None], torch.zeros(1, 2))
    reducer = create_reducer("cls_attention")
    state = reducer.reduce(TokenState(**{**vars(state), "cls_row": torch.tensor([[0.1, 0.2, 0.3, 0.3]])}), 3)
    assert state.index.tolist() == [[1, 2, 3]] and state.cls_row.tolist() == [pytest.approx([0.2, 0.3, 0.3])]
    state = reducer.reduce(TokenState(**{**vars(state), "cls_row": torch.tensor([[0.1, 0.1, 0.1]])}), 2)
    assert state.index.tolist() == [[1, 2]]


def test_class_attention_needs_timms_attention(tower, images):
    class Other(Attention):
        def forward(self, x, attn_mask=None, is_causal=False):
            return super().forward(x.roll(1, 1), attn_mask, is_causal)

    tower.blocks[4].attn.__class__ = Other
    prune(tower, "cls_attention", locations=(4, 8))  # rows of layers 3 and 7: layer 5 may be anything
    tower(images)
    with pytest.raises(UserError, match="timm's own `Attention`, but layer 5 has Other"):
        prune(tower, "cls_attention", locations=(6,))
    tower.blocks[6].attn = nn.Identity()  # after the fact
    with pytest.raises(UserError, match="layer 7 has Identity: choose another reducer"):
        tower(images)
    bare = timm.create_model("patchrank_clip_digits", class_token=False, global_pool="")
    with pytest.raises(UserError, match="this tower has no class token"):
        prune(bare, "cls_attention")


@torch.no_grad()
def test_center_keeps_what_lies_nearest_and_the_lower_index_among_equals(tower, images):
    prune(tower, "center", drop_counts=(60,), locations=(4,))
    assert tower.forward_pruned(images).kept.tolist() == [[27, 28, 35, 36]] * 4
    reducer = create_reducer("center", grid_size=(3, 2))
    state = TokenState(torch.zeros(1, 6, 2), torch.arange(6)[None], torch.zeros(1, 2))
    assert reducer.score(state).tolist() == [[-1.25, -1.25, -0.25, -0.25, -1.25, -1.25]]
    assert reducer.reduce(state, 3).index.tolist() == [[2, 3, 0]]


@torch.no_grad()
def test_prior_ranks_every_image_alike(tower, images):
    scores = torch.randn(64, generator=torch.Generator().manual_seed(6))
    tower.set_pruning(keep_rate=0.25, reducer="prior", predictor=Prior.from_scores(scores, 64, (8, 8)))
    assert torch.equal(tower.forward_pruned(images).kept, rank(scores)[:16].expand(4, -1))


def write(path, tower, predictor, name):
    about = {"name": name, "kwargs": {}, "grid": [8, 8], "embed_dim": 64, "location": 4}
    about |= {"metric": "preservation", "model": {"name": "m", "sha256": tower.blocks_sha256()}}
    save_predictor(predictor, path, about)
    return path


@torch.no_grad()
def test_fitted_reducers_read_their_files_and_prior_reads_priors_alone(tower, images, tmp_path):
    fitted = Prior.from_scores(torch.randn(64), 64, (8, 8))
    prior = write(tmp_path / "prior.safetensors", tower, fitted, "prior")
    mixed = write(tmp_path / "mixed.safetensors", tower, create_predictor("mix_mlp", 64, (8, 8)), "mix_mlp")
    tower.set_pruning(keep_rate=0.5, reducer="prior", predictor_path=prior)
    kept = tower.forward_pruned(images).kept
    assert tower.pruner.reducer.about["name"] == "prior"
    with pytest.raises(UserError, match="mixed.safetensors is a fitted 'mix_mlp', but reducer 'prior' ranks by"):
        tower.set_pruning(predictor_path=mixed)
    tower.set_pruning(reducer="predictor")  # the prior's file serves the reducer that takes any
    assert torch.equal(tower.forward_pruned(images).kept, kept)
    tower.set_pruning(predictor_path=mixed)
    assert not torch.equal(tower.forward_pruned(images).kept, kept)


def test_a_file_that_reads_the_class_token_alone_is_refused_at_location_1(tower, tmp_path):
    about = {"name": "mlp", "kwargs": {}, "grid": [8, 8], "embed_dim": 64, "location": 1}
    about |= {"metric": "preservation", "model": {"name": "m", "sha256": tower.blocks_sha256()}}
    save_predictor(create_predictor("mlp", 64, (8, 8)), tmp_path / "p.safetensors", about)
    with pytest.raises(UserError, match="seen no image before layer 1"):
        tower.set_pruning(keep_rate=0.5, locations=(1,), predictor_path=tmp_path / "p.safetensors")


@pytest.mark.parametrize("reducer", FITTED)
def test_fitted_reducers_want_weights_or_the_word_that_none_are_meant(tower, images, reducer):
    with pytest.raises(UserError, match=f"reducer '{reducer}' has no weights .* center, cls_attention"):
        tower.set_pruning(keep_rate=0.5, reducer=reducer)
    tower.set_pruning(keep_rate=0.5, reducer=reducer, predictor_init="random")
    assert tower.forward_pruned(images).kept.shape == (4, 32)


@pytest.mark.parametrize("reducer", FITTED)
def test_a_module_goes_on_until_its_first_location_or_reducer_changes(tower, reducer):
    prune(tower, reducer)
    mine = tower.pruner.reducer.predictor
    tower.set_pruning(keep_rate=0.25, locations=(4, 5), reducer=reducer)
    assert tower.pruner.reducer.predictor is mine and type(tower.pruner.reducer) is REDUCERS[reducer]
    other = next(name for name in FITTED if name != reducer)
    for changes in ({"locations": (5, 6)}, {"reducer": other}):
        with pytest.raises(UserError, match="no weights to rank by"):
            tower.set_pruning(**changes)
    assert tower.pruner.reducer.predictor is mine


def test_a_module_needs_a_reducer_that_ranks_by_it(tower):
    mine = create_predictor("mix_mlp", 64, (8, 8))
    with pytest.raises(UserError, match="reducer 'center' takes no predictor; .* needs .*predictor or prior"):
        tower.set_pruning(keep_rate=0.5, reducer="center", predictor=mine)
    with pytest.raises(UserError, match="reducer 'prior' ranks by a fitted 'prior', but was given a MixMlp"):
        tower.set_pruning(keep_rate=0.5, reducer="prior", predictor=mine)
    with pytest.raises(UserError, match="did you mean 'prior'"):
        tower.set_pruning(keep_rate=0.5, reducer="priro", predictor=mine)
    tower.set_pruning(keep_rate=0.5, reducer="center")
    tower.set_pruning(predictor=mine)
    assert tower.pruning.reducer == "predictor" and tower.pruner.reducer.predictor is mine


@pytest.mark.parametrize("wrong, right", [("cls_atention", "cls_attention"), ("centre", "center"), ("priors", "prior")])
def test_unknown_names_are_answered_with_near_ones(tower, wrong, right):
    with pytest.raises(UserError, match=f"did you mean '{right}'"):
        tower.set_pruning(keep_rate=0.5, reducer=wrong)
    with pytest.raises(UserError, match=f"did you mean '{right}'"):
        create_reducer(wrong)
