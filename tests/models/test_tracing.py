"""Tools that trace a tower, or collect what its modules give, see all blocks of a pruned one too."""

import pytest
import timm
import torch
from timm.layers import create_feature_extractor, get_graph_node_names
from timm.models.vision_transformer import VisionTransformer
from timm.utils.attention_extract import AttentionExtract
from torchvision.models import feature_extraction

from patchrank.layers.prompts import Prompts
from patchrank.layers.reducers import REDUCERS, sample_keys
from patchrank.utils.errors import UserError

OWN = sorted(set(REDUCERS) - {"golden"})  # golden has no scores of its own
MERGING = [name for name in OWN if REDUCERS[name].merges]
LEAVING = [(name, "drop") for name in OWN if name not in MERGING] + [(name, None) for name in MERGING]
RULES = [(name, "drop") for name in ("random", "cls_attention", "predictor", "pixel_variance", "avit")]  # one each
RULES += [("guided_merge", None), ("evit", None), ("diffrate", None), ("center", "merge")]
LEAVING += [("center", "merge"), ("cls_attention", "merge"), ("evit_drop", "merge")]
EXAMPLES = [("predictor", "drop"), ("diffrate", None), ("center", "merge")]


def with_slow(cases, *more):
    """All that are no examples are slow; `more` stands behind each."""
    return [pytest.param(*case, *more, marks=[pytest.mark.slow] if case not in EXAMPLES else []) for case in cases]


def make(reducer="center", locations=(2, 3), keep_rate=0.5, **settings):
    torch.manual_seed(0)
    shape = {"depth": 3, "embed_dim": 32, "num_heads": 2, "reducer": reducer, "predictor_init": "random"}
    shape |= {"locations": locations, "keep_rate": keep_rate, **settings}
    tower = timm.create_model("patchrank_clip_digits", **shape).eval()
    for block in tower.blocks:
        block.attn.fused_attn = False  # so that there is a softmax to be seen, as timm asks for
    return tower


@torch.no_grad()
@pytest.mark.parametrize(
    "reducer, leftovers, locations", [*with_slow(LEAVING, (2, 3)), ("cls_attention", "drop", (1, 3))]
)
def test_attention_of_every_block_is_extracted_by_graph_and_by_hooks(reducer, leftovers, locations, images):
    tower = make(reducer, locations, leftovers=leftovers)
    expected = tower(images)
    graph = AttentionExtract(make(reducer, locations, leftovers=leftovers), method="fx")(images)
    hooks = AttentionExtract(tower, method="hook")(images)
    lengths = [65, 49, 33] if locations == (2, 3) else [49, 49, 33]
    lengths = [65, 65, 49] if REDUCERS[reducer].site == "mid" else lengths
    assert [found.shape for found in hooks.values()] == [(4, 2, length, length) for length in lengths]
    torch.testing.assert_close(list(graph.values()), list(hooks.values()), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(tower(images), expected, atol=1e-6, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("tool", [create_feature_extractor, feature_extraction.create_feature_extractor])
@pytest.mark.parametrize("reducer", ["center", "cls_attention"])
def test_feature_extractors_give_what_hooks_see(tool, reducer, images):
    tower, seen = make(reducer), {}
    graph = tool(make(reducer), [f"blocks.{n}" for n in range(3)] + ["head"])
    for name in ("blocks.0", "blocks.1", "blocks.2", "head"):
        tower.get_submodule(name).register_forward_hook(lambda m, args, output, name=name: seen.update({name: output}))
    for batch in (images, images[:1]):  # graphs take batches of any size
        tower(batch)
        torch.testing.assert_close(dict(graph(batch)), seen, atol=1e-6, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("reducer, leftovers", with_slow(RULES))
def test_graphs_of_torch_fx_and_torch_jit_compute_what_the_tower_does(reducer, leftovers, images):
    tower = make(reducer, leftovers=leftovers, cls_only_last=False)
    graphs = [torch.fx.symbolic_trace(tower)]
    with pytest.warns(Warning):  # torch.jit is deprecated, and tells of every shape that it takes for fixed
        graphs.append(torch.jit.trace(tower, images))
    for graph in graphs:
        for batch in (images, images.flip(0), images[:2]):
            torch.testing.assert_close(graph(batch), tower(batch), atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_a_whole_tower_has_the_graph_of_timms_own():
    ours = make(keep_rate=1.0)
    act = type(ours.blocks[0].mlp.act)
    theirs = VisionTransformer(
        img_size=64, patch_size=8, depth=3, embed_dim=32, num_heads=2, pre_norm=True, act_layer=act
    )
    for block in theirs.blocks:
        block.attn.fused_attn = False
    assert get_graph_node_names(ours)[1] == get_graph_node_names(theirs.eval())[1]


def test_masks_and_prompts_are_named_not_left_out(images):
    tower = make()
    graph = torch.fx.symbolic_trace(tower)
    with pytest.raises(UserError, match="attention masks do not go together with pruning"):
        graph(images, is_causal=True)
    tower.set_prompts(Prompts("V", 2, 32, 32))
    with pytest.raises(UserError, match="torch.fx cannot follow learned prompts, .* set_prompts"):
        torch.fx.symbolic_trace(tower)


def test_keys_of_samples_are_made_of_their_bits():
    images = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    # as ever, since records that were made before must come out alike
    assert sample_keys(images).tolist() == [-5107073144398185743, 8276398397889722198]
