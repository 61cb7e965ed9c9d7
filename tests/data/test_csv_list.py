import random
import unicodedata
from collections import defaultdict

import fsspec
import numpy as np
import pytest
from helpers.image_files import encoded, pixels, write

from patchrank.data.readers.folder import load_folder
from patchrank.utils.errors import UserError


def load(root, split="all"):
    return load_folder("folder", split, str(root))


@pytest.fixture
def listed(tmp_path):
    """Images and a way to write the CSV file that lists them."""
    for n, name in enumerate(["a.png", "b.png", "sub/c.png"]):
        write(tmp_path / "data" / name, encoded(pixels(seed=n)))
    return lambda text: write(tmp_path / "data" / "list.csv", text)


def test_a_csv_file_lists_paths_labels_captions_and_splits(listed, tmp_path):
    path = listed(
        "\ufeffcaption, Label ,path,split,score\n"
        '"a dog, asleep",dog,sub/c.png,train,1\n'
        "a cat,cat,./a.png,train,2\n\n"
        f"x,emu,{tmp_path}/data/b.png,dev,3\n"
    )
    train = load(path, "train")
    assert (train.ids, train.labels, train.classes) == (["a.png", "sub/c.png"], [0, 1], ("cat", "dog", "emu"))
    assert train.captions == [("a cat",), ("a dog, asleep",)]
    assert np.array_equal(np.asarray(train.image(1)), pixels(seed=2))
    dev = load(path, "dev")
    assert dev.ids == [f"{tmp_path}/data/b.png"] and dev.read(0) == (tmp_path / "data/b.png").read_bytes()
    with pytest.raises(UserError, match="split 'test' does not exist; .*known: all, dev, train"):
        load(path, "test")


def test_a_csv_file_of_paths_alone_and_behind_a_url(listed):
    path = listed("path\nsub/c.png\na.png\n")
    split = load(path)
    assert (split.ids, split.labels, split.classes, split.captions) == (["a.png", "sub/c.png"], None, (), None)
    fsspec.filesystem("memory").put(str(path.parent), "/listed_by_csv", recursive=True)
    there = load("memory://listed_by_csv/list.csv")
    assert there.ids == split.ids and there.read(1) == split.read(1)


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "list.csv: the file is empty, but must list images below a header with the column 'path'"),
        ("\ufeff \n\n", "the file is empty"),
        ("\npath\na.png\n", "line 1: is empty, but must be a header with the column 'path'"),
        ("path\na.png\nb\0.png\n", "line 3(, column 'path': holds a NUL character|: not readable as CSV .*NUL)"),
        ("file;label\na.png;cat\n", "line 1: column 'path' is missing; .*known: file;label; the first line must name"),
        ("image_name| comment_number| comment\na.png| 0| a cat\n", "column 'path' is missing; .*commas, semicolons or"),
        ("path,path\na.png,b.png\n", "line 1: column 'path' stands twice"),
        ("path,label\na.png,cat\n,dog\n", "line 3, column 'path': is empty"),
        ("path,split\na.png,train\nb.png,\n", "line 3, column 'split': is empty"),
        ("path,label\na.png,cat\nb.png\n", "line 3: has no label, but .*line 2 has"),
        ("path,caption\na.png,\nb.png,hello\n", "line 2: has no captions, but .*line 3 has"),
        ("path\na.png,cat\n", "line 2: has more cells than the header"),
        ("path,label\na.png,cat\nb.png,cat\n./a.png,dog\n", "line 2 and .*line 4: both are image 'a.png'"),
        ('path\n"a.png\n', "line 2: not readable as CSV"),
        ("path\n", "holds no images"),
        (b"path\n\xff\xfe.png\n", "is not a text file in UTF-8"),
    ],
)
def test_csv_files_that_do_not_say_it(listed, text, message):
    path = listed(text)
    with pytest.raises(UserError, match=message) as caught:
        load(path)
    assert "\n" not in str(caught.value) and "list.csv" in str(caught.value)


def test_an_image_may_have_a_caption_in_each_of_several_rows(listed):
    path = listed(
        "path,label,caption\na.png,cat,a cat\nsub/c.png,dog,a dog\n./a.png,cat,a kitten\na.png,cat,a cat\n"
        "sub/c.png,dog,a puppy\n"
    )
    split = load(path)
    assert split.ids == ["a.png", "sub/c.png"] and split.labels == [0, 1]
    assert split.captions == [("a cat", "a kitten", "a cat"), ("a dog", "a puppy")]
    assert split.mixed().take([0]).captions == [split.captions[split.ids.index(split.mixed().ids[0])]]
    assert split.numbered_captions() == (["a cat", "a kitten", "a dog", "a puppy"], [[0, 1], [2, 3]])


