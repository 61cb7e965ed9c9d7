"""Which settings a recipe tries, and which it takes."""

import pytest
import timm

from patchrank.config import MIN_REPAIR_IMAGES, TrialConfig
from patchrank.models.clip import Clip
from patchrank.recipe.budget import Budget, Settler
from patchrank.recipe.candidates import METHODS, NEIGHBOURS, Schedule, first_round, other_weights, what_runs
from patchrank.recipe.tries import FINALISTS, Tries, choose, method_of

SMALL = dict(img_size=32, patch_size=8, embed_dim=32, depth=12, num_heads=4, locations=(1,))
IMAGES = 60


class Split:
    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count


class Inputs:
    """A model, and as many images as are asked for."""

    def __init__(self, clip, images):
        self.clip, self.images = clip, images

    def split(self, task, part):
        return Split(self.images)


class Judged(Tries):
    """Tries whose drift a function tells, in place of trials."""

    def _record(self, trial):
        return {"metrics": {"val_cosine": 1 - self.judge(trial)}}


def tries(judge, images=IMAGES, entry="patchrank_dinov2_s14", **shape):
    clip = Clip("toy", timm.create_model(entry, **SMALL | shape), None).eval()
    found = Judged(TrialConfig(), Inputs(clip, images), Settler(clip, Budget(share=0.7), "nowhere"), "nowhere")
    found.judge = judge
    return found


@pytest.mark.parametrize("depth", [1, 2, 3, 4, 12, 24, 27, 40])
def test_schedules_fit_towers_of_any_depth(depth):
    schedules = [*NEIGHBOURS, *(each for _, several in METHODS for each in several)]
    for schedule in schedules:
        locations, taper = schedule.settings(depth).values()
        assert list(locations) == sorted(set(locations)) and 1 <= locations[0] and locations[-1] <= max(1, depth - 1)
        assert 0 < taper <= 1
    if depth == 24:
        assert Schedule(3, 7, 1, 0.6).settings(24) == {"locations": tuple(range(6, 15)), "taper": 0.775}
        assert Schedule(4, 10, 2, 0.7).settings(24) == {"locations": (8, 12, 16, 20), "taper": 0.7}


def test_the_setting_that_drifts_least_is_taken():
    wanted = other_weights(None, first_round(tries(None).inputs.clip.visual)[0])[-1].protection

    def judge(trial):
        pruning = trial.pruning
        method = {"rank_merge": 1.0, "diffrate": 1.5}.get(pruning.reducer, 2.0)
        return method - 0.1 * (pruning.locations[0] == 2) - 0.05 * (pruning.protection == wanted)

    found = tries(judge)
    choice = choose(found)
    assert choice.pruning.reducer == "rank_merge" and choice.pruning.protection == wanted
    assert choice.pruning.locations[0] == 2 and choice.pruning.budget == 0.7
    assert further(found) == {("rank_merge", None), ("diffrate", None)} and len(further(found)) == FINALISTS


def further(found):
    """Methods of which more was tried than at first."""
    first = {trial.pruning for trial in found.trials(first_round(found.inputs.clip.visual))}
    return {method_of(trial) for trial in found.drift if trial.pruning not in first}


def test_repairs_are_tried_of_the_best_where_images_are_enough():
    def judge(trial):
        return (1.0 if trial.pruning.reducer == "tome" else 2.0) - 0.5 * (trial.repair is not None)

    assert choose(tries(judge)).repair.images == IMAGES
    few = tries(judge, images=MIN_REPAIR_IMAGES - 1)
    assert choose(few).repair is None and all(trial.repair is None for trial in few.drift)


def test_settings_that_do_the_same_are_tried_once():
    found = tries(lambda trial: {"rank_merge": 1.0, "attention_merge": 1.5}.get(trial.pruning.reducer, 2.0))
    choose(found)
    weights = [trial.pruning.protection for trial in found.drift if trial.pruning.reducer == "attention_merge"]
    assert 0.5 not in weights and {None, 0.3, 0.8} <= set(weights)  # 0.5 is what None stands for
    alike = [(what_runs(found.inputs.clip.visual, trial.pruning), trial.repair) for trial in found.drift]
    assert len(set(alike)) == len(alike)


def test_methods_that_need_a_class_token_are_left_out_where_there_is_none():
    found = tries(lambda trial: 1.0, entry="patchrank_siglip_b16_224")
    choose(found)
    reducers = {trial.pruning.reducer for trial in found.drift}
    assert "cls_attention" not in reducers and {"rank_merge", "feature_merge", "tome"} <= reducers
