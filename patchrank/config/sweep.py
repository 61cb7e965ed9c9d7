"""A sweep file as a whole: how it searches, rules of its axes, objectives, bounds, and what a trial takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from pydantic import Field, model_validator

from patchrank.config.base import ListOf, Seed, Strict
from patchrank.config.report import ReportConfig
from patchrank.config.trial import TrialConfig


class AshaConfig(Strict):
    """Ends trials early that fall behind others after as many epochs (asynchronous successive halving)."""

    of: Literal["predictor", "prompt"]  # whose epochs are compared: by matching on val, or by accuracy on val
    grace: int = Field(1, ge=1)  # epochs before anything is ended
    reduction: float = Field(3, gt=1)  # one in so many goes on at each rung


class SearchConfig(Strict):
    method: Literal["grid", "random", "optuna"] = "grid"
    sampler: Literal["tpe", "nsga2", "random"] = "tpe"  # Optuna's, for method optuna
    samples: int = Field(20, ge=1)  # per grid cell; a pure grid needs none
    seed: Seed = 0
    round: int = Field(16, ge=2)  # trials between two measurements of milliseconds, beside which nothing runs
    asha: AshaConfig | None = None


# never a test figure: test is read for the report alone. ms: of one image, measured, not counted
Measured = Literal[
    "val_accuracy", "val_agreement", "val_cosine", "val_knn_accuracy", "val_knn_agreement",
    "matching_rate", "gmacs", "ms",
]  # fmt: skip


class Objective(Strict):
    metric: Measured
    mode: Literal["min", "max"]


class Constraint(Strict):
    """A bound that a trial must keep to be worth anything."""

    metric: Measured
    at_most: float | None = None
    at_least: float | None = None

    @model_validator(mode="after")
    def _one_bound(self) -> Constraint:
        if (self.at_most is None) == (self.at_least is None):
            raise ValueError("exactly one of at_most and at_least must be there")
        return self

    def excess(self, metrics: dict[str, float]) -> float:
        """By how much it is broken; at or below 0 where it is kept."""
        value = metrics[self.metric]
        return value - self.at_most if self.at_least is None else self.at_least - value


class BenchmarkConfig(Strict):
    """How milliseconds are measured, where an objective or a constraint asks for them."""

    batch_size: int = Field(32, ge=1, description="images of a run")
    repeats: int = Field(30, ge=3, description="runs of each tower, in turns")


class Loggers(Strict):
    """Trackers that hear of every trial, by Ray's own callbacks; keys go to those as they stand."""

    wandb: dict[str, Any] | None = None
    mlflow: dict[str, Any] | None = None


class Resources(Strict):
    """What one trial takes from the cluster."""

    cpu: float = Field(1, gt=0)
    gpu: float = Field(0, ge=0)

    @property
    def device(self) -> str:
        return "cuda" if self.gpu else "cpu"

    @property
    def num_threads(self) -> int:
        """How many threads torch gets."""
        return max(1, int(self.cpu))


class Rule(Strict):
    """How one swept setting varies: exactly one of grid, choice, uniform, int.

    otherwise: the rule that counts where `when` is not met; a search space writes such rules as a list.
    """

    grid: ListOf[Any] | None = Field(None, min_length=1)
    choice: ListOf[Any] | None = Field(None, min_length=1)
    uniform: ListOf[float] | None = Field(None, min_length=2, max_length=2)
    int_: ListOf[int] | None = Field(None, alias="int", min_length=2, max_length=2)
    step: float | None = Field(None, gt=0)
    log: bool = False
    when: dict[str, ListOf[Any]] | ListOf[dict[str, ListOf[Any]]] | None = None  # of several, any one
    otherwise: Rule | None = None

    @property
    def conditions(self) -> tuple[dict[str, tuple[Any, ...]], ...]:
        """Of which one must be met, all that it says; an empty one always is."""
        return self.when if isinstance(self.when, tuple) else (self.when or {},)

    @property
    def depends_on(self) -> set[str]:
        """Paths that `when` names, here and in the rules that follow."""
        names = {path for each in self.conditions for path in each}
        return names | (self.otherwise.depends_on if self.otherwise else set())

    def holds(self, values: Callable[[str], Any]) -> bool:
        """Whether one condition is met; `values` gives the value at a path."""
        return any(all(values(path) in allowed for path, allowed in each.items()) for each in self.conditions)

    def chosen(self, values: Callable[[str], Any]) -> Rule:
        """Of several rules the first whose condition is met, or else the last; one alone is itself."""
        if self.otherwise is None:
            return self
        return self if self.holds(values) else self.otherwise.chosen(values)

    @property
    def kind(self) -> str:
        return self._kinds()[0]

    @model_validator(mode="after")
    def _sensible(self) -> Rule:
        if len(self._kinds()) != 1:
            found = ", ".join(self._kinds()) or "none"
            raise ValueError(f"exactly one of grid, choice, uniform, int must be there, but {found} is")
        low, high = self.uniform or self.int_ or (1, 2)
        if low >= high or (self.log and (low <= 0 or self.step)):
            raise ValueError("bounds must rise, a log scale needs them above 0, and log and step exclude each other")
        if self.grid is not None and any(value in self.grid[:n] for n, value in enumerate(self.grid)):
            raise ValueError("a grid must not repeat a value")
        return self

    def _kinds(self) -> list[str]:
        return [kind for kind in ("grid", "choice", "uniform", "int_") if getattr(self, kind) is not None]


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
    time_limit: float | None = Field(None, gt=0, le=1e9)  # seconds, after which a trial is ended and counts as failed
    benchmark: BenchmarkConfig = BenchmarkConfig()
    imports: ListOf[str] = ()  # modules that register components of yours, importable on every node
    loggers: Loggers = Loggers()
    report: ReportConfig
