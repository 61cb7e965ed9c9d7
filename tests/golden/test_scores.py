import copy

import pytest
import torch
import torch.nn.functional as F
from helpers.learned_tokens import create

from patchrank.data.dataset_factory import load_split
from patchrank.golden.scores import score_images
from patchrank.layers import pruning
from patchrank.utils.errors import UserError

HEAD = F.normalize(torch.randn(10, 64, generator=torch.Generator().manual_seed(3)), dim=-1)
LABELS = torch.tensor([1, 5, 0, 9])


@pytest.fixture
def scenes(clip):
    """Four images of the task: a trained tower has damages of 0.001 to 1, a random one of 1e-6."""
    split, transform = load_split("digits", "val", 4), clip.transform()
    return torch.stack([transform(split.image(i)) for i in range(4)])


@torch.no_grad()
def naive(tower, images, window, stride, remove_at, scale=100.0):
    """One image and one window at a time, the metrics written as the paper has them."""
    squares = pruning.windows((8, 8), window, stride)
    out = torch.zeros(len(images), 3, len(squares), dtype=torch.float64)
    for b, image in enumerate(images):
        z = F.normalize(tower(image[None]).double(), dim=-1)
        for w, square in enumerate(squares):
            x = tower.embed(image[None])
            for layer, block in enumerate(tower.blocks, 1):
                if layer == remove_at:
                    x = torch.cat([x[:, :1], x[:, 1:][:, [t for t in range(64) if t not in square.tolist()]]], dim=1)
                x = block(x)
            piece = F.normalize(tower.forward_head(tower.norm(x)).double(), dim=-1)
            p = (scale * piece @ HEAD.double().T).softmax(-1)[0]
            out[b, :, w] = torch.stack([1 - p[LABELS[b]], 1 - p.max(), 1 - (z * piece).sum()])
    return out


@pytest.mark.parametrize("window, stride, remove_at", [(2, 1, 4), (2, 2, 1), (3, 1, 12)])
def test_windows_equal_a_naive_loop(clip, scenes, window, stride, remove_at):
    tower = clip.visual
    golden = score_images(tower, scenes[:2], HEAD, LABELS[:2], 10.0, window, stride, remove_at, batch_size=37)
    expected = naive(tower, scenes[:2], window, stride, remove_at, scale=10.0)
    assert (expected.amax(-1) - expected.amin(-1)).min() > 1e-3  # there is something to compare
    torch.testing.assert_close(golden.windows, expected, atol=1e-5, rtol=1e-5)
    per_token = pruning.window_mean(expected, pruning.windows((8, 8), window, stride), 64)
    for m in range(3):
        ours, theirs = golden.scores[:, m], pruning.z_scored(per_token)[:, m]
        torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=1e-3)
        assert (pruning.rank(ours)[:, :8] == pruning.rank(theirs)[:, :8]).float().mean() > 0.9


@torch.no_grad()
def test_an_oracle_by_g_prunes_exactly_the_most_redundant_tokens(tower, images):
    golden = score_images(tower, images, HEAD, LABELS)
    redundancy = 1 - pruning.window_mean(golden.windows[:, 2], pruning.windows((8, 8), 2), 64)
    tower.set_pruning(drop_counts=(10,), locations=(4,), reducer="golden")
    kept = tower.forward_pruned(images, golden.scores[:, 2]).kept
    dropped = [sorted(set(range(64)) - set(row.tolist())) for row in kept]
    assert dropped == redundancy.topk(10).indices.sort().values.tolist()


class Adapted(torch.nn.Module):
    """A linear layer with an adapter that looks at all tokens of a sequence, which none of torch's own does."""

    def __init__(self, linear):
        super().__init__()
        self.linear = linear

    def forward(self, x):
        return self.linear(x + x.mean(1, keepdim=True))


