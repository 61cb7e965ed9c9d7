"""Published weights of CLIP's towers: where they are, and which images and activation they were trained with.

A tag decides on the activation, since weights do not show it; a tower with the wrong one runs, but is less accurate.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from timm.data import IMAGENET_INCEPTION_MEAN, IMAGENET_INCEPTION_STD, OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from patchrank.utils.errors import UserError, near

WEIGHTS = Path(__file__).parent / "weights"

_TEXT_512 = dict(width=512, heads=8, layers=12, output_dim=512)
_TEXT_768 = dict(width=768, heads=12, layers=12, output_dim=768)
TEXT_CFGS = {
    "patchrank_clip_digits": dict(width=64, heads=4, layers=3, output_dim=64),
    "patchrank_clip_b16": _TEXT_512,
    "patchrank_clip_b32": _TEXT_512,
    "patchrank_clip_l14": _TEXT_768,
    "patchrank_clip_l14_336": _TEXT_768,
    "patchrank_clip_xsmall16": dict(width=256, heads=4, layers=3, output_dim=512),
    "patchrank_clip_medium32": dict(width=512, heads=8, layers=6, output_dim=512),
    "patchrank_clip_medium16": dict(width=512, heads=8, layers=6, output_dim=512),
    "patchrank_clip_betwixt32": dict(width=512, heads=8, layers=9, output_dim=512),
}
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
    entry = name.partition(".")[0]
    of_entry = {found.name: found for found in PUBLISHED.values() if found.entry == entry}
    if not of_entry:
        raise UserError(f"model {name!r} does not exist; {near(name, TEXT_CFGS)}")
    if name == entry:
        return next(iter(of_entry.values()))
    if name not in of_entry:
        raise UserError(f"model {name!r} does not exist; {near(name, of_entry)}")
    return of_entry[name]


def _rows() -> Iterator[Weights]:
    """All published weights, the default tag of each entry first."""
    digits = WEIGHTS / "patchrank_clip_digits.safetensors"
    yield Weights(entry="patchrank_clip_digits", tag="embedded", image_size=64, num_classes=64, file=digits)
    yield from _clip("patchrank_clip_b16", "vit_base_patch16_clip_224", "ViT-B-16", _B16)
    yield from _clip("patchrank_clip_b32", "vit_base_patch32_clip_224", "ViT-B-32", _B32)
    yield from _clip("patchrank_clip_l14", "vit_large_patch14_clip_224", "ViT-L-14", _L14, num_classes=768)
    yield from _clip(
        "patchrank_clip_l14_336",
        "vit_large_patch14_clip_336",
        "ViT-L-14-336",
        _L14_336,
        num_classes=768,
        image_size=336,
    )
    for entry, tower, tag, repo in _TINY_CLIP:
        hub_id, clip_repo = f"timm/{tower}.{tag}", f"wkcn/TinyCLIP-{repo}"
        yield Weights(entry=entry, tag=tag, hub_id=hub_id, license="mit", clip_repo=clip_repo)


def _clip(entry: str, tower: str, pair: str, rows: tuple, **shape) -> Iterator[Weights]:
    """The weights of one architecture that timm has as `tower` and open_clip as `pair`."""
    for tag, theirs, *about in rows:
        extra = {key: value for one in about for key, value in one.items()}
        name = f"{pair}-quickgelu" if extra.get("quick_gelu") else pair
        yield Weights(entry=entry, tag=tag, hub_id=f"timm/{tower}.{tag}", open_clip=(name, theirs), **shape, **extra)


_QUICK = dict(quick_gelu=True)
_MIT, _APPLE, _META = dict(license="mit"), dict(license="apple-ascl"), dict(license="cc-by-nc-4.0")
_INCEPTION = dict(mean=IMAGENET_INCEPTION_MEAN, std=IMAGENET_INCEPTION_STD)

_B16 = (  # timm's tag, open_clip's tag, and all that is not GELU, OpenAI's mean and std, and no stated license
    ("openai", "openai", _QUICK),
    ("laion2b", "laion2b_s34b_b88k"),
    ("laion400m_e32", "laion400m_e32", _MIT),
    ("datacompxl", "datacomp_xl_s13b_b90k"),
    ("dfn2b", "dfn2b", _QUICK, _APPLE),
    ("metaclip_2pt5b", "metaclip_fullcc", _QUICK, _META),
    ("metaclip_400m", "metaclip_400m", _QUICK, _META),
)
_B32 = (
    ("openai", "openai", _QUICK),
    ("laion2b", "laion2b_s34b_b79k"),
    ("laion400m_e32", "laion400m_e32", _QUICK, _MIT),
    ("datacompxl", "datacomp_xl_s13b_b90k"),
    ("metaclip_2pt5b", "metaclip_fullcc", _QUICK, _META),
    ("metaclip_400m", "metaclip_400m", _QUICK, _META),
)
_L14 = (
    ("openai", "openai", _QUICK),
    ("laion2b", "laion2b_s32b_b82k", _INCEPTION),
    ("laion400m_e32", "laion400m_e32", _MIT),
    ("datacompxl", "datacomp_xl_s13b_b90k"),
    ("dfn2b", "dfn2b", _QUICK, _APPLE),
    ("dfn2b_s39b", "dfn2b_s39b", _APPLE),
    ("metaclip_2pt5b", "metaclip_fullcc", _QUICK, _META),
    ("metaclip_400m", "metaclip_400m", _QUICK, _META),
)
_L14_336 = (("openai", "openai", _QUICK),)
_TINY_CLIP = (  # all of them GELU
    ("patchrank_clip_xsmall16", "vit_xsmall_patch16_clip_224", "tinyclip_yfcc15m", "ViT-8M-16-Text-3M-YFCC15M"),
    ("patchrank_clip_medium32", "vit_medium_patch32_clip_224", "tinyclip_laion400m", "ViT-40M-32-Text-19M-LAION400M"),
    ("patchrank_clip_medium16", "vit_medium_patch16_clip_224", "tinyclip_yfcc15m", "ViT-39M-16-Text-19M-YFCC15M"),
    ("patchrank_clip_betwixt32", "vit_betwixt_patch32_clip_224", "tinyclip_laion400m", "ViT-61M-32-Text-29M-LAION400M"),
)

PUBLISHED = {weights.name: weights for weights in _rows()}
"""All weights by name, `patchrank_clip_b16.openai`."""
