"""Reducers decide which patch tokens live on; each is a file of its own, built by name."""

from patchrank.layers.reducers.base import REDUCERS as REDUCERS
from patchrank.layers.reducers.base import Reducer as Reducer
from patchrank.layers.reducers.base import TokenState as TokenState
from patchrank.layers.reducers.base import create_reducer as create_reducer
from patchrank.layers.reducers.base import register_reducer as register_reducer
from patchrank.layers.reducers.center import Center as Center
from patchrank.layers.reducers.cls_attention import ClsAttention as ClsAttention
from patchrank.layers.reducers.golden import Golden as Golden
from patchrank.layers.reducers.predictor import Predictor as Predictor
from patchrank.layers.reducers.prior import Prior as Prior
from patchrank.layers.reducers.random import Random as Random
