"""What images are drawn by in statistics: it comes with the data, goes into records, and tells old records apart."""

import io
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from helpers.coop_copies import make_named
from helpers.image_files import encoded, pixels, write

from patchrank.config import ReportConfig, TrialConfig
from patchrank.data.dataset_factory import TASKS, load_split
from patchrank.data.digits.scenes import CREDIT, STYLES
from patchrank.data.readers.entries import split_of
from patchrank.io import content_id
from patchrank.report import write_report
from patchrank.report.labels import counted
from patchrank.report.results import Setting, change, drawn_by
from patchrank.trial.identity import fingerprint
from patchrank.trial.inputs import Inputs, load_inputs
from patchrank.trial.requirements import ResolvedTrial, TrialContext
from patchrank.trial.run import run_trial
from patchrank.utils.errors import UserError


def camera(folder, kinds=("cats", "dogs"), count=12):
    """Photographs as a camera numbers them, anew in each folder."""
    for kind in kinds:
        for n in range(count):
            write(folder / kind / f"IMG-{n:04d}.jpg", encoded(pixels(seed=n + 100 * len(kind)), "JPEG"))
    return str(folder)


def tar(path, count=4):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as file:
        for n in range(count):
            content = encoded(pixels(seed=n))
            about = tarfile.TarInfo(f"{n:05}-0.png")
            about.size = len(content)
            file.addfile(about, io.BytesIO(content))
    return write(path, buffer.getvalue())


def test_one_digit_is_one_group_in_whatever_task_and_split_it_stands():
    splits = [load_split(task, "test", 400) for task in ("digits", "digits_ink")]
    assert splits[0].clusters() == splits[1].clusters() and splits[0].unit == "digit"
    assert splits[0].ids[0].startswith("digits/test/") and len(set(splits[0].clusters())) == 359
    assert not set(splits[0].clusters()) & set(load_split("digits", "val").clusters())


@pytest.mark.parametrize(
    "task, ids",
    [
        ("folder", {"cats/IMG-0001.jpg", "dogs/IMG-0001.jpg"}),
        ("caltech101", {"Faces/image_0005.jpg", "yin_yang/image_0005.jpg"}),
        ("imagenet", {"n01440764/ILSVRC2012_val_00000293.JPEG", "n02113978/ILSVRC2012_val_00000293.JPEG"}),
        ("wds", {"a/00000-0", "b/00000-0"}),
    ],
)
def test_images_of_equal_names_stand_for_themselves(tmp_path, task, ids):
    if task == "folder":
        camera(tmp_path)
    elif task == "wds":
        tar(tmp_path / "a.tar"), tar(tmp_path / "b.tar")
    else:
        make_named(tmp_path, task)
    split = load_split(task, None if task in ("folder", "wds") else "test", root=str(tmp_path))
    assert ids <= set(split.ids) and split.unit == "image" and split.groups is None
    assert len(set(split.clusters())) == len(split) and set(split.clusters()) == {
        f"{task}/{name}" for name in split.ids
    }


def test_clips_of_one_video_of_ucf101_are_one_group(tmp_path, capsys):
    make_named(tmp_path, "ucf101")
    split = load_split("ucf101", "test", root=str(tmp_path))
    assert split.unit == "group" and len(split) == 8 and len(set(split.clusters())) == 4
    place = split.ids.index("Handstand_Pushups/v_HandStandPushups_g08_c05.jpg")
    assert split.clusters()[place] == "ucf101/HandStandPushups_g08"
    folder = tmp_path / "ucf101"
    file = folder / "split_zhou_UCF101.json"
    file.write_text(file.read_text().replace("v_Hammering_g08_c05", "hammering-5"))
    write(folder / "UCF-101-midframes/Hammering/hammering-5.jpg", encoded(kind="JPEG"))
    capsys.readouterr()
    renamed = load_split("ucf101", "test", root=str(tmp_path))
    alone = renamed.clusters()[renamed.ids.index("Hammering/hammering-5.jpg")]
    assert alone == "ucf101/Hammering/hammering-5.jpg" and renamed.clusters().count(alone) == 1
    (warning,) = [line for line in capsys.readouterr().err.splitlines() if "group" in line]
    assert "1 of 8 images have names that tell no group, the first 'Hammering/hammering-5.jpg'" in warning


