"""Published weights on the Hugging Face hub: downloads, and one line within seconds where the hub cannot be reached.

The hub's own client tries for 23 seconds before it gives up on a file that is not cached.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from threading import Thread

from huggingface_hub import constants, hf_hub_download, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from huggingface_hub.utils import get_session

from patchrank.models.pretrained import Weights
from patchrank.utils.errors import UserError, one_line

TIMEOUT = 3.0  # seconds to look up the hub's name, to connect and to get an answer
MAX_REASON = 300  # characters; requests names the cause last
OPEN_CLIP_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
CLIP_MODEL_FILES = ("model.safetensors", "pytorch_model.bin")
FOLDER_WEIGHTS = tuple(f"{name}{index}" for name in CLIP_MODEL_FILES for index in ("", ".index.json"))
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
FOLDER_FILES = ("*.json", "*.txt", "*.model")  # configs and tokenizers


def ensure_reachable(
    repo_id: str, filenames: Sequence[str], cache_dir: str | Path | None = None, whole: bool = False
) -> None:
    """Returns at once if a file of a hub repository is cached, and else as soon as the hub answers.

    Args:
        repo_id: `owner/name`, or `owner/name@revision` as timm writes it.
        filenames: any one of them will do; the first is what an error tells to download.
        cache_dir: where the hub's cache is, if not in its usual place.
        whole: that all of the repository is needed, and not one file.

    Raises:
        UserError: none is cached, and the hub does not answer or must not be asked; says what to do instead.
    """
    repo, _, revision = repo_id.partition("@")
    for name in filenames:
        if isinstance(try_to_load_from_cache(repo, name, cache_dir=cache_dir, revision=revision or None), str):
            return
    if obstacle := _obstacle():
        what = "folder that is here" if whole else "checkpoint file"
        download = repo if whole else f"{repo} {filenames[0]}"
        raise UserError(
            f"weights {repo_id} are not in the cache {cache_dir or constants.HF_HUB_CACHE}, and {obstacle}: give a "
            f"{what}, or run `hf download {download}` on a machine with a network and set HF_HOME to a copy of that "
            "machine's"
        )


def _obstacle() -> str | None:
    """What keeps us from asking the hub; None where it answers, be it with an error."""
    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    found: list[str | None] = []

    def ask() -> None:
        try:
            get_session().head(constants.ENDPOINT, timeout=TIMEOUT)
            found.append(None)
        except Exception as error:  # httpx's or requests', by the version of the hub's client
            found.append(f"{constants.ENDPOINT} cannot be reached ({one_line(error)[:MAX_REASON]})")

    # The client bounds each of the hub's addresses, not all of them (four that drop packets take 12 s), and no look-up
    # of its name (one name server that keeps silent takes 6 s). A daemon thread can be left alone.
    probe = Thread(target=ask, daemon=True)
    probe.start()
    probe.join(TIMEOUT)
    return found[0] if found else f"{constants.ENDPOINT} gives no answer within {TIMEOUT:g} seconds"


def download_pair(weights: Weights) -> str:
    """The local path of the file that holds both towers of some published weights, from the hub's cache or the hub.

    Raises:
        UserError: the hub cannot be reached, or has no such file for us; says what to do instead.
    """
    if weights.clip_repo is None:
        return download_open_clip(*weights.open_clip)
    return download_file(weights.clip_repo, CLIP_MODEL_FILES)


def download_open_clip(model: str, tag: str) -> str:
    """As `download_pair`, by the names of a model and a tag that open_clip knows."""
    from open_clip.pretrained import get_pretrained_cfg

    repo, _, name = get_pretrained_cfg(model, tag)["hf_hub"].rpartition("/")
    return download_file(repo, (name,) if name else OPEN_CLIP_FILES)


def download_file(repo: str, files: Sequence[str]) -> str:
    """The first of the files that a hub repository has, from its cache or the hub.

    Args:
        repo: `owner/name`, or `owner/name@revision`.

    Raises:
        UserError: as `download_pair` does.
    """
    ensure_reachable(repo, files)
    repo_id, _, revision = repo.partition("@")
    where = {"revision": revision} if revision else {}
    for name in files:
        try:
            return hf_hub_download(repo_id, name, **where)
        except LocalEntryNotFoundError as error:  # the connection broke, so nobody knows whether there is such a file
            raise UserError(f"weights {repo}: the hub went away; give a checkpoint file, or try again") from error
        except EntryNotFoundError:
            continue
        except Exception as error:  # its client's own kinds, by its version: no access, no space, a broken connection
            says = f"{name} cannot be downloaded ({one_line(error)[:MAX_REASON]})"
            raise UserError(f"weights {repo}: {says}; give a checkpoint file") from error
    raise UserError(f"weights {repo}: has none of {', '.join(files)}; give a checkpoint file")


def weights_in(folder: Path) -> Path:
    """The file of weights in a folder of transformers' or timm's; the folder itself where there is none.

    Files of open_clip may lie beside it, which other readers of folders would take.
    """
    return next((folder / name for name in FOLDER_WEIGHTS if (folder / name).is_file()), folder)


def download_folder(repo: str, weights: bool = True) -> Path:
    """The local folder of a repository of transformers' or timm's, from the hub's cache or the hub.

    It has configs, the files of a tokenizer, and its weights as safetensors, or as pickles where it has no others.

    Args:
        repo: `owner/name`, or `owner/name@revision`.
        weights: False for the rest alone.

    Raises:
        UserError: as `download_pair` does.
    """
    ensure_reachable(repo, FOLDER_WEIGHTS if weights else ("config.json",), whole=True)
    repo_id, _, revision = repo.partition("@")
    patterns = (*FOLDER_FILES, "model*.safetensors") if weights else FOLDER_FILES
    try:
        folder = Path(snapshot_download(repo_id, revision=revision or None, allow_patterns=[*patterns]))
        if weights and not any((folder / name).exists() for name in FOLDER_WEIGHTS):
            snapshot_download(repo_id, revision=revision or None, allow_patterns=["pytorch_model*.bin"])
    except Exception as error:  # its client's own kinds, by its version: no such repository, no access, no space
        says = f"cannot be downloaded ({one_line(error)[:MAX_REASON]})"
        raise UserError(f"weights {repo}: {says}; give a folder that is here") from error
    return folder
