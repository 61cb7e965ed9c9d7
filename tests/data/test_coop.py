"""The eight named datasets, read from made-up copies of their real layouts."""

import json
import pickle
import re
from pathlib import Path

import fsspec
import pytest
import torch
from helpers.coop_copies import AIRCRAFT, COPIES, VARIANTS, WNIDS, jpeg, make_named, write, write_split
from helpers.image_files import encoded, pixels

from patchrank.data.coop import NAMED, load_named
from patchrank.data.dataset_factory import load_split
from patchrank.utils.errors import UserError

DOCS = (Path(__file__).parents[2] / "docs/data.md").read_text()
SPLITS = ("train", "val", "test")


def expected(task: str, split: str) -> tuple[list[str], list[int], tuple[str, ...]]:
    """What the tables of the copies say: ids, labels and classes."""
    if task == "fgvc_aircraft":
        rows = AIRCRAFT[split]
        return [f"{number}.jpg" for number, _ in rows], [VARIANTS.index(name) for _, name in rows], VARIANTS
    if task == "imagenet":
        names = ("_18.JPEG", "_301.JPEG", "_4.JPEG")
        train = [f"{wnid}/{wnid}{name}" for wnid in sorted(WNIDS) for name in names]
        val = [f"{wnid}/ILSVRC2012_val_00000293.JPEG" for wnid in sorted(WNIDS)]
        labels = [label for label in range(4) for _ in names] if split == "train" else list(range(4))
        return train if split == "train" else val, labels, tuple(WNIDS[wnid] for wnid in sorted(WNIDS))
    rows = COPIES[task].split()[split]
    names = {label: name for label, name, _ in COPIES[task].rows}
    return [row[0] for row in rows], [row[1] for row in rows], tuple(names[label] for label in sorted(names))


def check(task: str, split: str, root: object) -> None:
    images = load_named(task, split, str(root))
    assert (images.ids, images.labels, images.classes) == expected(task, split)
    assert (images.task, images.split, images.decoding) == (task, split, "plain")
    assert images.templates == (NAMED[task].prompt,)
    assert images.image(len(images) - 1).size == (6, 4)


def message_of(task: str, root: object, split: str = "test") -> str:
    with pytest.raises(UserError) as caught:
        load_named(task, split, None if root is None else str(root))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("task", NAMED)
def test_coops_layout(tmp_path, task, split):
    make_named(tmp_path, task)
    check(task, split, tmp_path)


@pytest.mark.parametrize("task", sorted(set(NAMED) - {"ucf101"}))
def test_torchvisions_layout(tmp_path, task):
    make_named(tmp_path, task, torchvision=True)
    for split in SPLITS:
        check(task, split, tmp_path)


@pytest.mark.parametrize("task", NAMED)
def test_root_may_be_the_datasets_own_folder(tmp_path, task):
    check(task, "train", make_named(tmp_path, task))


@pytest.mark.parametrize("task, inside", [("dtd", "dtd"), ("fgvc_aircraft", "fgvc-aircraft-2013b")])
def test_root_may_be_torchvisions_outer_folder(tmp_path, task, inside):
    make_named(tmp_path, task, torchvision=True)
    check(task, "val", tmp_path / inside)


@pytest.mark.parametrize("task", sorted(set(COPIES) - {"ucf101", "food101"}))
def test_split_file_in_coops_folder_serves_images_in_torchvisions(tmp_path, task):
    folder = make_named(tmp_path, task, torchvision=True)
    (folder / COPIES[task].file).unlink()
    assert COPIES[task].file in message_of(task, tmp_path)
    write_split(tmp_path, task)
    check(task, "test", tmp_path)


def test_imagenet_with_train_and_val_straight_in_its_folder(tmp_path):
    folder = make_named(tmp_path, "imagenet")
    for part in ("train", "val"):
        (folder / "images" / part).rename(folder / part)
    check("imagenet", "test", tmp_path)


@pytest.mark.parametrize("task", ["dtd", "fgvc_aircraft", "imagenet"])
def test_root_may_be_a_url(tmp_path, task):
    make_named(tmp_path, task)
    memory = fsspec.filesystem("memory")
    memory.put(f"{tmp_path}/", "/named/", recursive=True)
    try:
        check(task, "train", "memory://named")
    finally:
        memory.rm("/named", recursive=True)


def test_another_datasets_images_folder_is_not_taken_for_this_ones(tmp_path):
    make_named(tmp_path, "food101")
    write(tmp_path / "images/somebody.jpg", jpeg())
    (tmp_path / "food-101/images").rename(tmp_path / "elsewhere")
    assert message_of("food101", tmp_path).startswith("food101: images/apple_pie/1005.jpg not found, looked for in")