def change(tower, how):
    """Changes layer 4, the first that runs without the windows, so that its tokens do look at one another."""
    block = tower.blocks[3]
    if how == "hook":
        block.norm1.register_forward_hook(lambda module, args, output: output - output.mean(1, keepdim=True))
    elif how == "adapter":
        block.attn.qkv = Adapted(block.attn.qkv)
    else:
        block.norm1 = torch.nn.GroupNorm(1, 1, affine=False)  # over all tokens and channels


@pytest.mark.parametrize("how", ["hook", "adapter", "norm"])
def test_layers_that_were_changed_see_every_sequence_by_itself(clip, scenes, how):
    tower = copy.deepcopy(clip.visual)
    change(tower, how)
    golden = score_images(tower, scenes[:1], HEAD, LABELS[:1], 10.0, stride=2)
    expected = naive(tower, scenes[:1], 2, 2, 4, scale=10.0)
    torch.testing.assert_close(golden.windows, expected, atol=1e-5, rtol=1e-5)
    assert (golden.windows - score_images(clip.visual, scenes[:1], HEAD, LABELS[:1], 10.0, stride=2).windows).any()


@torch.no_grad()
def test_gains_of_the_first_layer_that_runs_without_windows_count(clip, scenes):
    tower, prompts = copy.deepcopy(clip.visual), create("V", num_norms=26)
    prompts.norm_gains.normal_(std=0.1, generator=torch.Generator().manual_seed(0))
    tower.set_prompts(prompts)
    golden = score_images(tower, scenes[:1], window=4, stride=4)
    tokens, whole = tower.forward_prefix(scenes[:1], 4), F.normalize(tower(scenes[:1]).double(), dim=-1)
    for square, found in zip(pruning.windows((8, 8), 4, 4), golden.windows[0, 0]):
        patches = [t for t in range(64) if t not in square.tolist()]
        leading = tower.num_leading_tokens
        piece = tower.forward_suffix(tokens[:, [*range(leading), *(leading + t for t in patches)]], 4)
        expected = (whole - F.normalize(piece.double(), dim=-1)).square().sum() / 2
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_compiled_layers_give_the_same_scores(clip, scenes):
    settings = {"remove_at": 10, "batch_size": 37}  # the last batch is not full
    plain, compiled = (score_images(clip.visual, scenes, HEAD, LABELS, **settings, compile=c) for c in (False, True))
    assert plain.windows[:, 2].max() > 1e-3
    torch.testing.assert_close(compiled.windows, plain.windows, atol=1e-5, rtol=1e-5)


def test_compilation_of_many_lengths_is_refused(tower, images):
    with pytest.raises(UserError, match="rounds is 2; try rounds 1"):
        score_images(tower, images, rounds=2, compile=True)


def test_damage_keeps_its_digits_where_probabilities_saturate(clip):
    images = torch.zeros(1, 3, 64, 64)
    head = torch.stack([F.normalize(clip.visual(images)[0], dim=-1), torch.eye(64)[0]])
    head[1] -= (head[1] @ head[0]) * head[0]
    golden = score_images(clip.visual, images, F.normalize(head, dim=-1), torch.tensor([0]))
    assert 0 < golden.windows[0, 0].max() < 1e-20  # 1 - p would be 0 in float64 already at 1e-16
    assert golden.scores[0, 0].std() > 0.9


def test_a_tower_in_half_precision_is_scored(tower, images):
    golden = score_images(tower.to(torch.bfloat16), images.to(torch.bfloat16), stride=2)
    assert golden.scores.dtype == torch.float64 and golden.scores.isfinite().all()


def test_batching_does_not_matter(clip, scenes):
    one = score_images(clip.visual, scenes, HEAD, LABELS, batch_size=1000)
    many = score_images(clip.visual, scenes, HEAD, LABELS, batch_size=11)
    assert one.windows[:, 2].max() > 1e-3
    torch.testing.assert_close(one.windows, many.windows, atol=1e-5, rtol=1e-4)


def test_without_labels_there_is_no_label_row(tower, images):
    assert score_images(tower, images, HEAD).scores.shape == (4, 2, 64)


