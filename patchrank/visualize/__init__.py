"""What rankers keep of an image, and whether the answer survives it (figures 3 and 4)."""

from patchrank.visualize.figure import draw_rankings as draw_rankings
from patchrank.visualize.pictures import Pictures as Pictures
from patchrank.visualize.pictures import read_pictures as read_pictures
from patchrank.visualize.pictures import split_pictures as split_pictures
from patchrank.visualize.rankings import Rankings as Rankings
from patchrank.visualize.rankings import kept_by as kept_by
from patchrank.visualize.rankings import rank_pictures as rank_pictures