def test_names_and_order_are_coops(tmp_path):
    for task in ("caltech101", "flowers102", "ucf101", "fgvc_aircraft", "imagenet"):
        make_named(tmp_path, task)
    load = lambda task: load_named(task, "train", str(tmp_path))  # noqa: E731
    assert load("caltech101").classes[:5] == ("face", "leopard", "motorbike", "accordion", "airplane")
    assert not any(name.startswith(("BACKGROUND", "Faces_easy")) for name in load("caltech101").ids)
    assert load("flowers102").labels[0] == 2 and load("flowers102").classes[2] == "passion flower"
    assert load("ucf101").classes[1:3] == ("Hammering", "Hammer_Throw")
    assert load("ucf101").ids[-1] == "Handstand_Pushups/v_HandStandPushups_g08_c03.jpg"
    assert load("fgvc_aircraft").classes == ("707-320", "Beechcraft 1900", "F-16A/B", "Yak-42")
    assert load("imagenet").classes == (
        "tench",
        "Mexican hairless dog (xoloitzcuintli)",
        "sunglasses",
        "sunglasses",
    )


def test_images_of_other_kinds_become_rgb(tmp_path):
    folder = make_named(tmp_path, "oxford_pets")
    write(folder / "images/Abyssinian_5.jpg", jpeg((204, 51, 51), "GIF", "P"))
    image = load_named("oxford_pets", "test", str(tmp_path)).image(0)
    assert image.mode == "RGB" and image.getpixel((0, 0)) == (204, 51, 51)


def test_val_of_imagenet_is_its_test(tmp_path):
    make_named(tmp_path, "imagenet")
    val, test = (load_named("imagenet", split, str(tmp_path)) for split in ("val", "test"))
    assert val.ids == test.ids and val.labels == test.labels and not NAMED["imagenet"].own_val


@pytest.mark.parametrize("task", NAMED)
def test_nothing_there_says_what_is_missing_where_and_how_to_get_it(tmp_path, task):
    message = message_of(task, tmp_path)
    wanted = {"fgvc_aircraft": "variants.txt", "imagenet": "classnames.txt"}.get(task) or COPIES[task].file
    assert message.startswith(f"{task}: {wanted} not found")
    for folder in NAMED[task].folders:
        assert str(tmp_path / folder) in message
    assert f"docs/data.md#{task}" in message and f"\n### {task}\n" in DOCS


@pytest.mark.parametrize("task", NAMED)
def test_missing_images_name_the_first_that_is_not_there(tmp_path, task):
    folder = make_named(tmp_path, task)
    images = {"fgvc_aircraft": "images", "imagenet": "images"}.get(task) or COPIES[task].images
    (folder / images).rename(folder / "gone")
    first = "val/n01440764" if task == "imagenet" else expected(task, "test")[0][0]
    message = message_of(task, tmp_path)
    assert f"{images}/{first}" in message and str(folder) in message and f"docs/data.md#{task}" in message


def test_a_download_that_broke_off_is_noticed_at_once(tmp_path):
    folder = make_named(tmp_path, "dtd")
    (folder / "images/zigzagged/zigzagged_0006.jpg").unlink()
    assert "zigzagged_0006.jpg is missing" in message_of("dtd", tmp_path)


def test_a_missing_image_in_between_is_named_when_it_is_read(tmp_path):
    folder = make_named(tmp_path, "dtd")
    images = load_named("dtd", "test", str(tmp_path))
    (folder / "images" / images.ids[2]).unlink()
    with pytest.raises(UserError, match=rf"^dtd: image {folder}/images/{images.ids[2]} is missing.*#dtd"):
        images.read(2)
    (folder / "images" / images.ids[2]).mkdir()
    with pytest.raises(UserError, match="cannot be read"):
        images.content(2)


def test_other_pixels_by_the_same_names_are_another_version(tmp_path):
    folder = make_named(tmp_path, "dtd")
    load = lambda limit=None: load_split("dtd", "test", limit, str(tmp_path))  # noqa: E731
    before, one = load(), load(1)
    assert load().ids_sha256() == before.ids_sha256() and before.version != load_named("dtd", "test", tmp_path).version
    write(folder / "images" / before.ids[3], jpeg((1, 2, 3)))
    after = load()
    assert after.ids == before.ids and after.ids_sha256() != before.ids_sha256()
    assert load(1).ids_sha256() == one.ids_sha256()  # of other images it knows nothing
    (folder / "images" / before.ids[3]).unlink()
    with pytest.raises(UserError, match=rf"^dtd: image .*{before.ids[3]} is missing"):
        load()


