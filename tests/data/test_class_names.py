import pytest
from helpers.image_files import encoded, write

from patchrank.data.class_names import read_vocabulary
from patchrank.data.readers.folder import load_folder
from patchrank.utils.errors import UserError


def load(root, split="all"):
    return load_folder("folder", split, str(root))


@pytest.fixture
def pets(tmp_path):
    for name in ("cat/1.png", "cat/2.png", "dog/1.png"):
        write(tmp_path / "pets" / name, encoded())
    return tmp_path / "pets"


def vocabulary(tmp_path, text):
    return read_vocabulary(str(write(tmp_path / "names.yaml", text)))


def test_a_vocabulary_names_classes_and_templates(pets, tmp_path):
    split = load(pets)
    listed = vocabulary(tmp_path, "classes: [tabby cat, retriever]\ntemplates: ['a {}.', '{} asleep']\n").apply(split)
    assert listed.classes == ("tabby cat", "retriever") and listed.templates == ("a {}.", "{} asleep")
    assert listed.labels == split.labels
    renamed = vocabulary(tmp_path, "classes: {dog: golden retriever}\n").apply(split)
    assert renamed.classes == ("cat", "golden retriever") and renamed.templates == split.templates
    assert vocabulary(tmp_path, "{}").apply(split) == split
    assert vocabulary(tmp_path, "classes: [missile, missile]").apply(split).classes == ("missile", "missile")


def test_a_vocabulary_gives_classes_to_unlabelled_images(tmp_path):
    write(tmp_path / "pile" / "x.png", encoded())
    split = load(tmp_path / "pile")
    named = vocabulary(tmp_path, "classes: [cat, dog]").apply(split)
    assert named.classes == ("cat", "dog") and named.labels is None
    with pytest.raises(UserError, match="names.yaml: classes: is a mapping, but folder has no classes"):
        vocabulary(tmp_path, "classes: {cat: dog}").apply(split)


def test_numbers_of_folders_can_be_named(tmp_path):
    for name in ("0", "1"):
        write(tmp_path / "digits" / name / "x.png", encoded())
    assert vocabulary(tmp_path, "classes: {1: one}").apply(load(tmp_path / "digits")).classes == ("0", "one")


@pytest.mark.parametrize(
    "text, message",
    [
        ("class: [a, b]", "key 'class' does not exist; did you mean 'classes'"),
        ("classes: [a, b, c]", "classes: holds 3 names, but folder has 2 classes, from 'cat' to 'dog'"),
        ("classes: {dgo: hound}", "classes.dgo: folder has no such class; did you mean 'dog'"),
        ("classes: [cat, '']", "classes.1 is '', but must be a name"),
        ("classes: []", "classes is "),
        ("classes: [1, 2]", "classes.0 is 1, but must be a name, in quotes"),
        ("classes: cat", "classes is 'cat', but should be a valid"),
        ("templates: [a photo]", "templates.0 is 'a photo', but must hold exactly one {}"),
        ("templates: ['{}', 'a {} of {}']", "templates.1 is 'a {} of {}', but must hold exactly one {}"),
        ("templates: ['a {} {name}']", "templates.0 .* no other braces"),
        ("templates: 'a {}'", "templates is 'a {}', but should be a valid list"),
        ("[cat, dog]", "must hold a mapping"),
        ("classes: [cat", "line 1: not readable as YAML"),
        ("classes: !!python/object/apply:os.mkdir [x]", "not readable as YAML"),
    ],
)
def test_vocabularies_that_cannot_be_meant(pets, tmp_path, text, message):
    with pytest.raises(UserError, match=message) as caught:
        vocabulary(tmp_path, text).apply(load(pets))
    assert "names.yaml" in str(caught.value) and "\n" not in str(caught.value)


def test_a_vocabulary_must_be_there(tmp_path):
    with pytest.raises(UserError, match="none.yaml: cannot be read"):
        read_vocabulary(str(tmp_path / "none.yaml"))
