"""Reading and writing: paths or fsspec URLs, whole files at a time, never half-written."""

from patchrank.io.files import check_reachable as check_reachable
from patchrank.io.files import check_writable as check_writable
from patchrank.io.files import exists as exists
from patchrank.io.files import list_names as list_names
from patchrank.io.files import local_copy as local_copy
from patchrank.io.files import read_bytes as read_bytes
from patchrank.io.files import read_json as read_json
from patchrank.io.files import read_text as read_text
from patchrank.io.files import remove as remove
from patchrank.io.files import write_atomic as write_atomic
from patchrank.io.files import write_json as write_json
from patchrank.io.hashing import content_id as content_id
from patchrank.io.hashing import is_plain_tensor as is_plain_tensor
from patchrank.io.hashing import weights_sha256 as weights_sha256
from patchrank.io.paths import cache_folder as cache_folder
from patchrank.io.paths import filesystem_of as filesystem_of
from patchrank.io.paths import is_remote as is_remote
from patchrank.io.paths import join as join
from patchrank.io.paths import resolve as resolve
from patchrank.io.retry import patiently as patiently
from patchrank.io.unicode_forms import nfc as nfc
from patchrank.io.unicode_forms import stored_name as stored_name