def test_a_damaged_image_is_named(tmp_path):
    folder = make_named(tmp_path, "dtd")
    split = load_split("dtd", "test", None, str(tmp_path))
    sound = split.read(0)
    for content, reason in [
        (encoded(pixels(64, 64), "JPEG")[:-500], "image file is truncated"),
        (b"", "the file is empty"),
        (b"text", "in no image"),
    ]:
        write(folder / "images" / split.ids[0], content)
        said = rf"^dtd/test: image {split.ids[0]} cannot be decoded \(({reason})[^\n]*\)$"
        with pytest.raises(UserError, match=said):
            split.image(0)
        with pytest.raises(UserError, match=said):
            split.decode(0, content)
        with pytest.raises(UserError, match=said):
            list(split.batches(lambda image: torch.zeros(1), 2))
    assert split.decode(0, sound).size == (6, 4)


def test_a_few_images_of_many_hold_on_to_no_others(tmp_path):
    make_named(tmp_path, "imagenet")
    split = load_named("imagenet", "train", str(tmp_path))
    few = split.mixed().take([5, 1, 3]).first(2)
    assert [few.read(i) for i in range(2)] == [split.read(split.ids.index(name)) for name in few.ids]
    sent = pickle.dumps(few)
    assert [name for name in split.ids if name.encode() in sent] == sorted(few.ids)
    assert pickle.loads(sent).read(1) == few.read(1)
    again = few
    for _ in range(2000):  # closures around closures would run out of stack
        again = again.take(range(2))
    assert again.read(1) == few.read(1) and len(pickle.dumps(again)) == len(sent)


def test_no_root_no_task_no_split(tmp_path):
    message = message_of("caltech101", None)
    assert "data.root" in message and "--data-root" in message and "caltech-101" in message
    assert "does not exist" in message_of("dtd", tmp_path / "nowhere")
    assert "did you mean 'dtd'" in message_of("dtdd", tmp_path)
    assert "did you mean 'test'" in message_of("dtd", tmp_path, "tset")


def test_no_split_is_made_up_even_where_lists_of_ucf101_lie(tmp_path):
    folder = make_named(tmp_path, "ucf101")
    (folder / COPIES["ucf101"].file).unlink()
    assert (folder / "ucfTrainTestlist/trainlist01.txt").exists()
    assert "no split is made up" in message_of("ucf101", tmp_path, "train")


def with_row(part: str, place: int, row: object) -> dict:
    split = COPIES["dtd"].split()
    split[part][place] = row
    return split


ROW = ["banded/banded_0001.jpg", 0, "banded"]


@pytest.mark.parametrize(
    "split, said",
    [
        ([1], "must be an object with the keys train, val, test"),
        ({"train": [ROW], "test": [ROW]}, "must be an object with the keys train, val, test"),
        ({"train": [ROW], "val": [], "test": [ROW]}, "val must be a list of at least one image"),
        ({"train": {"0": ROW}, "val": [ROW], "test": [ROW]}, "train must be a list"),
        (with_row("train", 4, ROW[:2]), "train[4] must be [image path, whole label, class name]"),
        (with_row("val", 1, [*ROW, 0]), "val[1] must be [image path"),
        (with_row("val", 1, [ROW[0], "0", ROW[2]]), "val[1] must be [image path"),
        (with_row("val", 1, [ROW[0], True, ROW[2]]), "val[1] must be [image path"),
        (with_row("val", 1, [ROW[0], 0.0, ROW[2]]), "val[1] must be [image path"),
        (with_row("test", 0, [ROW[0], -1, ROW[2]]), "test[0] must have a label from 0"),
        (with_row("test", 0, [ROW[0], 0, " "]), "test[0] must have a label from 0 and a class name"),
        *(
            (with_row("train", 2, [path, 0, "banded"]), "train[2] must name its image by a path below the image folder")
            for path in ("../secret.jpg", "/etc/passwd", "a/../../b.jpg", "a//b.jpg", "", ".", "~/b", "a\\..\\b")
            + ("memory://b.jpg", "a::file:///etc/passwd")
        ),
        (with_row("train", 0, [ROW[0], 0, "striped"]), "train[0] calls label 0 'striped', but train calls it 'banded'"),
        (with_row("test", 5, [ROW[0], 2, "dotted"]), "test[5] calls label 2 'dotted', but train calls it 'zigzagged'"),
        (with_row("test", 5, [ROW[0], 7, "dotted"]), "calls label 7 'dotted', but train has no image of it"),
    ],
)
def test_a_split_file_that_is_not_as_coop_writes_it(tmp_path, split, said):
    make_named(tmp_path, "dtd")
    path = write_split(tmp_path, "dtd", split)
    message = message_of("dtd", tmp_path)
    assert message.startswith(f"{path}: ") and said in message


