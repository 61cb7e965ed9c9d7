import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from patchrank.layers.predictors import (
    PREDICTORS,
    Prior,
    check_location,
    create_predictor,
    load_predictor,
    register_predictor,
    save_predictor,
)
from patchrank.layers.predictors.transformer import num_heads
from patchrank.models.pretrained import WEIGHTS
from patchrank.utils.errors import UserError

GRID, WIDTH, N = (4, 4), 24, 16
SETTINGS = [
    ("mix_mlp", {}),
    ("mix_mlp", {"dim": 24}),
    ("mix_mlp", {"dim": 8, "head": "mean"}),
    ("mlp", {}),
    ("mlp", {"dim": 24}),
    ("transformer", {}),
    ("transformer", {"dim": 24}),
    ("transformer", {"dim": 32, "head": "mean"}),
    ("prior", {}),
]


@pytest.fixture
def tokens():
    rng = torch.Generator().manual_seed(0)
    return torch.randn(3, WIDTH, generator=rng), torch.randn(3, N, WIDTH, generator=rng)


def about(name: str, kwargs: dict) -> dict:
    said = {"name": name, "kwargs": kwargs, "grid": list(GRID), "embed_dim": WIDTH, "location": 4}
    return said | {"metric": "preservation", "model": {"name": "m", "sha256": "0"}}


def test_every_registered_predictor_is_tested_here():
    assert {name for name, _ in SETTINGS} == set(PREDICTORS)


