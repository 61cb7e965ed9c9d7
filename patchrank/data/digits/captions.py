"""Captions of the embedded pre-training: a small grammar, so that text reads in many ways and at many lengths.

There are 1,080 templates of 3 to 45 tokens. A quarter of them have more than 24, so that text positions beyond 24 are
trained: learned prompts push the class name there.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from patchrank.io.yaml import read_yaml

OPENERS, NOUNS, TAILS = (tuple(parts) for parts in read_yaml(Path(__file__).with_suffix(".yaml")).values())


def draw_template(rng: np.random.Generator) -> str:
    """One caption template with a `{}` where the class name goes."""
    return "".join(part[rng.integers(len(part))] for part in (OPENERS, NOUNS, TAILS))
