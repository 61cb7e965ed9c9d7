"""The embedded default: scikit-learn's handwritten digits, drawn as RGB scenes over its two sample photographs.

A scene is a function of a seed, so none is stored. The 1,797 digits are split 50/20/10/20 into pretrain, adapt,
val and test within each class, and each split has its own vertical strip of both photographs, so that neither a digit
nor a piece of background is shared between splits. Three tasks draw the same digits in different styles.
"""

from __future__ import annotations

import colorsys
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image

from patchrank.utils.errors import UserError, near

IMAGE_SIZE = 64
SCENES_PER_DIGIT = 6
LUMINANCE = np.array([0.299, 0.587, 0.114])  # weights of red, green and blue
VERSION = 1  # of the drawing: bump it when a scene would come out with other pixels
CLASSES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
TEMPLATES = ("a photo of the number {}.", "the handwritten digit {}.", "a picture of the numeral {} over a photograph.")
UNSEEN_TEMPLATE = "a postcard on which somebody wrote {} by hand."  # no caption of the pre-training reads like this
CREDIT = (
    "Digits: E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI (CC BY 4.0). "
    "Photographs: china.jpg by danielbuechele and flower.jpg by vultilion (both CC BY 2.0, via scikit-learn), "
    "cropped and resized."
)

PAPER_FIBRE = 0.08  # standard deviation of the paper's texture, in grey levels from 0 to 1
PAPER_LINES = 0.25  # how much darker ruled lines are
INK_CONTRAST = (0.3, 0.7)  # of ink against paper; photographs' digits have 0.35 and more in luminance

# split -> (share of each class's digits, share of each photograph's width), both as [from, to)
SPLITS = {
    "pretrain": ((0.0, 0.5), (0.0, 0.5)),
    "adapt": ((0.5, 0.7), (0.5, 0.7)),
    "val": ((0.7, 0.8), (0.7, 0.8)),
    "test": ((0.8, 1.0), (0.8, 1.0)),
}


@dataclass(frozen=True)
class SceneStyle:
    """How scenes are drawn.

    scale: digit side as a share of the image side; background: brightness of the photograph; tilt: in degrees;
    paper: dark ink on ruled paper instead of a photograph; thinning: coverage that strokes lose, from 0 to 1.
    """

    scale: tuple[float, float] = (0.3, 0.6)
    background: float = 1.0
    tilt: float = 0.0
    paper: bool = False
    thinning: float = 0.0


STYLES = {
    "digits": SceneStyle(),
    "digits_full": SceneStyle(scale=(0.9, 1.0)),  # hardly any background is left to drop
    "digits_ink": SceneStyle(paper=True, thinning=0.2),  # never seen in pre-training
}


class DigitScenes:
    """Scenes of one split, `scenes` for each digit; `[i]` draws scene i as an RGB `PIL.Image` of 64 x 64.

    All digits come once before any comes again, so that the first n scenes show n different digits.
    """

    def __init__(self, split: str, scenes: int = SCENES_PER_DIGIT, task: str = "digits", seed: int = 0):
        if split not in SPLITS:
            raise UserError(f"split {split!r} does not exist in the embedded digits; {near(split, SPLITS)}")
        self.split, self.style, self.seed = split, STYLES[task], seed
        self.digits = split_digits(split)
        self.ids = [f"{task}/{split}/{d:04d}-{s}" for s in range(scenes) for d in self.digits]
        self.groups = [f"digit/{d:04d}" for _ in range(scenes) for d in self.digits]  # in whatever style it is drawn
        self.labels = np.tile(_digits()[1][self.digits], scenes)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, i: int) -> Image.Image:
        scene, position = divmod(i, len(self.digits))
        return self.draw(self.digits[position], scene)

    def draw(self, digit: int, scene: int, style: SceneStyle | None = None) -> Image.Image:
        """Draws digit number `digit` (0 to 1796) in its scene number `scene`."""
        rng = np.random.default_rng([self.seed, VERSION, int(digit), int(scene)])
        return draw_scene(_digits()[0][digit], _strips(self.split), rng, style or self.style)


@lru_cache(maxsize=1)
def _digits() -> tuple[np.ndarray, np.ndarray]:
    """Scikit-learn's digits (1797, 8, 8) as uint8 coverage, and labels; from our copy, since its import takes 1.5 s."""
    with np.load(Path(__file__).parent / "digits.npz", allow_pickle=False) as data:
        return (data["images"] / 16 * 255).round().astype(np.uint8), data["labels"].astype(np.int64)