def listed(tmp_path, groups=None):
    """A CSV file of six images, two in each split, and perhaps the group of each."""
    camera(tmp_path, count=3)
    splits = ["train", "val", "test"] * 2
    rows = [f"{kind}/IMG-{n:04d}.jpg,{kind}" for kind in ("cats", "dogs") for n in range(3)]
    lines = [f"{row},{split}" for row, split in zip(["path,label", *rows], ["split", *splits])]
    if groups is not None:
        lines = [f"{line},{group}" for line, group in zip(lines, ["Group", *groups])]
    return str(write(tmp_path / "list.csv", "\n".join(lines) + "\n"))


def test_a_csv_file_may_name_groups(tmp_path):
    split = load_split("folder", root=listed(tmp_path, ["Tom", "Tom", "Kim", "Rex", "Rex", "Kim"]))
    by_name = dict(zip(split.ids, split.clusters()))
    assert split.unit == "group" and by_name["cats/IMG-0002.jpg"] == by_name["dogs/IMG-0002.jpg"] == "folder/Kim"
    assert split.take([3, 1]).groups == [split.groups[3], split.groups[1]]
    assert dict(zip(split.mixed().ids, split.mixed().groups)) == by_name and split.first(2).unit == "group"


def test_a_hash_deals_out_whole_groups(tmp_path):
    camera(tmp_path, kinds=["cats"], count=20)
    lines = [f"cats/IMG-{n:04d}.jpg,cat,{'Tom' if n % 2 else 'Kim'}" for n in range(20)]
    (tmp_path / "list.csv").write_text("\n".join(["path,label,group", *lines]))
    whole = load_split("folder", "all", root=str(tmp_path / "list.csv"))
    for name in {split_of("Tom"), split_of("Kim")}:
        found = load_split("folder", name, root=str(tmp_path / "list.csv"))
        expected = {f"folder/{group}" for group in ("Tom", "Kim") if split_of(group) == name}
        assert set(found.groups) == expected and len(found) == sum(group in expected for group in whole.groups)


def test_a_group_must_be_filled_in_every_row(tmp_path):
    root = listed(tmp_path, ["Tom", "Tom", "Kim", " ", "Rex", "Kim"])
    with pytest.raises(UserError, match=r"list.csv, line 5, column 'group': is empty, but must be filled in every row"):
        load_split("folder", root=root)


# ---- ids of trials


def data_id(task, **data):
    trial = TrialConfig.model_validate({"data": {"tasks": [task], "n_train": None, "n_val": None, **data}})
    inputs = Inputs(None, trial.data)
    inputs.sha256 = "of no weights"
    context = TrialContext(ResolvedTrial(trial), inputs)
    return fingerprint(context)["data"], [inputs.split(task, part) for part in ("train", "val", "test")]


def as_it_was(splits):
    """The fingerprint of data before there were groups."""
    return content_id([[split.ids_sha256(), split.labels, split.classes, split.templates] for split in splits])


@pytest.mark.parametrize("task", ["digits", "folder", "csv", "caltech101"])
def test_records_of_data_without_groups_of_its_own_are_found_again(tmp_path, task):
    if task == "caltech101":
        make_named(tmp_path, task)
    root = {"digits": None, "csv": listed(tmp_path)}.get(task, camera(tmp_path, count=20))
    found, splits = data_id("folder" if task == "csv" else task, root=root)
    assert found == as_it_was(splits)


def test_records_of_data_with_groups_are_made_anew_where_groups_change(tmp_path):
    groups = [("Tom", "Tom", "Kim", "Rex", "Rex", "Kim"), ("Tom", "Tom", "Tom", "Rex", "Rex", "Kim")]
    found = [data_id("folder", root=listed(tmp_path, each)) for each in groups]
    assert found[0][0] != found[1][0] and found[0][0] != as_it_was(found[0][1])
    make_named(tmp_path, "ucf101")
    ours, splits = data_id("ucf101", root=str(tmp_path))
    assert ours != as_it_was(splits)


# ---- records


