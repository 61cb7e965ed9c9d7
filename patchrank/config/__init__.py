"""What a sweep file may say: strict schemas, and one line for whatever does not fit them."""

from patchrank.config.checking import known_keys as known_keys
from patchrank.config.checking import leaves as leaves
from patchrank.config.checking import validate as validate
from patchrank.config.checking import value_at as value_at
from patchrank.config.report_settings import BESIDE as BESIDE
from patchrank.config.report_settings import Claim as Claim
from patchrank.config.report_settings import ReportConfig as ReportConfig
from patchrank.config.search_settings import AshaConfig as AshaConfig
from patchrank.config.search_settings import BenchmarkConfig as BenchmarkConfig
from patchrank.config.search_settings import Constraint as Constraint
from patchrank.config.search_settings import Loggers as Loggers
from patchrank.config.search_settings import Measured as Measured
from patchrank.config.search_settings import Objective as Objective
from patchrank.config.search_settings import Resources as Resources
from patchrank.config.search_settings import Rule as Rule
from patchrank.config.search_settings import SearchConfig as SearchConfig
from patchrank.config.sweep_file import SweepConfig as SweepConfig
from patchrank.config.trial_settings import DataConfig as DataConfig
from patchrank.config.trial_settings import GoldenConfig as GoldenConfig
from patchrank.config.trial_settings import ModelConfig as ModelConfig
from patchrank.config.trial_settings import PredictorConfig as PredictorConfig
from patchrank.config.trial_settings import PromptConfig as PromptConfig
from patchrank.config.trial_settings import PruningConfig as PruningConfig
from patchrank.config.trial_settings import Strict as Strict
from patchrank.config.trial_settings import TrialConfig as TrialConfig
