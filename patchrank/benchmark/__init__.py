"""Speed: towers measured in turns on one machine, pruned and whole, ours and others'."""

from patchrank.benchmark.command import main as main
from patchrank.benchmark.twin import VERSION as VERSION
from patchrank.benchmark.twin import measure as measure
from patchrank.utils.clock import WARM_UP as WARM_UP
from patchrank.utils.clock import seconds_of as seconds_of
