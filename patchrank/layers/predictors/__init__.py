"""Predictors of the golden ranking (section 3.2): class token and patch tokens in, one score per patch out.

Each is a file of its own, built by name: `forward(cls (B, D), patches (B, N, D)) -> (B, N)`, high = keep.
"""

from patchrank.layers.predictors.base import PREDICTORS as PREDICTORS
from patchrank.layers.predictors.base import UNFILLED as UNFILLED
from patchrank.layers.predictors.base import awaits_weights as awaits_weights
from patchrank.layers.predictors.base import check_location as check_location
from patchrank.layers.predictors.base import create_awaiting as create_awaiting
from patchrank.layers.predictors.base import create_predictor as create_predictor
from patchrank.layers.predictors.base import load_predictor as load_predictor
from patchrank.layers.predictors.base import name_and_settings as name_and_settings
from patchrank.layers.predictors.base import register_predictor as register_predictor
from patchrank.layers.predictors.base import save_predictor as save_predictor
from patchrank.layers.predictors.mix_mlp import MixMlp as MixMlp
from patchrank.layers.predictors.mlp import Mlp as Mlp
from patchrank.layers.predictors.prior import Prior as Prior
from patchrank.layers.predictors.transformer import Transformer as Transformer