@torch.no_grad()
def greedy(tower, image, rounds):
    """The greedy search as the abstract has it, one window at a time: tokens from the first to leave to the last."""
    squares, left, gone = pruning.windows((8, 8), 2), list(range(64)), []
    x = tower.forward_prefix(image[None], 4)
    whole = F.normalize(tower.forward_suffix(x, 4).double(), dim=-1)
    for n in range(rounds):
        damage = {token: [] for token in left}
        for square in squares.tolist():
            stay = [token for token in left if token not in square]
            if len(stay) < len(left):
                piece = tower.forward_suffix(x[:, [0, *(token + 1 for token in stay)]], 4)
                for token in set(square) & set(left):
                    damage[token].append((whole - F.normalize(piece.double(), dim=-1)).square().sum().item() / 2)
        by_damage = sorted(left, key=lambda token: sum(damage[token]) / len(damage[token]))
        leaving = by_damage if n == rounds - 1 else by_damage[: 64 // rounds]
        gone += leaving
        left = [token for token in left if token not in leaving]
    return gone


@pytest.mark.parametrize("rounds", [2, 5])
def test_rounds_equal_a_naive_greedy_search(clip, scenes, rounds):
    golden = score_images(clip.visual, scenes[:2], HEAD, rounds=rounds, metrics=("preservation",), batch_size=50)
    assert golden.scores.shape == (2, 1, 64) and golden.windows.shape == (2, 1, 49)
    for image, scores in zip(scenes, golden.scores[:, 0]):
        assert scores.mean().abs() < 1e-9 and scores.std(unbiased=False) == pytest.approx(1)
        assert len(scores.unique()) == 64
        assert scores.argsort().tolist() == greedy(clip.visual, image, rounds)


def test_the_first_round_leaves_what_one_round_finds_least_important(clip, scenes):
    once = score_images(clip.visual, scenes, HEAD, LABELS).scores
    twice = score_images(clip.visual, scenes, HEAD, LABELS, rounds=2).scores
    assert once.shape == twice.shape == (4, 3, 64)
    orders = [pruning.rank(scores[:, 2]) for scores in (once, twice)]
    assert torch.equal(*(order[:, 32:].sort().values for order in orders))
    assert not torch.equal(*orders)


@pytest.mark.parametrize(
    "settings", [{"rounds": 0}, {"rounds": 65}, {"window": 9}, {"remove_at": 13}, {"window": 3, "stride": 3}]
)
def test_impossible_windows_are_refused(tower, images, settings):
    with pytest.raises(UserError):
        score_images(tower, images, HEAD, **settings)


def test_metrics_that_cannot_be_had_are_refused(tower, images):
    with pytest.raises(UserError, match="did you mean 'label'"):
        score_images(tower, images, HEAD, LABELS, metrics=("lable",))
    with pytest.raises(UserError, match="need labels"):
        score_images(tower, images, HEAD, metrics=("label",))


@pytest.mark.slow
def test_signs_pruning_by_g_beats_random_beats_reversed(clip):
    from patchrank.models.embed import evaluate, random_scores

    split = load_split("digits", "val", 96)
    transform = clip.transform()
    images = torch.stack([transform(split.image(i)) for i in range(96)])
    head = clip.zero_shot_head(split.classes, split.templates)
    g = score_images(clip.visual, images, head, torch.tensor(split.labels)).scores
    clip.visual.set_pruning(keep_rate=0.5, locations=(4,), reducer="golden")
    right = {
        name: evaluate(clip, split, scores=s.float().numpy(), quiet=True).right().sum()
        for name, s in {"g": g[:, 2], "random": random_scores(images, 64, 0), "reversed": -g[:, 2]}.items()
    }
    assert right["g"] > right["random"] > right["reversed"]


@pytest.mark.parametrize("labels", [[0], [0, 2], [0, -1], [[0, 1]]])
def test_labels_are_one_class_for_each_image(tower, images, labels):
    head = torch.nn.functional.normalize(torch.randn(2, 64), dim=-1)
    with pytest.raises(UserError, match="labels must be one number from 0 to 1 for each of 2 images, but are"):
        score_images(tower, images[:2], head, torch.tensor(labels))
