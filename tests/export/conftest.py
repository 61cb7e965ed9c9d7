import pytest
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