@lru_cache(maxsize=len(SPLITS))
def _strips(split: str) -> list[np.ndarray]:
    """The split's strip of each of scikit-learn's two photographs."""
    from sklearn.datasets import load_sample_images

    low, high = SPLITS[split][1]
    photos = [np.asarray(image, np.uint8) for image in load_sample_images().images]
    return [photo[:, round(low * photo.shape[1]) : round(high * photo.shape[1])] for photo in photos]


@lru_cache(maxsize=len(SPLITS))
def split_digits(split: str) -> np.ndarray:
    """Indices (in scikit-learn's order) of the digits of one split, stratified by class and always shuffled alike."""
    rng = np.random.default_rng(2025)
    low, high = SPLITS[split][0]
    parts = []
    for label in range(len(CLASSES)):
        members = rng.permutation(np.flatnonzero(_digits()[1] == label))
        parts.append(members[round(low * len(members)) : round(high * len(members))])
    return rng.permutation(np.concatenate(parts))


def draw_scene(digit: np.ndarray, strips: list[np.ndarray], rng: np.random.Generator, style: SceneStyle) -> Image.Image:
    """One digit (8 x 8, uint8 coverage) over a crop of one of the strips, at a random place, size and colour."""
    if style.paper:
        canvas, colour = _ruled_sheet(rng)
    else:
        canvas, colour = _photograph(strips, rng) * style.background, None
    side = round(rng.uniform(*style.scale) * IMAGE_SIZE)
    ink = _glyph(digit, side, rng.uniform(-1, 1) * style.tilt, style.thinning)
    top, left = rng.integers(0, IMAGE_SIZE - side + 1, size=2)
    patch = canvas[top : top + side, left : left + side]
    if colour is None:
        colour = _contrasting_colour(patch.reshape(-1, 3).mean(0) @ LUMINANCE, rng)
    patch += ink[..., None] * (colour - patch)
    return Image.fromarray((canvas * 255).round().clip(0, 255).astype(np.uint8))


def _photograph(strips: list[np.ndarray], rng: np.random.Generator) -> np.ndarray:
    strip = strips[rng.integers(len(strips))]
    side = int(rng.integers(40, IMAGE_SIZE + 1))
    top = rng.integers(0, strip.shape[0] - side + 1)
    left = rng.integers(0, strip.shape[1] - side + 1)
    crop = strip[top : top + side, left : left + side]
    if rng.random() < 0.5:
        crop = crop[:, ::-1]
    crop = Image.fromarray(np.ascontiguousarray(crop)).resize((IMAGE_SIZE, IMAGE_SIZE), Image.BICUBIC)
    return np.asarray(crop, np.float32) / 255


def _ruled_sheet(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """A sheet (S, S, 3) in [0, 1], lined or squared, with fibres and stains; and an ink for it, (3,).

    Lines are 7 to 12 pixels apart, horizontal ones, and on every second sheet vertical ones too.
    """
    paper = np.array([0.95, 0.91, 0.82], np.float32) * rng.uniform(0.8, 1.0)
    texture = 0
    for cells, weight in ((9, 1.0), (24, 0.7), (64, 0.7)):
        noise = rng.normal(size=(cells, cells)).astype(np.float32)
        texture += weight * np.asarray(Image.fromarray(noise).resize((IMAGE_SIZE, IMAGE_SIZE), Image.BICUBIC))
    step = int(rng.integers(7, 13))
    top, left = rng.integers(step, size=2)
    lines = np.zeros((IMAGE_SIZE, IMAGE_SIZE), np.float32)
    lines[top::step] = 1
    if rng.random() < 0.5:
        lines[:, left::step] = 1
    lines = PAPER_LINES * lines[..., None] * np.array([1.0, 0.7, 0.3], np.float32)
    ink = paper * (1 - rng.uniform(*INK_CONTRAST)) * np.array([0.8, 0.85, 1.1], np.float32)
    return paper + PAPER_FIBRE * texture[..., None] - lines, ink.astype(np.float32)


def _glyph(digit: np.ndarray, side: int, tilt: float, thinning: float) -> np.ndarray:
    image = Image.fromarray(digit).resize((side, side), Image.BICUBIC)
    if tilt:
        image = image.rotate(tilt, Image.BICUBIC)
    return ((np.asarray(image, np.float32) / 255 - thinning) * 1.25).clip(0, 1)


def _contrasting_colour(behind: float, rng: np.random.Generator) -> np.ndarray:
    for _ in range(20):
        colour = np.array(colorsys.hsv_to_rgb(rng.random(), rng.uniform(0.2, 1.0), rng.uniform(0.0, 1.0)), np.float32)
        if abs(colour @ LUMINANCE - behind) > 0.35:
            return colour
    return np.full(3, float(behind < 0.5), np.float32)
