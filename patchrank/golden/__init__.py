"""Phase I: golden scores, what happens to the embedding when a window of tokens is removed (section 3.1)."""

from patchrank.golden.scores import GoldenScores as GoldenScores
from patchrank.golden.scores import score_images as score_images