@pytest.mark.parametrize(
    "text, message",
    [
        (
            "path,label,caption\na.png,cat,x\nb.png,cat,y\na.png,dog,z\n",
            "line 2 and .*line 4: both are image 'a.png', but column 'label' says 'cat' and 'dog'; only the captions",
        ),
        (
            "path,split,caption\na.png,train,x\na.png,test,y\n",
            "line 2 and .*line 3: both are image 'a.png', but column 'split' says 'train' and 'test'",
        ),
        ("path,group,caption\na.png,g,x\na.png,h,y\n", "but column 'group' says 'g' and 'h'"),
        ("path,caption\na.png,x\na.png,\n", "which must stand once, or have a caption in each of its rows"),
        ("path\na.png\na.png\n", "which must stand once, or have a caption in each of its rows"),
    ],
)
def test_rows_of_one_image_that_say_different_things(listed, text, message):
    with pytest.raises(UserError, match=message) as caught:
        load(listed(text))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "path;label;caption\r\na.png;cat;a cat, asleep\r\nb.png;dog;a dog\r\n",  # Excel in Germany
        '\ufeff"path";"label";"caption"\r\n"a.png";"cat";"a cat, asleep"\r\n"b.png";"dog";"a dog"\r\n',
        "Path\tLabel\tCaption\na.png\tcat\ta cat, asleep\nb.png\tdog\ta dog\n",
        "filepath\ttitle\tlabel\na.png\ta cat, asleep\tcat\nb.png\ta dog\tdog\n",  # open_clip's training
        'path, label, caption\na.png, cat, "a cat, asleep"\nb.png, dog, "a dog"\n',
        '"path", "label", "caption"\n"a.png", "cat", "a cat, asleep"\n"b.png", "dog", "a dog"\n',
        'title,label,filepath\n"a cat, asleep",cat,a.png\na dog,dog,b.png\n',
        # a spreadsheet's blank rows
        'path,label,caption\n,,\na.png,cat,"a cat, asleep"\n  ,\nb.png,dog,a dog\n,,,,,\n\n',
    ],
)
def test_what_separates_columns_and_blank_rows_change_nothing(listed, text):
    split = load(listed(text))
    assert (split.ids, split.labels, split.classes) == (["a.png", "b.png"], [0, 1], ("cat", "dog"))
    assert split.captions == [("a cat, asleep",), ("a dog",)]


def test_columns_that_are_not_read_are_named(listed, capsys):
    load(listed("path,Class,captions,title\na.png,cat,x,y\n"))
    assert (
        "list.csv: columns not read: 'class', 'captions', 'title' (those that are read: path,"
        in capsys.readouterr().err
    )
    load(listed(",".join(["path", *(f"c{n}" for n in range(20))]) + "\na.png\n"))
    assert "'c7' and 12 more (those that" in capsys.readouterr().err
    load(listed("path,label\na.png,cat\n"))
    assert capsys.readouterr().err == ""


NFC, NFD = "NFC", "NFD"


@pytest.mark.parametrize("on_disk, in_list", [(NFC, NFD), (NFD, NFC), (NFC, NFC)])
@pytest.mark.parametrize("absolute", [False, True])
def test_accents_are_found_however_they_are_spelled(tmp_path, on_disk, in_list, absolute):
    name = unicodedata.normalize(on_disk, "fotos/Café/é ñ.png")
    write(tmp_path / name, encoded(pixels(seed=3)))
    row = f"{tmp_path}/" * absolute + unicodedata.normalize(in_list, "fotos/Café/é ñ.png")
    split = load(write(tmp_path / "list.csv", f"path\n{row}\n"))
    assert split.ids == [row] and np.array_equal(np.asarray(split.image(0)), pixels(seed=3))


def test_parts_of_a_path_may_be_spelled_differently(tmp_path):
    folder, file = unicodedata.normalize(NFD, "Café"), unicodedata.normalize(NFC, "é.png")
    write(tmp_path / folder / file, encoded(pixels(seed=4)))
    row = unicodedata.normalize(NFC, folder) + "/" + unicodedata.normalize(NFD, file)
    assert np.array_equal(np.asarray(load(write(tmp_path / "list.csv", f"path\n{row}\n")).image(0)), pixels(seed=4))
    with pytest.raises(UserError, match="cannot be read .No such file"):
        load(write(tmp_path / "list.csv", f"path\n{row}.png\n")).image(0)


def test_a_class_that_is_spelled_in_two_ways_is_one(listed):
    spelled = [unicodedata.normalize(form, "Café") for form in (NFC, NFD)]
    split = load(listed(f"path,label\na.png,{spelled[0]}\nb.png,{spelled[1]}\nsub/c.png,bar\n"))
    assert split.classes == (spelled[0], "bar") and split.labels == [0, 0, 1]


def written(rows, draw):
    """A CSV file of these rows, by some program."""
    delimiter, end, mark = draw.choice(",;\t"), draw.choice(["\n", "\r\n"]), draw.choice(["", "\ufeff"])
    columns = draw.sample([*rows[0], "score"], len(rows[0]) + 1)
    lines = [delimiter.join(draw.choice([name, name.upper(), f" {name} "]) for name in columns)]
    for row in rows:
        cells = ['"' + str(row.get(name, "1.5")).replace('"', '""') + '"' for name in columns]
        lines += [delimiter.join(cells), *draw.choice([[], [], ["", delimiter * (len(columns) - 1)]])]
    return mark + end.join(lines) + draw.choice(["", end])


@pytest.mark.parametrize("seed", range(40))
def test_every_row_is_an_image_or_a_caption_of_one(tmp_path, seed):
    draw = random.Random(seed)
    texts = ["a cat; asleep", 'a "cat"', "ein Äffchen, müde", "two\tcats", "two\nlines", "cats"]
    about = {f"{n}.png": {"label": draw.choice("ab"), "split": draw.choice(["train", "dev"])} for n in range(6)}
    captioned = draw.random() < 0.8
    rows, expected = [], defaultdict(list)
    for path in draw.choices(sorted(about), k=12) if captioned else draw.sample(sorted(about), 5):
        rows.append({"path": path, **about[path]} | ({"caption": draw.choice(texts)} if captioned else {}))
        expected[path].append(rows[-1].get("caption"))
    split = load(write(tmp_path / "list.csv", written(rows, draw)))
    assert split.ids == sorted(expected) and split.passed_over == {}
    assert split.captions == ([tuple(expected[path]) for path in split.ids] if captioned else None)
    assert [split.classes[label] for label in split.labels] == [about[path]["label"] for path in split.ids]
    for name in {row["split"] for row in rows}:
        part = load(tmp_path / "list.csv", name)
        assert part.ids == [path for path in split.ids if about[path]["split"] == name]
