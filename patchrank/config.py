"""What a sweep file may say: strict schemas, and one line for whatever does not fit them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from patchrank.errors import UserError, near


class Strict(BaseModel):
    """A mapping whose keys are all known; values keep their types."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class ModelConfig(Strict):
    name: str = "patchrank_clip_digits"
    checkpoint: str | None = None


class DataConfig(Strict):
    tasks: list[str] = Field(["digits"], min_length=1)  # results are means over them
    root: str | None = None
    vocabulary: str | None = None  # YAML file of class names and templates
    templates: Literal["plain", "openai7", "openai80"] | None = None  # prompts in place of each task's own
    n_train: int | None = Field(256, ge=1)  # images of each task
    n_val: int | None = Field(128, ge=1)
    n_test: int | None = Field(None, ge=0)  # 0: trials do not look at test
    n_oracle: int | None = Field(None, ge=1)  # the first test images, which alone `golden` rankings are made for


class GoldenConfig(Strict):
    metric: Literal["label", "confidence", "preservation"] = "preservation"
    window: int = Field(2, ge=1)
    stride: int = Field(1, ge=1)
    remove_at: int | Literal["first"] = 4
    rounds: int = Field(1, ge=1)


class PredictorConfig(Strict):
    name: str = "mix_mlp"
    dim: int = Field(16, ge=1)
    head: Literal["linear", "mean"] = "linear"
    loss: str = "bce"
    epochs: int = Field(50, ge=1)
    lr: float = Field(0.01, gt=0)
    # each task its own predictor, or one for all, fitted on these tasks
    fit_on: Literal["own"] | Annotated[list[str], Field(min_length=1)] = "own"


class PruningConfig(Strict):
    reducer: str = "predictor"
    leftovers: str = "drop"
    keep_rate: float = Field(0.6, gt=0, le=1)
    drop_counts: list[int] | None = None
    locations: list[int] = Field([4, 6, 8, 10], min_length=1)


class PromptConfig(Strict):
    """How learned tokens are tuned; None: the preset's, or what the tower asks for (`patchrank.prompting.presets`)."""

    mode: Literal["none", "T", "V", "TV"] = "TV"
    loss: Literal["cross_entropy", "distill"] = "cross_entropy"  # distill: back to the whole image's embedding
    norm_gains: bool = False  # gains of the image tower's LayerNorms are learned as well
    num_tokens: int | None = Field(None, ge=1)
    preset: Literal["coop", "maple", "digits", "distill"] | None = None
    shots: int = Field(16, ge=1)  # images of each class, with their labels
    images: int | None = Field(None, ge=1)  # that distillation sees, without labels
    epochs: int | None = Field(None, ge=1)
    lr: float | None = Field(None, gt=0, allow_inf_nan=False)
    batch_size: int | None = Field(None, ge=1)
    bias: bool = False  # of the map to visual tokens; the paper's has none, MaPLe's has
    class_specific: bool = False
    words: str | None = Field(None, min_length=1)  # to start from, in place of N(0, 0.02)
    augment: bool | None = None  # CoOp's crops and flips; None: photographs alone, since flips change digits
    patience: int | None = Field(None, ge=1)  # epochs that are no better on val, after which it stops
    precision: Literal["fp32", "bf16"] = "fp32"  # of the frozen towers; what is learned is fp32
    checkpointing: bool = False  # computes activations twice instead of keeping them

    @model_validator(mode="after")
    def _parts_fit(self) -> PromptConfig:
        if self.loss == "distill" and self.mode not in ("none", "V"):
            raise ValueError(f"loss 'distill' learns visual tokens alone, so mode must be 'V', but is {self.mode!r}")
        if self.norm_gains and self.mode == "T":
            raise ValueError("norm_gains are the image tower's, so mode must be 'V' or 'TV', but is 'T'")
        if self.class_specific and self.mode not in ("none", "T"):
            raise ValueError(
                f"class-specific prompts need mode 'T', since an image's class is not known; mode is {self.mode!r}"
            )
        return self


class TrialConfig(Strict):
    """Everything that one trial depends on."""

    seed: int = 0
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    golden: GoldenConfig = GoldenConfig()
    predictor: PredictorConfig = PredictorConfig()
    pruning: PruningConfig = PruningConfig()
    controls: list[Literal["random", "reversed"]] = []  # other orders in which a predictor's trial drops as much
    prompt: PromptConfig | None = None


class AshaConfig(Strict):
    """Ends trials early that fall behind others after as many epochs (asynchronous successive halving)."""

    of: Literal["predictor", "prompt"]  # whose epochs are compared: by matching on val, or by accuracy on val
    grace: int = Field(1, ge=1)  # epochs before anything is ended
    reduction: float = Field(3, gt=1)  # one in so many goes on at each rung


