"""Records and manifests carry what a folder holds beside its images, where it holds anything."""

from helpers.image_files import encoded, pixels, write
from helpers.small_sweep import write_sweep

from patchrank.config import TrialConfig
from patchrank.data.dataset_factory import load_split
from patchrank.golden.make_shards import make_shards, score_shard, shard_folder
from patchrank.golden.shards import read_manifest
from patchrank.models.clip import create_clip
from patchrank.trial.inputs import load_inputs
from patchrank.trial.requirements import ResolvedTrial
from patchrank.trial.run import run_trial
from patchrank.tune.plan import make_plan
from patchrank.tune.ray_tasks import stage
from patchrank.tune.sweep import load_sweep


def photos(folder):
    for n in range(20):
        write(folder / "ab"[n % 2] / f"{n:02}.png", encoded(pixels(seed=n)))
    return folder


def test_a_record_counts_files_beside_the_images_and_broken_ones(tmp_path):
    def rows(**data):
        trial = TrialConfig.model_validate({"data": data, "pruning": {"reducer": "center", "keep_rate": 0.6}})
        inputs = load_inputs(trial.model, trial.data)
        record = run_trial(ResolvedTrial(trial), inputs, str(tmp_path), str(tmp_path), "test", quiet=True)
        return record["metrics"]["tasks"][data["tasks"][0]]

    folder = photos(tmp_path / "photos")
    about = {"tasks": ["folder"], "root": str(folder), "n_train": 2, "n_val": 2, "n_test": None}
    clean = rows(**about)
    test = load_split("folder", "test", None, str(folder))
    write(folder / test.ids[0], b"broken")
    write(folder / "a" / "x.heic", b"")
    found = rows(**about)
    assert found.keys() - clean.keys() == {"n_skipped", "passed_over"}
    assert (found["n_skipped"], found["passed_over"]) == (1, {"ending .heic": 1})
    assert found["n_images"] == clean["n_images"] - 1


def test_a_manifest_of_a_sweep_counts_them_too(tmp_path):
    folder = photos(tmp_path / "photos")
    write(folder / "a" / "x.heic", b"")
    write_sweep(tmp_path, "pruning.keep_rate: {grid: [0.9, 0.8]}", reducer="predictor")
    data = f"trial.data={{tasks: [folder], root: {folder}, n_train: 2, n_val: 2, n_test: 2}}"
    places = [f"root={tmp_path}/runs", f"shards={tmp_path}/shards"]
    plan = make_plan(load_sweep(str(tmp_path / "sweep.yaml"), [data, *places]))
    context = plan.context(plan.jobs()[0].trial)
    for split, shards in context.needed_shards.values():
        score_shard(context.inputs.clip, split, shards, 0)  # as a Ray task does
    stage(plan, plan.jobs())
    for _, shards in context.needed_shards.values():
        assert read_manifest(shards.path)["passed_over"] == {"ending .heic": 1}


def test_a_manifest_counts_them_without_another_key(tmp_path):
    folder, manifests = photos(tmp_path / "photos"), []
    clip = create_clip("patchrank_clip_digits")
    for name in ("clean", "mixed"):
        split = load_split("folder", "all", 1, str(folder))
        shards = shard_folder(clip, split, str(tmp_path / name), remove_at=11)
        manifests.append(read_manifest(make_shards(clip, split, shards, quiet=True)))
        write(folder / "a" / "x.heic", b"")
    clean, mixed = manifests
    assert "passed_over" not in clean and mixed["passed_over"] == {"ending .heic": 1} and clean["key"] == mixed["key"]
