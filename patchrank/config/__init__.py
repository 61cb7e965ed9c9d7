"""What a sweep file may say: strict schemas, and one line for whatever does not fit them.

Other packages take all of these names from here.
"""

# ruff: noqa: F401, I001
# fmt: off
from patchrank.config.base import ListOf, Seed, Strict
from patchrank.config.trial import (
    DEFAULTS, MIN_REPAIR_IMAGES, DataConfig, GoldenConfig, ModelConfig, PredictorConfig, PromptConfig, PruningConfig,
    RepairConfig, TrialConfig,
)
from patchrank.config.validation import known_keys, leaves, rule_of, validate, value_at
from patchrank.config.report import BESIDE, Claim, ReportConfig
from patchrank.config.sweep import (
    AshaConfig, BenchmarkConfig, Constraint, Loggers, Measured, Objective, Resources, Rule, SearchConfig, SweepConfig,
)
