"""Learned tokens for a pair of random towers of different widths."""

from patchrank.layers.prompts import Prompts

B, WIDTH, TEXT_WIDTH = 4, 64, 32  # learned tokens; the towers' widths


def create(mode="TV", **changes):
    return Prompts(**{"mode": mode, "num_tokens": B, "text_dim": TEXT_WIDTH, "image_dim": WIDTH, **changes})
