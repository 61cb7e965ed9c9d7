"""Reducers decide which patch tokens live on: their contract with a tower, their registry, and those that come with us.

They are built by name, and one of your own is a file and a decorator.
"""

from patchrank.layers.reducers.base import REDUCERS as REDUCERS
from patchrank.layers.reducers.base import Reducer as Reducer
from patchrank.layers.reducers.base import create_reducer as create_reducer
from patchrank.layers.reducers.base import register_reducer as register_reducer
from patchrank.layers.reducers.controls import AVit as AVit
from patchrank.layers.reducers.controls import AVitChannel as AVitChannel
from patchrank.layers.reducers.controls import AVitFlipped as AVitFlipped
from patchrank.layers.reducers.controls import MlpShift as MlpShift
from patchrank.layers.reducers.controls import PixelVariance as PixelVariance
from patchrank.layers.reducers.matching import FeatureMerge as FeatureMerge
from patchrank.layers.reducers.matching import GuidedMerge as GuidedMerge
from patchrank.layers.reducers.matching import Tome as Tome
from patchrank.layers.reducers.peers import DiffRate as DiffRate
from patchrank.layers.reducers.peers import Evit as Evit
from patchrank.layers.reducers.peers import EvitDrop as EvitDrop
from patchrank.layers.reducers.peers import EvitNorm as EvitNorm
from patchrank.layers.reducers.rankers import Center as Center
from patchrank.layers.reducers.rankers import ClsAttention as ClsAttention
from patchrank.layers.reducers.rankers import Golden as Golden
from patchrank.layers.reducers.rankers import Predictor as Predictor
from patchrank.layers.reducers.rankers import Prior as Prior
from patchrank.layers.reducers.rankers import Random as Random
from patchrank.layers.reducers.rankers import sample_keys as sample_keys
from patchrank.layers.token_state import TokenState as TokenState
