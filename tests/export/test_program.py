"""The graph that goes into a file: the tower's own numbers for any number of images, or a refusal in one line."""

import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from helpers import tiny_open_clip
from helpers.tiny_exports import create_tower, images_of, pair_of
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import parametrizations

from patchrank import prune_open_clip
from patchrank.export.description import describe
from patchrank.export.program import ClassHead, ExportedTower, check_exportable, trace
from patchrank.export.program_file import load, save
from patchrank.layers.prompts import Prompts
from patchrank.layers.pruning import take
from patchrank.layers.reducers import REDUCERS, Reducer
from patchrank.layers.repair import Repair
from patchrank.models.open_clip.pair import from_open_clip
from patchrank.models.repair_files import describe_repair, save_repair
from patchrank.utils.errors import UserError

SMALL = {"depth": 1, "locations": (1,)}


def dropping(tmp_path):
    return pair_of(create_tower("cls_attention"))


def merging(tmp_path):
    return pair_of(create_tower("tome", **SMALL))


def leftovers_merging(tmp_path):
    return pair_of(create_tower("center", leftovers="merge", metric="keys", drop_share=0.25, **SMALL))


def whole(tmp_path):
    return pair_of(create_tower(keep_rate=1.0, **SMALL))


def predicting_with_prompts(tmp_path):
    clip = pair_of(create_tower("predictor", **SMALL))
    clip.visual.set_prompts(Prompts("V", 2, 32, 32))
    return clip


def repaired(tmp_path):
    tower = create_tower("predictor", **SMALL)
    repair = Repair(torch.randn(tower.head.weight.shape), torch.ones(len(tower.head.weight)))
    repair.about = describe_repair(tower, "tiny") | {"images": 60, "ridge": 0.1, "data": []}
    save_repair(repair, tmp_path / "repair.safetensors")
    tower.set_pruning(repair_path=tmp_path / "repair.safetensors")
    return pair_of(tower)


def native(tmp_path):
    model = prune_open_clip(tiny_open_clip.create(layers=1), keep_rate=0.5, reducer="center", locations=(1,))
    return from_open_clip(model, tokenizer=len)


def of_timm(tmp_path):
    model = tiny_open_clip.create("timm", image_size=64)
    return from_open_clip(prune_open_clip(model, keep_rate=0.5, reducer="tome"), tokenizer=len)


LONGER = (dropping, leftovers_merging, whole, predicting_with_prompts, repaired, native, of_timm)
MADE = [merging, *(pytest.param(make, marks=pytest.mark.slow) for make in LONGER)]


def assert_exact(program, module):
    for count in (1, 2, 5):
        images = images_of(module.tower, count)
        assert [x.shape[0] for x in module(images)] == [count] * len(module.outputs)
        for found, expected in zip(program(images), module(images), strict=True):
            assert torch.equal(found, expected)


@torch.no_grad()
@pytest.mark.parametrize("make", MADE)
def test_a_graph_gives_the_towers_numbers_for_any_number_of_images(make, tmp_path):
    clip = make(tmp_path)
    check_exportable(clip.visual, for_onnx=True)
    module = ExportedTower(clip).eval()
    assert_exact(trace(module, False).module(check_guards=False), module)
    images = images_of(clip.visual)
    found = dict(zip(module.outputs, module(images), strict=True))
    assert torch.equal(found["embedding"], clip.encode_image(images))
    if "kept" in found:
        assert torch.equal(found["kept"], clip.visual.forward_pruned(images).kept)
    assert ("kept" in found) == (make is not whole)


@torch.no_grad()
def test_pixels_are_normalised_and_classes_told_inside():
    clip, vectors = pair_of(create_tower("center", **SMALL)), F.normalize(torch.randn(3, 128), dim=-1)
    module = ExportedTower(clip, ClassHead(vectors[:, : clip.visual.num_classes], 20.0), uint8=True).eval()
    assert module.outputs == ["probabilities", "embedding", "kept"] and module.example().dtype == torch.uint8
    pixels = torch.randint(0, 256, (3, 32, 32, 3), dtype=torch.uint8)
    probabilities, embedding, _ = module(pixels)
    images = clip.normalize(pixels.permute(0, 3, 1, 2).float() / 255)
    torch.testing.assert_close(embedding, clip.encode_image(images), atol=1e-6, rtol=0)
    expected = (20 * embedding @ vectors[:, : embedding.shape[1]].T).softmax(1)
    torch.testing.assert_close(probabilities, expected, atol=1e-6, rtol=0)


class Lora(nn.Module):
    def __init__(self, base):
        super().__init__()
        self.base = base
        self.down, self.up = nn.Linear(base.in_features, 2), nn.Linear(2, base.out_features)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


def with_lora(tower):
    tower.blocks[1].mlp.fc1 = Lora(tower.blocks[1].mlp.fc1)


def with_own_forward(tower):
    tower.blocks[0].forward = tower.blocks[0].forward


