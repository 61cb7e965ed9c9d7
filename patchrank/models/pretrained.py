"""Published weights of CLIP's towers: where they are, and which images and activation they were trained with.

Their table is `pretrained.yaml`. A tag decides on the activation, since weights do not show it; a tower with the wrong
one runs, but is less accurate.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from timm.data import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from timm.models import get_model_input_config, list_models
from torch import nn

from patchrank.io.yaml import read_yaml
from patchrank.models.model_name import OTHERS, is_open_clip
from patchrank.utils.errors import UserError, near

WEIGHTS = Path(__file__).parent / "weights"

TABLE = read_yaml(Path(__file__).with_suffix(".yaml"))
TEXT_CFGS = {entry: about["text"] for entry, about in TABLE.items()}
"""Shape of the text tower that belongs to each entry."""


@dataclass(frozen=True, kw_only=True)
class Weights:
    """One set of published weights.

    entry: our timm entry.
    tag: timm's name for the weights.
    image_size: side of the square images that they were trained on.
    num_classes: width of the embedding.
    hub_id: timm's hub repository of the image tower; None for weights that come with the package.
    file: of weights that come with the package.
    quick_gelu: whether both towers were trained with OpenAI's activation in place of GELU.
    open_clip: model and tag of the pair by open_clip's names; None where open_clip does not have it.
    clip_repo: hub repository of the pair as transformers' `CLIPModel`, for pairs that open_clip does not have.
    """

    entry: str
    tag: str
    image_size: int = 224
    num_classes: int = 512
    hub_id: str | None = None
    file: Path | None = None
    quick_gelu: bool = False
    mean: tuple[float, ...] = OPENAI_CLIP_MEAN
    std: tuple[float, ...] = OPENAI_CLIP_STD
    license: str | None = None
    open_clip: tuple[str, str] | None = None
    clip_repo: str | None = None

    @property
    def name(self) -> str:
        """Our name for them, `patchrank_clip_b16.openai`."""
        return f"{self.entry}.{self.tag}"

    @property
    def act_layer(self) -> str:
        """Name of the image tower's activation, as timm takes it."""
        return "quick_gelu" if self.quick_gelu else "gelu"


def find_weights(name: str) -> Weights:
    """The weights of `patchrank_clip_b16.laion2b`, or those of the first tag for `patchrank_clip_b16`.

    Raises:
        UserError: an unknown entry or tag.
    """
    if not isinstance(name, str):
        raise UserError(f"model must be a name, such as 'patchrank_clip_b16', but is {name!r}")
    if ":" in name:
        prefix = name.partition(":")[0]
        raise UserError(
            f"model {name!r} does not exist: there are no models of the kind '{prefix}:'; try an entry of ours, such "
            f"as patchrank_clip_b16, or {OTHERS}"
        )
    entry = name.partition(".")[0]
    of_entry = {found.name: found for found in PUBLISHED.values() if found.entry == entry}
    if not of_entry:
        if known := by_open_clips_name(name):
            theirs = ", ".join(repr(found.name) for found in known)
            raise UserError(f"model {name!r} is open_clip's name for {known[0].entry}; try one of {theirs}")
        known = near(name, list_models("patchrank_*"))
        raise UserError(f"model {name!r} does not exist; {known}; or {OTHERS}")
    if name == entry:
        return next(iter(of_entry.values()))
    if name not in of_entry:
        raise UserError(f"model {name!r} does not exist; {near(name, of_entry)}")
    return of_entry[name]


def is_clip_entry(name: object) -> bool:
    """Whether a name means one of our entries of CLIP; others have no text tower of ours."""
    return isinstance(name, str) and name.partition(".")[0] in TEXT_CFGS


def surely_has_text(name: str) -> bool:
    """Whether a model's name tells that it has a text tower; of other libraries' models none does."""
    return is_open_clip(name) or is_clip_entry(name)


def by_open_clips_name(model: str, tag: str | None = None) -> list[Weights]:
    """The weights that open_clip knows by a model's name and a tag; without a tag, all of that model."""
    asked, found = model.replace("/", "-").removesuffix("-quickgelu"), []
    for weights in PUBLISHED.values():
        name, own_tag = weights.open_clip or ("", None)
        if name and name.removesuffix("-quickgelu") == asked and tag in (None, own_tag):
            found.append(weights)
    return found


def record_input_size(model: nn.Module) -> None:
    """Lets timm's record of a tower name the size of its images, which is what transforms go by.

    timm leaves the size of the published weights in it, whatever size the tower was made for.
    """
    cfg = getattr(model, "pretrained_cfg", None)
    if not cfg or "input_size" not in cfg:
        return
    size = (cfg["input_size"][0], *get_model_input_config(model)["input_size"][1:])
    if size != tuple(cfg["input_size"]):
        model.pretrained_cfg = model.default_cfg = {**cfg, "input_size": size}


def _published() -> Iterator[Weights]:
    """All published weights, the default tag of each entry first."""
    for entry, about in TABLE.items():
        shape = {"num_classes": about["text"]["output_dim"], "image_size": about.get("image_size", 224)}
        for tag, stated in about["tags"].items():
            stated = {key: tuple(value) if isinstance(value, list) else value for key, value in stated.items()}
            if "timm" in about:
                stated["hub_id"] = f"timm/{about['timm']}.{tag}"
            if "file" in stated:
                stated["file"] = WEIGHTS / stated["file"]
            yield Weights(entry=entry, tag=tag, **shape, **stated)


PUBLISHED = {weights.name: weights for weights in _published()}
"""All weights by name, `patchrank_clip_b16.openai`."""