@torch.no_grad()
@pytest.mark.parametrize("name, kwargs", SETTINGS)
def test_one_score_per_patch_whatever_else_is_in_the_batch(tokens, name, kwargs):
    predictor = create_predictor(name, WIDTH, GRID, **kwargs).eval()
    scores = predictor(*tokens)
    assert scores.shape == (3, N)
    alone = torch.cat([predictor(cls[None], patches[None]) for cls, patches in zip(*tokens)])
    torch.testing.assert_close(alone, scores, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name, kwargs", SETTINGS)
def test_macs_are_what_torch_counts(tokens, name, kwargs):
    predictor = create_predictor(name, WIDTH, GRID, **kwargs)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        predictor(*tokens)
    assert counter.get_total_flops() // 2 == len(tokens[0]) * predictor.num_macs()


@torch.no_grad()
@pytest.mark.parametrize("name, kwargs", SETTINGS)
def test_files_give_back_what_was_saved(tokens, tmp_path, name, kwargs):
    predictor = create_predictor(name, WIDTH, GRID, **kwargs).eval()
    save_predictor(predictor, tmp_path / "p.safetensors", about(name, kwargs))
    back, said = load_predictor(tmp_path / "p.safetensors")
    assert torch.equal(back(*tokens), predictor(*tokens))
    assert said["name"] == name and not back.training


@pytest.mark.parametrize("name, kwargs", [case for case in SETTINGS if case[0] != "prior"])
def test_gradients_reach_every_parameter(tokens, name, kwargs):
    predictor = create_predictor(name, WIDTH, GRID, **kwargs)
    predictor(*tokens).square().sum().backward()
    assert [key for key, parameter in predictor.named_parameters() if parameter.grad is None] == []


def test_only_predictors_that_read_the_class_token_depend_on_it(tokens):
    cls, patches = tokens
    for name, kind in PREDICTORS.items():
        predictor = create_predictor(name, WIDTH, GRID).eval()
        scores = predictor(cls, patches)
        assert torch.equal(predictor(cls + 1, patches), scores) is not getattr(kind, "reads_cls", False)
        if getattr(kind, "reads_cls", False):
            assert torch.equal(predictor(cls, patches + 1), scores)


@torch.no_grad()
def test_the_shipped_file_scores_by_eq_5_to_7():
    predictor, said = load_predictor(WEIGHTS / "patchrank_clip_digits.predictor.safetensors")
    assert said["name"] == "mix_mlp" and said["kwargs"]["dim"] == 16
    parts = ("narrow", "channel_mixing.0", "channel_mixing.1", "token_mixing.0", "token_mixing.1", "head")
    assert set(predictor.state_dict()) == {f"{part}.{kind}" for part in parts for kind in ("weight", "bias")}
    patches = torch.randn(2, 64, 64, generator=torch.Generator().manual_seed(3))
    x = predictor.narrow(patches)
    x = x + predictor.channel_mixing[2](predictor.channel_mixing[1](predictor.channel_mixing[0](x)))
    x = x.transpose(1, 2)
    x = x + predictor.token_mixing[2](predictor.token_mixing[1](predictor.token_mixing[0](x)))
    expected = (x.transpose(1, 2) @ predictor.head.weight[0]) + predictor.head.bias
    torch.testing.assert_close(predictor(None, patches), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dim, heads", [(768, 12), (64, 4), (128, 8), (192, 12), (24, 1), (32, 2), (1, 1)])
def test_heads_divide_the_channels_and_are_no_thinner_than_16(dim, heads):
    assert num_heads(dim) == heads


@pytest.mark.parametrize(
    "name, dim, gmacs", [("mix_mlp", 64, 0.0129), ("mix_mlp", 768, 0.145), ("transformer", 768, 1.45)]
)
def test_cost_at_b16(name, dim, gmacs):
    with torch.device("meta"):
        assert create_predictor(name, 768, (14, 14), dim=dim).num_macs() / 1e9 == pytest.approx(gmacs, rel=5e-3)


@torch.no_grad()
def test_a_prior_is_one_ranking_for_all_images(tokens):
    golden = np.arange(N, dtype=np.float64)[::-1].copy()
    prior = Prior.from_scores(golden, WIDTH, GRID)
    assert prior(*tokens).tolist() == [golden.tolist()] * 3
    assert list(prior.parameters()) == [] and prior.num_macs() == 0
    with pytest.raises(UserError, match="needs 16 scores"):
        Prior.from_scores(golden[:4], WIDTH, GRID)


def test_the_class_token_alone_cannot_rank_the_input():
    with pytest.raises(UserError, match="seen no image before layer 1.*mix_mlp, prior, transformer"):
        check_location("mlp", 1)
    check_location("mlp", 2)
    check_location("mix_mlp", 1)


@pytest.mark.parametrize(
    "name, kwargs, message",
    [
        ("mixmlp", {}, "predictor 'mixmlp' is not registered; did you mean 'mix_mlp'"),
        ("transfomer", {}, "did you mean 'transformer'"),
        ("mix_mlp", {"head": "lineer"}, "head of mix_mlp must be .* did you mean 'linear'"),
        ("transformer", {"head": "men"}, "head of transformer must be .* did you mean 'mean'"),
        ("mlp", {"head": "lineer"}, "head of mlp must be 'linear', but is 'lineer'"),
        ("mlp", {"head": "mean"}, "no channels to average"),
        ("prior", {"dim": 8}, "predictor 'prior' .*unexpected keyword argument 'dim'; its settings: none"),
        ("mix_mlp", {"width": 8}, "unexpected keyword argument 'width'; its settings: dim, head"),
    ],
)
def test_what_cannot_be_built_is_answered_with_what_can(name, kwargs, message):
    with pytest.raises(UserError, match=message):
        create_predictor(name, WIDTH, GRID, **kwargs)


def test_files_of_unknown_or_other_predictors_are_refused_by_name(tmp_path):
    path = tmp_path / "p.safetensors"
    for said in (about("mixmlp", {}), about("prior", {"dim": 8}), about("mlp", {})):
        save_predictor(create_predictor("mix_mlp", WIDTH, GRID), path, said)
        with pytest.raises(UserError, match="p.safetensors: weights and metadata do not fit together"):
            load_predictor(path)


def test_a_registered_predictor_is_built_by_name():
    @register_predictor("mine")
    class Mine(torch.nn.Module):
        def __init__(self, embed_dim, grid_size, **kwargs):
            super().__init__()
            self.kwargs = kwargs

    try:
        assert create_predictor("mine", WIDTH, GRID, dim=3).kwargs == {"dim": 3}
        check_location("mine", 1)
    finally:
        del PREDICTORS["mine"]
