"""Captions of the embedded pre-training: a small grammar, so that text reads in many ways and at many lengths.

There are 1,080 templates of 3 to 45 tokens. A quarter of them have more than 24, so that text positions beyond 24 are
trained: learned prompts push the class name there.
"""

from __future__ import annotations

import numpy as np

OPENERS = (
    "",
    "a photo of ",
    "a picture of ",
    "an image of ",
    "a drawing of ",
    "this is ",
    "a close-up of ",
    "a blurry photo of ",
    "a small picture showing ",
    "look, somebody drew ",
    "a bright photo with ",
    "here we can see ",
)
NOUNS = (
    "{}",
    "a {}",
    "the number {}",
    "the digit {}",
    "the numeral {}",
    "a handwritten {}",
    "the handwritten digit {}",
    "the number {} in colour",
    "the figure {} in ink",
)
TAILS = (
    ".",
    "",
    " on a photograph.",
    " painted over a landscape.",
    " in front of a flower.",
    " above the roofs of an old temple.",
    ", somewhere in the picture.",
    " written by hand, with leaves and petals of an orange flower behind it.",
    " in one corner, and around it the sky, the water and the trees of a park on a clear summer day.",
    ", drawn with a thick brush in a single colour over a holiday photo that shows a temple, a lake, some trees and"
    " a few people walking along the shore.",
)


def draw_template(rng: np.random.Generator) -> str:
    """One caption template with a `{}` where the class name goes."""
    return "".join(part[rng.integers(len(part))] for part in (OPENERS, NOUNS, TAILS))
