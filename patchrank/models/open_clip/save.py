"""A pair that `open_clip:...` named, as files that open_clip and `create_clip` load, wherever its own files lie."""

from __future__ import annotations

from pathlib import Path

from open_clip.constants import HF_CONFIG_NAME, HF_SAFE_WEIGHTS_NAME
from open_clip.transform import merge_preprocess_dict
from safetensors.torch import save_file

from patchrank.io import write_json
from patchrank.models.open_clip.by_name import Config, create_model, find_config
from patchrank.models.open_clip.pair import from_open_clip
from patchrank.models.open_clip.prune import prune_open_clip
from patchrank.models.pair import Clip

NOT_OURS = ("init_logit_bias", "nonscalar_logit_scale")  # a pair of ours has one scale and no bias
FILES = (HF_CONFIG_NAME, HF_SAFE_WEIGHTS_NAME)


def save_open_clip(clip: Clip, name: str, folder: Path) -> None:
    """Writes a pair's config and weights as `open_clip.create_model("local-dir:FOLDER")` reads them, without pruning.

    `create_clip("open_clip:FOLDER/open_clip_config.json", checkpoint=FOLDER)` is the pair again.

    Args:
        clip: on any device; pruning and prompts are not written.
        name: what `create_clip` was asked for.
        folder: local, and there.

    Raises:
        UserError: the config is no longer there.
    """
    found = find_config(name)
    settings = {key: value for key, value in found.model.items() if key not in NOT_OURS}
    images = merge_preprocess_dict({}, found.preprocess)
    model = create_model(Config(settings, images), f"model {name}")
    prune_open_clip(model, locations=(1,))  # which has weights by both names; nothing is pruned
    from_open_clip(model, clip.name, clip.tokenizer).load_state_dict(clip.state_dict())
    save_file({key: value.clone().contiguous() for key, value in model.state_dict().items()}, folder / FILES[1])
    write_json(folder / FILES[0], {"model_cfg": settings, "preprocess_cfg": images})
