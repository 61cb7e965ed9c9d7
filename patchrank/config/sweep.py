"""A sweep file as a whole."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from patchrank.config.base import ListOf, Strict
from patchrank.config.report import ReportConfig
from patchrank.config.search import BenchmarkConfig, Constraint, Loggers, Objective, Resources, SearchConfig
from patchrank.config.trial import TrialConfig


class SweepConfig(Strict):
    """A sweep file; see `sweeps/locations.yaml`."""

    schema_: Literal[1] = Field(alias="schema")
    name: str = Field(pattern=r"^[A-Za-z0-9_-]+$")
    root: str
    shards: str
    spaces: ListOf[str] = Field(min_length=1)
    search: SearchConfig = SearchConfig()
    trial: TrialConfig = TrialConfig()
    objectives: ListOf[Objective] = Field((Objective(metric="val_accuracy", mode="max"),), min_length=1)
    constraints: ListOf[Constraint] = ()
    resources: Resources = Resources()
    time_limit: float | None = Field(None, gt=0)  # seconds, after which a trial is ended and counts as failed
    benchmark: BenchmarkConfig = BenchmarkConfig()
    imports: ListOf[str] = ()  # modules that register components of yours, importable on every node
    loggers: Loggers = Loggers()
    report: ReportConfig
