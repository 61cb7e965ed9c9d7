"""Published pairs from the hub: the file that holds both towers of a tag."""

from __future__ import annotations

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

from patchrank.models.checkpoints.hub import ensure_reachable
from patchrank.models.pretrained import Weights
from patchrank.utils.errors import UserError

OPEN_CLIP_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
CLIP_MODEL_FILES = ("model.safetensors", "pytorch_model.bin")


def download_pair(weights: Weights) -> str:
    """The local path of a tag's pair, from the hub's cache or the hub.

    Raises:
        UserError: the hub cannot be reached, or has no such file for us; says what to do instead.
    """
    repo, files = pair_files(weights)
    ensure_reachable(repo, files)
    for name in files:
        try:
            return hf_hub_download(repo, name)
        except EntryNotFoundError as error:
            if isinstance(error, LocalEntryNotFoundError):  # not that it is not there: the connection broke
                raise UserError(f"weights {repo}: the hub went away; give a checkpoint file, or try again") from error
        except Exception as error:  # its client's own kinds, by its version: no access, no space, a broken connection
            reason = " ".join(str(error).split())[:160]
            raise UserError(f"weights {repo}: {name} is not to be had ({reason}): give a checkpoint file") from error
    raise UserError(f"weights {repo}: has none of {', '.join(files)}; give a checkpoint file")


def pair_files(weights: Weights) -> tuple[str, tuple[str, ...]]:
    """The hub repository of a pair, and the names that its file may have, the preferred one first."""
    if weights.clip_repo is not None:
        return weights.clip_repo, CLIP_MODEL_FILES
    from open_clip.pretrained import get_pretrained_cfg

    repo, _, name = get_pretrained_cfg(*weights.open_clip)["hf_hub"].rpartition("/")
    return repo, (name,) if name else OPEN_CLIP_FILES
