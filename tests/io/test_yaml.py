"""YAML as people write it, and as nobody should."""

import pytest

from patchrank.io.yaml import parse_yaml
from patchrank.utils.errors import UserError

BOMB = "a: &a [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]\n"
BOMB += "".join(f"{y}: &{y} [{', '.join([f'*{x}'] * 10)}]\n" for x, y in zip("abcdefg", "bcdefgh"))


def test_anchors_and_merges_are_read():
    text = "base: &base {epochs: 1, lr: 1e-3}\nlong: {<<: *base, epochs: 9}\nagain: [*base, *base]"
    base = {"epochs": 1, "lr": 0.001}
    assert parse_yaml(text, "file") == {"base": base, "long": base | {"epochs": 9}, "again": [base, base]}


@pytest.mark.parametrize(
    "text, where, reason",
    [
        ("a: 1\na: 2", ", line 2", "key 'a' stands twice"),
        ("a: &x [*x]", ", line 1", "its aliases stand for more than 1,000,000 values"),
        ("a: &x {b: {c: *x}}", ", line 1", "its aliases stand for more than 1,000,000 values"),
        (BOMB, ", line 1", "its aliases stand for more than 1,000,000 values"),
        ("[" * 50_000, "", "maximum recursion depth exceeded"),
        ("a: 2026-13-45", "", "month must be in 1..12"),
        ("a: !!timestamp soon", "", "'NoneType' object has no"),
        ("a: !!int many", "", "invalid literal"),
        ("a: !!python/object/apply:os.system [ls]", ", line 1", "could not determine a constructor"),
        ('a: "\\ud800"', "", "'utf-8' codec can't encode"),
        ("a:\n\t- b", ", line 2", "found character"),
        ("a: \x00", "", "unacceptable character"),
        ("? [a]\n: b", ", line 1", "found unhashable key"),
        ("--- a\n--- b", ", line 2", "but found another document"),
    ],
)
def test_what_cannot_be_read_is_one_line_that_names_the_file(text, where, reason):
    with pytest.raises(UserError) as caught:
        parse_yaml(text, "file")
    assert str(caught.value).startswith(f"file{where}: not readable as YAML ({reason}")
    assert len(str(caught.value).splitlines()) == 1
