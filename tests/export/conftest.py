import pytest
from helpers.toy_exports import export_answering


@pytest.fixture(scope="session")
def answering(tmp_path_factory):
    """A pair of toy size that names classes, and its files: exporting takes seconds, so tests share them."""
    return export_answering(tmp_path_factory.mktemp("answering"))