class SearchConfig(Strict):
    method: Literal["grid", "random", "optuna"] = "grid"
    sampler: Literal["tpe", "nsga2", "random"] = "tpe"  # Optuna's, for method optuna
    samples: int = Field(20, ge=1)  # per grid cell; a pure grid needs none
    seed: int = 0
    round: int = Field(16, ge=2)  # trials between two measurements of milliseconds, beside which nothing runs
    asha: AshaConfig | None = None


# never a test figure: test is read for the report alone. ms: of one image, measured, not counted
Measured = Literal["val_accuracy", "val_agreement", "val_cosine", "matching_rate", "gmacs", "ms"]


class Objective(Strict):
    metric: Measured
    mode: Literal["min", "max"]


class Constraint(Strict):
    """A bound that a trial must keep to be worth anything."""

    metric: Measured
    at_most: float | None = Field(None, allow_inf_nan=False)
    at_least: float | None = Field(None, allow_inf_nan=False)

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

    batch_size: int = Field(32, ge=1)
    repeats: int = Field(30, ge=3)  # of each tower, in turns


class Loggers(Strict):
    """Trackers that hear of every trial, by Ray's own callbacks; keys go to those as they stand."""

    wandb: dict[str, Any] | None = None
    mlflow: dict[str, Any] | None = None


class Resources(Strict):
    """What one trial takes from the cluster."""

    cpu: float = Field(1, gt=0)
    gpu: float = Field(0, ge=0)


# what stands beside a trial's own measures, to be compared with: `against` -> measure -> its counterpart
BESIDE = {
    "unpruned": {"accuracy": "unpruned", "val_accuracy": "val_unpruned"},
    "prior": {"matching": "matching_prior"},
}


