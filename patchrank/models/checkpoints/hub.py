"""Weights on the Hugging Face hub: whether they can be had, told within seconds where they cannot.

The hub's own client tries again for half a minute before it gives up on a file that is not cached.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from threading import Thread

from huggingface_hub import constants, try_to_load_from_cache
from huggingface_hub.utils import get_session

from patchrank.utils.errors import UserError

TIMEOUT = 3.0  # seconds, for finding the address, connecting and an answer together
MAX_REASON = 160  # characters


def ensure_reachable(repo_id: str, filenames: Sequence[str], cache_dir: str | Path | None = None) -> None:
    """Returns at once if a file of a hub repository is cached, and soon if the hub answers.

    Args:
        repo_id: `owner/name`, or `owner/name@revision` as timm writes it.
        filenames: any one of them will do; the first is what an error tells to download.
        cache_dir: where the hub's cache is, if not in its usual place.

    Raises:
        UserError: none is cached, and the hub does not answer or must not be asked; says what to do instead.
    """
    repo, _, revision = repo_id.partition("@")
    if any(_is_cached(repo, filename, cache_dir, revision or None) for filename in filenames):
        return
    obstacle = _obstacle()
    if obstacle:
        raise UserError(
            f"weights {repo_id} are not in the cache {cache_dir or constants.HF_HUB_CACHE}, and {obstacle}: give a "
            f"checkpoint file, or run `hf download {repo} {filenames[0]}` on a machine with a network and set HF_HOME "
            "to a copy of that machine's"
        )


def _is_cached(repo: str, filename: str, cache_dir: str | Path | None, revision: str | None) -> bool:
    return isinstance(try_to_load_from_cache(repo, filename, cache_dir=cache_dir, revision=revision), str)


def _obstacle() -> str | None:
    """What keeps us from asking the hub; None where it answers."""
    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    found: list[str | None] = []
    probe = Thread(target=_probe, args=(found,), daemon=True)  # no timeout of a client's bounds the name's look-up
    probe.start()
    probe.join(TIMEOUT)
    return found[0] if found else f"{constants.ENDPOINT} gives no answer within {TIMEOUT:g} seconds"


def _probe(found: list[str | None]) -> None:
    """Appends what went wrong, or None; any answer will do, be it that the page is forbidden."""
    try:
        get_session().head(constants.ENDPOINT, timeout=TIMEOUT)
    except Exception as error:  # httpx's or requests', by the version of the hub's client
        reason = " ".join(f"{error or type(error).__name__}".split())[:MAX_REASON]
        found.append(f"{constants.ENDPOINT} cannot be reached ({reason})")
    else:
        found.append(None)
