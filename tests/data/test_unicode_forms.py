"""Names in one of Unicode's normal forms find files, classes and lists in the other; lists may have marks."""

import json
import random
from unicodedata import normalize

import pytest
from helpers.coop_copies import AIRCRAFT, COPIES, VARIANTS, make_named
from helpers.image_files import encoded, write

from patchrank.data.class_names import read_vocabulary
from patchrank.data.coop import load_named
from patchrank.data.dataset_factory import load_split
from patchrank.data.few_shot import load_few_shot
from patchrank.data.readers.folder import load_folder
from patchrank.io import stored_name
from patchrank.utils.errors import UserError

BOM = b"\xef\xbb\xbf"
FORMS = [("NFC", "NFD"), ("NFD", "NFC")]


def spelled(root, disk, listed):
    """A copy of DTD whose images have accents, in one form on disk and in another in the split file."""
    folder = make_named(root, "dtd")
    parts = COPIES["dtd"].split()
    for rows in parts.values():
        for n, (path, label, name) in enumerate(rows):
            accented = f"{path.split('/')[0]}/caf\u00e9 \u1ed9 {path.split('/')[1]}"
            write(folder / "images" / normalize(disk, accented), (folder / "images" / path).read_bytes())
            rows[n] = [normalize(listed, accented), label, normalize(listed, f"{name} \u00e9")]
    write(folder / COPIES["dtd"].file, json.dumps(parts))
    return parts


@pytest.mark.parametrize("disk, listed", FORMS)
def test_a_list_finds_images_in_the_other_form(tmp_path, disk, listed):
    parts = spelled(tmp_path, disk, listed)
    split = load_split("dtd", "test", None, str(tmp_path))
    assert sorted(split.ids) == sorted(path for path, *_ in parts["test"])
    assert all(split.image(i).size == (6, 4) for i in range(len(split)))


def test_few_shot_draws_find_them_too(tmp_path):
    spelled(tmp_path, "NFD", "NFC")
    train, val = load_few_shot("dtd", 2, 1, str(tmp_path))
    assert all(split.image(i).size == (6, 4) for split in (train, val) for i in range(len(split)))


def test_an_image_in_neither_form_is_missing(tmp_path):
    parts = spelled(tmp_path, "NFD", "NFC")
    (tmp_path / "dtd/images" / normalize("NFD", parts["test"][1][0])).unlink()
    split = load_named("dtd", "test", str(tmp_path))
    with pytest.raises(UserError, match=f"image .*{parts['test'][1][0]} is missing, though .* lists it"):
        split.image(1)


@pytest.mark.parametrize("disk, listed", FORMS)
def test_parts_of_a_path_may_be_in_different_forms(tmp_path, disk, listed):
    stored = f"{normalize(disk, 'é')}/{normalize(listed, 'ü.png')}"
    write(tmp_path / stored, encoded())
    assert stored_name(str(tmp_path), f"{normalize(listed, 'é')}/{normalize(disk, 'ü.png')}") == stored
    assert stored_name(str(tmp_path), stored) == stored and stored_name(str(tmp_path), "é/no") == "é/no"


@pytest.mark.parametrize("disk, listed", FORMS)
def test_a_vocabulary_names_folders_in_the_other_form(tmp_path, disk, listed):
    for name in ("café", "thé"):
        write(tmp_path / "drinks" / normalize(disk, name) / "1.png", encoded())
    split = load_folder("folder", "all", str(tmp_path / "drinks"))
    assert split.classes == ("café", "thé")
    shown = normalize(listed, "un café")
    names = write(tmp_path / "names.yaml", f"classes: {{{normalize(listed, 'café')}: {shown}}}")
    assert read_vocabulary(str(names)).apply(split).classes == (shown, "thé")


def test_a_vocabulary_that_names_a_class_in_both_forms_is_refused(tmp_path):
    both = "\n".join(f"  {normalize(form, 'café')}: x" for form in ("NFC", "NFD"))
    with pytest.raises(UserError, match=r"names.yaml: classes.café: stands twice, written in two ways; remove one$"):
        read_vocabulary(str(write(tmp_path / "names.yaml", f"classes:\n{both}\n")))


@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
@pytest.mark.parametrize("task", ["fgvc_aircraft", "imagenet", "dtd"])
def test_lists_may_start_with_a_mark_and_end_their_lines_as_windows_does(tmp_path, task, end):
    plain = [load_named(task, split, str(make_named(tmp_path, task))) for split in ("train", "test")]
    lists = [path for kind in ("*.txt", "*.json") for path in (tmp_path).glob(f"*/{kind}")]
    assert lists
    for path in lists:
        path.write_bytes(BOM + path.read_bytes().replace(b"\n", end))
    for before in plain:
        marked = load_named(task, before.split, str(tmp_path))
        assert (marked.ids, marked.labels, marked.classes) == (before.ids, before.labels, before.classes)


def test_lists_that_were_joined_have_marks_between_them_and_variants_may_have_accents(tmp_path):
    folder = make_named(tmp_path, "fgvc_aircraft")
    names = [*(name.encode() for name in VARIANTS), normalize("NFD", "Émeraude").encode()]
    (folder / "variants.txt").write_bytes(b"\r\n".join(BOM + name for name in names))
    rows = [f"{number} {name}" for number, name in AIRCRAFT["test"]] + ["0747566 Émeraude"]
    (folder / "images_variant_test.txt").write_bytes(b"\n".join(BOM + row.encode() for row in rows))
    assert load_named("fgvc_aircraft", "test", str(tmp_path)).labels == [2, 3, 0, 4]


def test_files_beside_the_images_of_imagenet_are_counted(tmp_path, capsys):
    folder = make_named(tmp_path, "imagenet")
    before = load_named("imagenet", "train", str(tmp_path)).passed_over
    for name in ("._n01440764_18.JPEG", "notes", "a.heic", "@eaDir/x.jpg"):
        write(folder / "images/train/n01440764" / name, encoded())
    split = load_split("imagenet", "train", None, str(tmp_path))
    more = {why: many - before.get(why, 0) for why, many in split.passed_over.items() if many != before.get(why)}
    assert more == {"ending .heic": 1, "no ending": 1, "hidden or in system folders": 2}
    assert f"imagenet {tmp_path}: passed over" in capsys.readouterr().err


@pytest.mark.parametrize("seed", range(8))
def test_every_row_of_a_list_is_an_image_or_an_error_that_names_it(tmp_path, seed):
    rng = random.Random(seed)
    folder, parts = make_named(tmp_path, "dtd"), COPIES["dtd"].split()
    rows, missing = parts["test"], []
    for n, (path, label, name) in enumerate(rows):
        stem = rng.choice(["é", "e\u0301", "x.v2", "UP", "a b", "日本"]) + str(n)
        rows[n] = [f"{name}/{stem}.jpg", label, name]
        if rng.random() < 0.7 or n in (0, len(rows) - 1):
            form = rng.choice(["NFC", "NFD"])
            write(folder / "images" / normalize(form, rows[n][0]), (folder / "images" / path).read_bytes())
        else:
            missing.append(n)
    write(folder / COPIES["dtd"].file, json.dumps(parts))
    split = load_named("dtd", "test", str(tmp_path))
    assert split.ids == [path for path, *_ in rows]
    for n in range(len(rows)):
        if n in missing:
            with pytest.raises(UserError, match="is missing") as caught:
                split.image(n)
            assert rows[n][0] in str(caught.value)
        else:
            assert split.image(n).size == (6, 4)
