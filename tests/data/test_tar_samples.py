import random
from collections import Counter

import pytest
from fsspec.implementations.memory import MemoryFileSystem
from helpers.tars import tar_of

from patchrank.data.readers.file_tree import HIDDEN
from patchrank.data.readers.tar_samples import read_samples
from patchrank.utils.errors import UserError


def read(*members):
    """Samples of a tar by name, as (image, label, captions), and what was passed over."""
    filesystem, content = MemoryFileSystem(), tar_of(members)
    filesystem.pipe_file("/tar_samples/x.tar", content)
    samples, passed_over = read_samples(filesystem, "/tar_samples/x.tar", str(hash(content)))
    shown = {one.name: (content[one.start : one.end].decode(), one.label, one.captions) for one in samples}
    assert len(shown) == len(samples)
    return shown, dict(passed_over)


def named(*names):
    """Members that hold their own names: labels without .cls, captions without .txt."""
    return [(name, name if not name.lower().endswith((".cls", ".txt")) else name[:-4]) for name in names]


@pytest.mark.parametrize(
    "names, samples, passed_over",
    [
        # the case that lost its label and caption
        (["a.v2.jpg", "a.v2.cls", "a.v2.txt"], {"a": ("a.v2.jpg", "a.v2", ("a.v2",))}, {}),
        # siblings: labels called by the image's whole name, and endings in capitals
        (["photo.jpg", "photo.jpg.cls"], {"photo": ("photo.jpg", "photo.jpg", None)}, {}),
        (["a.V2.JPG", "a.v2.CLS", "a.v2.Txt"], {"a": ("a.V2.JPG", "a.v2", ("a.v2",))}, {}),
        # frames of one key, each with its own label
        (
            ["image.0001.jpg", "image.0001.cls", "image.0002.jpg", "image.0002.cls"],
            {
                "image.0001": ("image.0001.jpg", "image.0001", None),
                "image.0002": ("image.0002.jpg", "image.0002", None),
            },
            {},
        ),
        (
            ["d.1/image.A.jpg", "d.1/image.B.jpg"],
            {f"d.1/image.{x}": (f"d.1/image.{x}.jpg", None, None) for x in "AB"},
            {},
        ),
        # two versions, both labelled
        (
            ["a.jpg", "a.v2.jpg", "a.v2.cls", "a.cls"],
            {"a": ("a.jpg", "a", None), "a.v2": ("a.v2.jpg", "a.v2", None)},
            {},
        ),
        # as before: WebDataset's samples of several members
        (["a.0.webp", "a.cls"], {"a": ("a.0.webp", "a", None)}, {}),
        (["a.jpg", "a.seg.png", "a.cls"], {"a": ("a.jpg", "a", None)}, {"further images of a sample": 1}),
        (["a.scores.npy", "a.jpg", "a.pkl", "a"], {"a": ("a.jpg", None, None)}, {"no ending": 1}),
        # labels that fit no image
        (["a.jpg", "a.v2.cls"], {"a": ("a.jpg", None, None)}, {"ending .cls beside no image of that name": 1}),
        (
            ["a.v2.jpg", "a.cls", "a.v2.cls"],
            {"a": ("a.v2.jpg", "a.v2", None)},
            {"ending .cls beside no image of that name": 1},
        ),
        (["a.jpg", "b.cls", "b.txt"], {"a": ("a.jpg", None, None)}, {"ending .cls": 1, "ending .txt": 1}),
        (
            ["a.jpg", "a.text", "a.Label"],
            {"a": ("a.jpg", None, None)},
            {"ending .text (try .txt)": 1, "ending .label (try .cls)": 1},
        ),
        # what systems leave
        (["._a.jpg", "a.jpg", "./._b.jpg", "d/._c.jpg"], {"a": ("a.jpg", None, None)}, {HIDDEN: 3}),
        (
            ["a.jpg", ".git/b.jpg", "./d/.@__thumb/a.jpg", "./c.jpg", "../e.jpg", "/f.jpg"],
            {key: (f"{key}.jpg", None, None) for key in ("a", "./c", "../e", "/f")},
            {HIDDEN: 2},
        ),
        (
            ["__MACOSX/._a.jpg", "__MACOSX/d/a.jpg", "@eaDir/a.jpg/SYNOPHOTO_THUMB_M.jpg", "a.jpg"],
            {"a": ("a.jpg", None, None)},
            {HIDDEN: 3},
        ),
        # images of other types
        (
            ["a.jpg", "b.heic", "b.cls", "c.jxl", "d.jpg_large", "e", "f.0017", "g."],
            {"a": ("a.jpg", None, None)},
            {f"ending .{kind}": 1 for kind in ("heic", "cls", "jxl", "jpg_large")}
            | {"no ending": 2, "other endings": 1},
        ),
    ],
)
def test_what_belongs_together(names, samples, passed_over):
    assert read(*named(*names)) == (samples, passed_over)


def test_what_is_no_file_is_counted_and_folders_are_not():
    others = [("d", None, "folder"), ("d/b.jpg", None, "link"), ("d/c.jpg", None, "hard link"), ("d/p", None, "pipe")]
    samples, passed_over = read(*others, ("d/a.jpg", "pixels"))
    assert samples == {"d/a": ("pixels", None, None)} and passed_over == {"links": 2, "special files": 1}


