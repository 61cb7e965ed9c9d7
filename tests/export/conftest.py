import pytest
from helpers.image_files import encoded, pixels, write
from helpers.tiny_exports import write_files
from helpers.toy_exports import export_answering


@pytest.fixture(scope="session")
def answering(tmp_path_factory):
    """A pair of toy size that names classes, and its files: exporting takes seconds, so tests share them."""
    folder = tmp_path_factory.mktemp("answering") / "with a space"
    folder.mkdir()
    return export_answering(folder)


@pytest.fixture(scope="session")
def files(tmp_path_factory):
    """A file of each kind that weights come from, by the flag that names it."""
    return write_files(tmp_path_factory.mktemp("folder_of_this_machine"))


@pytest.fixture
def photos(tmp_path):
    """Flags that name twelve pictures of the file's three classes, by folders that a vocabulary names."""
    for seed in range(12):
        write(tmp_path / "photos" / f"n{seed % 3}" / f"{seed}.png", encoded(pixels(40, 50, seed=seed)))
    names = write(tmp_path / "names.yaml", "classes: {n0: a bird, n1: cat, n2: dog}")
    return ["--data", "folder", "--data-root", str(tmp_path / "photos"), "--vocabulary", str(names)]
