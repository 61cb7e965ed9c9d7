"""What a sweep file may say: strict schemas, and one line for whatever does not fit them."""

from patchrank.config.base import ListOf as ListOf
from patchrank.config.base import Strict as Strict
from patchrank.config.report import BESIDE as BESIDE
from patchrank.config.report import Claim as Claim
from patchrank.config.report import ReportConfig as ReportConfig
from patchrank.config.search import AshaConfig as AshaConfig
from patchrank.config.search import BenchmarkConfig as BenchmarkConfig
from patchrank.config.search import Constraint as Constraint
from patchrank.config.search import Loggers as Loggers
from patchrank.config.search import Measured as Measured
from patchrank.config.search import Objective as Objective
from patchrank.config.search import Resources as Resources
from patchrank.config.search import Rule as Rule
from patchrank.config.search import SearchConfig as SearchConfig
from patchrank.config.sweep import SweepConfig as SweepConfig
from patchrank.config.trial import DataConfig as DataConfig
from patchrank.config.trial import GoldenConfig as GoldenConfig
from patchrank.config.trial import ModelConfig as ModelConfig
from patchrank.config.trial import PredictorConfig as PredictorConfig
from patchrank.config.trial import PromptConfig as PromptConfig
from patchrank.config.trial import PruningConfig as PruningConfig
from patchrank.config.trial import TrialConfig as TrialConfig
from patchrank.config.validation import known_keys as known_keys
from patchrank.config.validation import leaves as leaves
from patchrank.config.validation import validate as validate
from patchrank.config.validation import value_at as value_at