@pytest.mark.parametrize(
    "texts, label, captions",
    [
        ({"cls": "\ufeff 7\r\n"}, 7, None),
        ({"cls": "\ufeffred fox\r\n", "txt": "\ufeffa fox\r\n"}, "red fox", ("a fox",)),
        ({"txt": "a fox\r\na red one \n\n a fox\n"}, None, ("a fox", "a red one", "a fox")),
        ({"txt": "", "json": '{"caption": null}'}, None, ("",)),  # what img2dataset writes where there is no caption
        ({"json": '\ufeff{"caption": "a fox"}'}, None, ("a fox",)),
        ({"json": '{"captions": ["a fox", "a red one"]}'}, None, ("a fox", "a red one")),
        ({"json": '{"caption": ["a fox", "a red one"]}'}, None, ("a fox", "a red one")),
        ({"json": '{"captions": [{"text": "not ours"}], "caption": 5}'}, None, None),
        ({"json": '["a fox"]'}, None, None),
        ({"txt": "a fox", "json": '{"caption": "another"}'}, None, ("a fox",)),
    ],
)
def test_texts(texts, label, captions):
    samples, passed_over = read(("a.jpg", "pixels"), *((f"a.{kind}", text) for kind, text in texts.items()))
    assert samples == {"a": ("pixels", label, captions)} and passed_over == {}


def test_texts_that_no_sample_needs_may_be_of_any_size_and_kind():
    long = b"\xff" * ((1 << 20) + 1)
    samples, passed_over = read(("readme.txt", long), ("a.jpg", "pixels"), ("a.txt", "a fox"), ("a.json", long))
    assert samples == {"a": ("pixels", None, ("a fox",))} and passed_over == {"ending .txt": 1}
    with pytest.raises(UserError, match="x.tar, sample 'a', member a.v2.txt: is 1048577 bytes long, but a text may"):
        read(("a.v2.jpg", "pixels"), ("a.v2.txt", long))


ODD = ["._{}.jpg", "d/.{}.cls", "__MACOSX/{}.jpg", "@eaDir/{}.png", "Makefile{}", "__{}__", "v1.0/{}"]


def drawn(seed):
    """Members in some order, the names of those that may be part of samples, and how many others are no folders."""
    draw = random.Random(seed)
    odd = [(draw.choice(ODD).format(n), "odd") for n in range(draw.randrange(4))]
    odd += [(f"{n}.jpg", None, draw.choice(["link", "hard link", "pipe"])) for n in range(draw.randrange(3))]
    groups = []
    for key in draw.sample(["a", "b", "é", "d/a", "v1.0/c", "./e", "x y"], draw.randrange(1, 7)):
        infixes = draw.sample(["", "v2.", "0001.", "jpg.", "x.y."], draw.choice([1, 1, 2, 3]))
        pictures = draw.choice([["jpg"], ["PNG"], ["jpg"], ["PNG"], ["jpg", "PNG"]])
        kinds = [*pictures, "cls", "Txt", "heic", "npy", "label"]
        names = [f"{key}.{infix}{kind}" for infix in infixes for kind in draw.sample(kinds, draw.randrange(1, 5))]
        groups.append(draw.sample(names, len(names)))
    parts = [named(*group) for group in groups] + [[member] for member in odd] + [[("folder", None, "folder")]]
    draw.shuffle(parts)
    return sum(parts, []), sum(groups, []), len(odd)


def parts_of(name):
    """Key, what stands between the dots, and ending of a member's name: `d/a`, `v2.`, `jpg`."""
    folder, slash, base = name.rpartition("/")
    key, *infix, kind = base.split(".")
    return folder + slash + key, "".join(f"{part}." for part in infix), kind.lower()


def is_refused(names):
    """Whether two images have one name, or several images with infixes one label or caption without."""
    for key in {parts_of(name)[0] for name in names}:
        own = [parts_of(name)[1:] for name in names if parts_of(name)[0] == key]
        infixes = [infix for infix, kind in own if kind in ("jpg", "png")]
        for_all = any(not infix and kind in ("cls", "txt") for infix, kind in own)
        if len(set(infixes)) < len(infixes) or (len(infixes) > 1 and "" not in infixes and for_all):
            return True
    return False


@pytest.mark.parametrize("seed", range(60))
def test_every_member_is_part_of_a_sample_or_counted(seed):
    members, names, odd = drawn(seed)
    if is_refused(names):
        with pytest.raises(UserError, match="sample .* holds . images"):
            read(*members)
        return
    samples, passed_over = read(*members)
    images = [name for name in names if parts_of(name)[2] in ("jpg", "png")]
    keys = Counter(parts_of(image)[0] for image in images)
    used = 0
    for image, label, captions in samples.values():
        key, infix, _ = parts_of(image)
        for text in [label, *(captions or ())]:
            used += text is not None
            own = f"{text}." in (f"{key}.{infix}", f"{image.lower()}.") or (text == key and keys[key] == 1)
            assert text is None or own
    companions = [name for name in names if parts_of(name)[2] in ("heic", "npy") and keys[parts_of(name)[0]]]
    assert {image for image, *_ in samples.values()} <= set(images)
    assert len(images) == len(samples) + passed_over.get("further images of a sample", 0)
    assert len(names) + odd == len(samples) + used + len(companions) + sum(passed_over.values())
