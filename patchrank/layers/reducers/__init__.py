"""Reducers decide which patch tokens live on; they are built by name, and one of your own is a file and a decorator."""

from patchrank.layers.reducers.base import REDUCERS as REDUCERS
from patchrank.layers.reducers.base import Reducer as Reducer
from patchrank.layers.reducers.base import TokenState as TokenState
from patchrank.layers.reducers.base import create_reducer as create_reducer
from patchrank.layers.reducers.base import register_reducer as register_reducer
from patchrank.layers.reducers.fitted import Predictor as Predictor
from patchrank.layers.reducers.unfitted import Random as Random
from patchrank.layers.reducers.unfitted import sample_keys as sample_keys