def test_labels_must_leave_no_gap(tmp_path):
    make_named(tmp_path, "dtd")
    rows = {part: [row for row in rows if row[1] != 1] for part, rows in COPIES["dtd"].split().items()}
    write_split(tmp_path, "dtd", rows)
    assert "train has 2 labels, which must be 0 to 1, but has no 1" in message_of("dtd", tmp_path)


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe\x00", b"[" * 100_000])
def test_a_split_file_that_is_not_json(tmp_path, content):
    folder = make_named(tmp_path, "dtd")
    path = write(folder / COPIES["dtd"].file, content)
    assert message_of("dtd", tmp_path).startswith((f"{path}: is not JSON", f"{path}: is not a text file in UTF-8"))


@pytest.mark.parametrize(
    "task, name, content, said",
    [
        ("fgvc_aircraft", "images_variant_test.txt", "1514522 F-16A/B\n\n12 Concorde\n", "line 3 must be an image's"),
        ("fgvc_aircraft", "images_variant_test.txt", "../x F-16A/B\n", "line 1 must be an image's number"),
        ("fgvc_aircraft", "images_variant_test.txt", "\n", "lists no images"),
        ("fgvc_aircraft", "variants.txt", b"\xff\xfe", "is not a text file in UTF-8"),
        ("imagenet", "classnames.txt", "n01440764 tench\ntench\n", "line 2 must be a WordNet id and a class name"),
        ("imagenet", "classnames.txt", "n01440764 tench\nn01440764 ray\n", "line 2 names n01440764 again"),
        ("imagenet", "classnames.txt", "n01440764 tench\n", "folder n02113978 has no line"),
        ("imagenet", "classnames.txt", "n01440764 tench\nn09999999 x\n", "folder n02113978 has no line"),
        ("imagenet", "classnames.txt", "", "names no class"),
    ],
)
def test_text_files_that_are_not_as_they_should_be(tmp_path, task, name, content, said):
    folder = make_named(tmp_path, task)
    write(folder / name, content)
    assert said in message_of(task, tmp_path)


def test_a_class_of_imagenet_without_images(tmp_path):
    folder = make_named(tmp_path, "imagenet")
    (folder / "images/val/n04355933/ILSVRC2012_val_00000293.JPEG").unlink()
    assert "images/val/n04355933: no image in it" in message_of("imagenet", tmp_path)


def test_other_sizes_than_coops_are_said_on_stderr(tmp_path, capsys, monkeypatch):
    make_named(tmp_path, "dtd")
    load_named("dtd", "train", str(tmp_path))
    said = "warning: dtd train: 3 classes and 9 images, where CoOp's has 47 and 2,820; figures cannot be compared"
    said += " with others'\n"
    assert capsys.readouterr() == ("", said)
    monkeypatch.setitem(NAMED, "dtd", NAMED["dtd"].model_copy(update={"sizes": (3, 9, 3, 6)}))
    for split in SPLITS:
        load_named("dtd", split, str(tmp_path))
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("task", NAMED)
def test_the_table_in_the_docs_is_the_table_in_the_code(task):
    row = re.search(rf"^\| `{task}` \|(.*)\|$", DOCS, re.M).group(1)
    cells = [cell.strip().strip("`") for cell in row.split("|")]
    sizes = tuple(int(re.sub(r"\D", "", cell)) for cell in cells[:4])
    assert (sizes, cells[4]) == (NAMED[task].sizes, NAMED[task].prompt)


@pytest.mark.parametrize("task", NAMED)
def test_the_docs_name_every_folder_and_split_file(task):
    section = DOCS.split(f"\n### {task}\n")[1].split("\n#")[0]
    files = [COPIES[task].file, COPIES[task].images] if task in COPIES else ["txt"]
    assert all(word in section for word in [*NAMED[task].folders, *files])


def test_split_files_are_read_as_utf8_json_whatever_their_layout(tmp_path):
    folder = make_named(tmp_path, "flowers102")
    write(folder / COPIES["flowers102"].file, json.dumps(COPIES["flowers102"].split(), separators=(",", ":")))
    check("flowers102", "train", tmp_path)