def test_a_trial_saves_what_its_images_are_drawn_by(tmp_path):
    for task, root in (("folder", camera(tmp_path / "photos", count=20)), ("digits", None)):
        trial = TrialConfig.model_validate(
            {
                "data": {"tasks": [task], "root": root, "n_train": 4, "n_val": 4, "n_test": 8},
                "pruning": {"reducer": "center", "keep_rate": 0.6},
            }
        )
        inputs = load_inputs(trial.model, trial.data)
        record = run_trial(ResolvedTrial(trial), inputs, str(tmp_path), str(tmp_path), "test", quiet=True)
        with np.load(tmp_path / "trials" / f"{record['id']}.npz", allow_pickle=False) as arrays:
            saved = dict(arrays)
        split = load_split(task, "test", 8, root)
        assert saved[f"{task}.groups"].tolist() == split.clusters() and len(saved[f"{task}.val_groups"]) == 4
        assert str(saved[f"{task}.unit"]) == ("image" if task == "folder" else "digit")
        setting = Setting([record], [saved])
        assert change(setting).clusters == len(set(split.clusters())) and setting.unit(task) == split.unit
        write_report([record], str(tmp_path), ReportConfig(table="made-up"), [], "sweep.yaml")
        assert ("over images)" in (tmp_path / "report.md").read_text()) == (task == "folder")


def old(task, ids):
    """A record from before groups were saved."""
    n = len(ids)
    arrays = {"ids": np.array(ids), "right_pruned": np.arange(n) > 0, "right_unpruned": np.ones(n, bool)}
    row = {"config": {"data": {"tasks": [task]}, "pruning": {"reducer": "center"}}, "metrics": {}}
    return Setting([row], [{f"{task}.{name}": values for name, values in arrays.items()}])


def test_old_records_are_read_as_they_were_meant():
    digits = old("digits", [f"digits/test/{digit:04d}-{scene}" for scene in range(2) for digit in range(5)])
    assert change(digits).clusters == 5 and digits.unit("digits") == "digit"
    new = load_split("digits", "test")
    assert digits.values("accuracy").clusters[0] == "digit/0000" and new.clusters()[0].startswith("digit/")
    for task in STYLES:
        split = load_split(task, "val")
        clusters, unit = drawn_by({f"{task}.val_ids": np.array(split.ids)}, task, on_val=True)
        assert (clusters.tolist(), unit) == (split.clusters(), split.unit)
    photos = old("folder", ["cats/IMG-0001.jpg", "dogs/IMG-0001.jpg", "dogs/IMG-0002.jpg"])
    assert change(photos).clusters == 3 and photos.unit("folder") == "image"
    assert photos.values("accuracy").clusters[0] == "folder/cats/IMG-0001.jpg"


def test_tasks_with_several_words_name_each():
    arrays = old("digits", ["digits/test/0001-0"]).arrays[0] | old("folder", ["a.jpg", "b.jpg"]).arrays[0]
    row = {"config": {"data": {"tasks": ["digits", "folder"]}}, "metrics": {}}
    both = Setting([row], [arrays])
    assert (both.unit("digits"), both.unit("folder"), change(both).clusters) == ("digit", "image", 3)
    assert counted(both.values("accuracy")) == "1 image of 1 digit and 2 images"


def test_every_task_of_scenes_names_the_makers_of_its_photographs():
    credits = {name: task.credit for name, task in TASKS.items() if task.credit}
    assert credits == dict.fromkeys(STYLES, CREDIT) and "CC BY" in CREDIT


# ---- the main job on anybody's photographs


@pytest.mark.slow
def test_the_main_job_on_a_cameras_photographs_ends_with_a_report_that_speaks_of_images(tmp_path):
    photos = camera(tmp_path / "photos", count=60)
    sweep = Path(__file__).parents[2] / "sweeps/locations.yaml"
    changes = ["trial.data.tasks=[folder]", f"trial.data.root={photos}", "root=runs/photos", "shards=runs/shards"]
    command = [sys.executable, "-m", "patchrank.tune", str(sweep), "--quick", *changes]
    done = subprocess.run(
        command, cwd=tmp_path, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "runs/photos-quick/report.md").read_text().replace("patchrank_clip_digits", "")
    assert "images" in page and "over images)" in page
    assert "digit" not in page and CREDIT not in page
