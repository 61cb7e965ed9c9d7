"""Reducers decide which patch tokens live on: their contract with a tower, their registry, and those that come with us.

They are built by name, and one of your own is a file and a decorator.
"""

from patchrank.layers.reducers.base import REDUCERS as REDUCERS
from patchrank.layers.reducers.base import Reducer as Reducer
from patchrank.layers.reducers.base import create_reducer as create_reducer
from patchrank.layers.reducers.base import register_reducer as register_reducer
from patchrank.layers.reducers.matching import AttentionMerge as AttentionMerge
from patchrank.layers.reducers.matching import FeatureMerge as FeatureMerge
from patchrank.layers.reducers.matching import GuidedMerge as GuidedMerge
from patchrank.layers.reducers.matching import RankMerge as RankMerge
from patchrank.layers.reducers.matching import Tome as Tome
from patchrank.layers.reducers.rankers import Center as Center
from patchrank.layers.reducers.rankers import ClsAttention as ClsAttention
from patchrank.layers.reducers.rankers import Golden as Golden
from patchrank.layers.reducers.rankers import Predictor as Predictor
from patchrank.layers.reducers.rankers import Prior as Prior
from patchrank.layers.reducers.rankers import Random as Random
from patchrank.layers.reducers.rankers import sample_keys as sample_keys
from patchrank.layers.token_state import TokenState as TokenState