CHANGED = "has hooks or is a layer of another library .LoRA, quantised.* try to merge LoRA .*, or to remove hooks"
REFUSED = {
    "hook": (lambda tower: tower.blocks[1].register_forward_hook(print), f"blocks.1 .Block. {CHANGED}"),
    "hook before": (lambda tower: tower.norm_pre.register_forward_pre_hook(print), f"norm_pre .LayerNorm. {CHANGED}"),
    "hook on the tower": (
        lambda tower: tower.register_forward_hook(print),
        f"the tower .*Transformer. {CHANGED}",
    ),
    "hook on the ranker": (
        lambda tower: tower.pruner.reducer.predictor.register_forward_hook(print),
        f"pruner.reducer.predictor .MixMlp. {CHANGED}",
    ),
    "forward": (with_own_forward, f"blocks.0 .Block. {CHANGED}"),
    "lora": (with_lora, f"blocks.1.mlp.fc1 .Lora. {CHANGED}"),
    "parametrised": (
        lambda tower: parametrizations.weight_norm(tower.blocks[0].attn.qkv),
        f"blocks.0.attn.qkv .ParametrizedLinear. {CHANGED}",
    ),
    "half": (lambda tower: tower.half(), "the tower has weights in torch.float16; try tower.float.. before exporting"),
    "partly half": (lambda tower: tower.norm.bfloat16(), "the tower has weights in torch.bfloat16; try tower.float"),
    "training": (lambda tower: tower.train(), "the tower is in training mode; try tower.eval.. before exporting"),
}


@pytest.mark.parametrize("change", REFUSED)
def test_what_a_file_would_not_be_true_to_is_refused_in_one_line(change):
    tower = create_tower("predictor")
    check_exportable(tower, for_onnx=True)
    make, told = REFUSED[change]
    make(tower)
    with pytest.raises(UserError, match=f"^{told}") as caught:
        check_exportable(tower, for_onnx=False)
    assert "\n" not in str(caught.value)


def test_hooks_on_all_modules_are_refused():
    handle = register_module_forward_hook(lambda *args: None)
    try:
        with pytest.raises(UserError, match="^hooks hang on all modules, which a file would not have; try to"):
            check_exportable(create_tower(), for_onnx=False)
    finally:
        handle.remove()
    check_exportable(create_tower(), for_onnx=False)


@pytest.mark.parametrize(
    "reducer, for_onnx, told",
    [
        ("golden", True, "reducer 'golden' ranks by scores from outside, which a file has not; try predictor"),
        ("golden", False, "reducer 'golden' ranks by scores from outside, which a file has not; try predictor"),
        ("random", True, "reducer 'random' reads the bits of pixels, which ONNX cannot; try --format pt2, or center"),
    ],
)
def test_reducers_that_no_file_can_have_are_refused(reducer, for_onnx, told):
    with pytest.raises(UserError, match=f"^{told}$"):
        check_exportable(create_tower(reducer), for_onnx)


def test_random_goes_into_a_program():
    check_exportable(create_tower("random"), for_onnx=False)


class OwnRanking(Reducer):
    """With masks, sums over letters and its gradient switched off, as people write it."""

    @torch.no_grad()
    def score(self, state):
        scores = torch.einsum("bnd,bd->bn", state.tokens, state.cls)
        ends = (scores > 3) & (state.index > 2) | ~(scores < 9)
        return torch.where(ends, scores.abs(), scores)


class OwnTopk(Reducer):
    def reduce(self, state, k):
        kept = state.tokens.norm(dim=-1).topk(k, sorted=False).indices
        return replace(state, tokens=take(state.tokens, kept), index=take(state.index, kept))


class OwnCounts(Reducer):
    """Counts that depend on the image."""

    def reduce(self, state, k):
        kept = (state.tokens[0].norm(dim=-1) > 5).nonzero().flatten()
        return replace(state, tokens=state.tokens[:, kept], index=state.index[:, kept])


class OwnBranch(Reducer):
    def score(self, state):
        return state.tokens.norm(dim=-1) if state.tokens.sum() > 0 else -state.tokens.norm(dim=-1)


@pytest.fixture
def own(request, monkeypatch):
    """A reducer that is registered for one test: others run all that there are."""
    monkeypatch.setitem(REDUCERS, "own", request.param)
    return create_tower("own", **SMALL)


@torch.no_grad()
@pytest.mark.parametrize("own", [OwnRanking, pytest.param(OwnTopk, marks=pytest.mark.slow)], indirect=True)
def test_a_reducer_of_somebodys_own_goes_to_a_file_and_back(own, tmp_path):
    module = ExportedTower(pair_of(own)).eval()
    check_exportable(module.tower, for_onnx=True)
    content = save(trace(module, False), json.dumps(describe(pair_of(own), module, "pt2")))
    assert __file__.rpartition("/tests/")[0].encode() not in content  # nor does it tell where somebody's code lies
    (tmp_path / "own.pt2").write_bytes(content)
    assert_exact(load(str(tmp_path / "own.pt2")), module)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("own", [OwnCounts, OwnBranch], indirect=True)
def test_a_reducer_whose_counts_depend_on_data_is_refused_by_its_name(own):
    with pytest.raises(UserError, match="^reducer 'own' cannot be traced to a graph of constant sizes") as caught:
        trace(ExportedTower(pair_of(own)).eval(), False)
    assert "\n" not in str(caught.value)
