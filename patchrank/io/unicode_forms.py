"""Names that look alike but differ in Unicode's normal form: macOS writes "é" as two characters, others as one."""

from __future__ import annotations

import unicodedata

from patchrank.io.files import exists, list_names
from patchrank.io.paths import join


def nfc(text: str) -> str:
    """A text in the form in which names are compared (NFC); ASCII stays as it is."""
    return unicodedata.normalize("NFC", text)


def stored_name(folder: str, name: str) -> str:
    """A path below a folder, in the Unicode forms in which its parts are stored there.

    Returns `name` itself where that is there, or where nothing is that equals it in NFC.
    """
    if name.isascii() or exists(join(folder, name)):
        return name
    found = ""
    for part in name.split("/"):
        alike = (other for other in list_names(join(folder, found) if found else folder) if nfc(other) == nfc(part))
        part = next(alike, None)
        if part is None:
            return name
        found = f"{found}/{part}" if found else part
    return found
