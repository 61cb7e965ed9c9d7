"""Reading and writing: paths or fsspec URLs, whole files at a time, never half-written."""

from patchrank.files.fetched import cache_folder as cache_folder
from patchrank.files.fetched import local_copy as local_copy
from patchrank.files.fingerprints import content_id as content_id
from patchrank.files.fingerprints import weights_sha256 as weights_sha256
from patchrank.files.patience import patiently as patiently
from patchrank.files.places import filesystem_of as filesystem_of
from patchrank.files.places import is_remote as is_remote
from patchrank.files.places import join as join
from patchrank.files.places import resolve as resolve
from patchrank.files.whole import check_reachable as check_reachable
from patchrank.files.whole import check_writable as check_writable
from patchrank.files.whole import exists as exists
from patchrank.files.whole import list_names as list_names
from patchrank.files.whole import read_bytes as read_bytes
from patchrank.files.whole import read_json as read_json
from patchrank.files.whole import remove as remove
from patchrank.files.whole import write_atomic as write_atomic
from patchrank.files.whole import write_json as write_json