def leaves(mapping: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one from dotted paths to values that are no mappings."""
    flat: dict[str, Any] = {}
    for key, value in mapping.items():
        flat |= leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


class Claim(Strict):
    """A sentence about the settings of a sweep, and what would make it true; see `patchrank/report/claims.py`."""

    say: str = Field(pattern=r"^\S[^\n]*$")
    of: dict[str, Any]  # settings: dotted path -> value, or a part of the value where it is a mapping
    against: str | float | dict[str, Any] | None = None  # a key of BESIDE, a number, or what to change in `of`
    measure: Literal[
        "accuracy", "unpruned", "random", "reversed", "agreement", "cosine", "drift",
        "matching", "matching_prior", "kendall", "ndcg",
        "val_accuracy", "val_unpruned", "val_agreement", "val_cosine", "val_drift",
    ]  # fmt: skip
    at_least: float | None = Field(None, allow_inf_nan=False)  # left out: above 0
    within: float | None = Field(None, gt=0, allow_inf_nan=False)
    share: float | None = Field(None, gt=0, allow_inf_nan=False)  # at most so much of what it is set against
    task: str | None = None  # on the images of this task alone
    each: list[str] = []  # one comparison for each value of these paths, or for each task

    @field_validator("of", "against", "each")
    @classmethod
    def _settings_exist(cls, value: Any) -> Any:
        sections = [key for key in known_keys(TrialConfig, ()) if key != "seed"]  # seeds are averaged over
        known = sections + [f"{section}.{key}" for section in sections for key in known_keys(TrialConfig, (section,))]
        if isinstance(value, list):
            paths, known = value, ["task", *known]
        else:
            paths = [*value, *leaves(value)] if isinstance(value, dict) else []
        for path in paths:
            if path not in known:
                raise ValueError(f"{path!r} is no setting that can be compared; {near(path, known)}")
        return value

    @model_validator(mode="after")
    def _counterpart_exists(self) -> Claim:
        if isinstance(self.against, str) and self.measure not in BESIDE.get(self.against, {}):
            pairs = [f"{measure} against {other}" for other, measures in BESIDE.items() for measure in measures]
            raise ValueError(f"{self.measure} against {self.against!r} cannot be compared; known: {', '.join(pairs)}")
        if isinstance(self.against, dict) and leaves(self.against).items() <= leaves(self.of).items():
            raise ValueError("against changes nothing of `of`: a setting would be compared with itself")
        return self

    @model_validator(mode="after")
    def _one_rule(self) -> Claim:
        if sum(rule is not None for rule in (self.at_least, self.within, self.share)) > 1:
            raise ValueError("at_least and within exclude each other, and share both")
        if self.share is not None and not isinstance(self.against, (str, dict)):
            raise ValueError("share needs another side in `against`, of which it is one")
        if self.task is not None and "task" in self.each:
            raise ValueError("task names one task, and `each` asks for all of them")
        return self


class ReportConfig(Strict):
    table: str = Field(pattern=r"^[A-Za-z0-9_-]+$")
    paper: str | None = None
    claims: list[Claim] = []


class Rule(Strict):
    """How one swept setting varies: exactly one of grid, choice, uniform, int."""

    grid: list[Any] | None = Field(None, min_length=1)
    choice: list[Any] | None = Field(None, min_length=1)
    uniform: list[float] | None = Field(None, min_length=2, max_length=2)
    int_: list[int] | None = Field(None, alias="int", min_length=2, max_length=2)
    step: float | None = Field(None, gt=0)
    log: bool = False
    when: dict[str, list[Any]] | list[dict[str, list[Any]]] | None = None  # of several, any one

    @property
    def conditions(self) -> list[dict[str, list[Any]]]:
        """Of which one must be met, all that it says; an empty one always is."""
        return self.when if isinstance(self.when, list) else [self.when or {}]

    def holds(self, values: Callable[[str], Any]) -> bool:
        """Whether one condition is met; `values` gives the value at a path."""
        return any(all(values(path) in allowed for path, allowed in each.items()) for each in self.conditions)

    @property
    def kind(self) -> str:
        return self._kinds()[0]

    @model_validator(mode="after")
    def _exactly_one(self) -> Rule:
        if len(self._kinds()) != 1:
            found = ", ".join(self._kinds()) or "none"
            raise ValueError(f"exactly one of grid, choice, uniform, int must be there, but {found} is")
        return self

    @model_validator(mode="after")
    def _sensible(self) -> Rule:
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
    spaces: list[str] = Field(min_length=1)
    search: SearchConfig = SearchConfig()
    trial: TrialConfig = TrialConfig()
    objectives: list[Objective] = Field([Objective(metric="val_accuracy", mode="max")], min_length=1)
    constraints: list[Constraint] = []
    resources: Resources = Resources()
    time_limit: float | None = Field(None, gt=0)  # seconds, after which a trial is ended and counts as failed
    benchmark: BenchmarkConfig = BenchmarkConfig()
    imports: list[str] = []  # modules that register components of yours, importable on every node
    loggers: Loggers = Loggers()
    report: ReportConfig


def validate(schema: type[BaseModel], value: Any, where: str) -> Any:
    """A model from plain values. Raises `UserError`: one line with file, key, value, rule and the near alternative."""
    if not isinstance(value, dict):
        raise UserError(f"{where}: must hold a mapping of keys to values, but holds {type(value).__name__}")
    try:
        return schema.model_validate(value)
    except ValidationError as error:
        raise UserError(f"{where}: {_first_problem(schema, value, error)}") from error


def _first_problem(schema: type[BaseModel], raw: dict, error: ValidationError) -> str:
    problems = error.errors()
    loc = problems[0]["loc"]
    if problems[0]["type"] == "missing":
        return f"key {'.'.join(map(str, loc))!r} is missing"
    place, value = _written(loc, raw)
    path = ".".join(map(str, place))
    if problems[0]["type"] == "extra_forbidden":
        return f"key {path!r} does not exist; {near(str(place[-1]), known_keys(schema, place[:-1]))}"
    if problems[0]["type"] == "value_error" and isinstance(value, dict):  # of keys that do not fit each other
        return f"{path}: {problems[0]['ctx']['error']}".removeprefix(": ")
    rules = [each["msg"].removeprefix("Input ") for each in problems if each["loc"][: len(place)] == place]
    return f"{path} is {value!r}, but {', or '.join(dict.fromkeys(rules))}"


def _written(loc: tuple, raw: Any) -> tuple[tuple, Any]:
    """The part of a problem's place that the user wrote, and its value; pydantic adds which allowed type it tried."""
    for n, part in enumerate(loc):
        try:
            raw = raw[part]
        except (KeyError, IndexError, TypeError):
            return loc[:n], raw
    return loc, raw


def value_at(config: dict, path: str) -> object:
    """The value at a dotted path of a plain configuration; None below a section that is left out."""
    for part in path.split("."):
        config = None if config is None else config[part]
    return config


def known_keys(schema: type[BaseModel], path: tuple) -> list[str]:
    """The keys that may stand at a place inside a schema."""
    for part in path:
        if isinstance(part, int):  # a place in a list of mappings
            continue
        annotation = schema.model_fields[part].annotation if part in schema.model_fields else None
        annotation = next(iter(get_args(annotation)), annotation)
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            return []
        schema = annotation
    return [field.alias or name for name, field in schema.model_fields.items()]
