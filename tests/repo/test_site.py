"""The site of docs/, built by the command that docs/contributing.md prints. It is strict: a warning ends it."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import patchrank

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
(COMMAND,) = re.findall(r"^python (-m mkdocs build .*)$", (DOCS / "contributing.md").read_text(), re.M)
PAGES = sorted(path.relative_to(DOCS) for path in DOCS.rglob("*.md"))

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    pytest.importorskip("mkdocstrings")  # which Python 3.10 cannot have
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, *shlex.split(COMMAND), "--site-dir", folder]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert {line.split()[0] for line in (done.stdout + done.stderr).splitlines()} == {"INFO"}, done.stderr
    return folder


def content(site: Path, page: Path) -> str:
    """The HTML of a page, without what the theme puts around it."""
    built = site / page.with_name("index.html" if page.name == "README.md" else f"{page.stem}.html")
    return built.read_text().partition('role="main"')[2].partition("<footer>")[0]


def test_no_page_is_empty(site):
    words = {page: len(re.sub(r"<[^>]+>", " ", content(site, page)).split()) for page in PAGES}
    assert len(PAGES) > 20 and [page for page, number in words.items() if number < 100] == []


def test_lists_tables_and_blocks_are_made_of_all_pages(site):
    """Python-Markdown wants an empty line before a list and a table, where code hosts want none."""
    raw = re.compile(r"<p>(?:[^<]*\n)?(?:- |\| |```)")
    assert [page for page in PAGES if raw.search(content(site, page))] == []


def test_the_api_page_describes_the_public_names(site):
    described = dict(re.findall(r'<h3 id="([\w.]+)"(.*?)(?=<h[23] |$)', content(site, Path("api.md")), re.S))
    for name, module in patchrank.PUBLIC.items():
        section = described[f"{module}.{name}"]
        words = re.sub(r"<[^>]+>", " ", section.partition('class="doc doc-contents')[2]).split()
        assert name in section.partition("</h3>")[0] and len(words) > 10, name


def test_nothing_is_fetched_from_elsewhere(site):
    fetched = re.compile(r"""<(?:script|img|iframe)[^>]*\ssrc="(?:https?:)?//|<link[^>]*\shref="(?:https?:)?//""")
    assert [file for file in site.rglob("*.html") if fetched.search(file.read_text())] == []
    assert [file for file in site.rglob("*.css") if re.search(r"url\(['\"]?(https?:)?//", file.read_text())] == []
