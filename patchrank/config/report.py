"""What a report is to show, and the claims that it is to judge."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from patchrank.config.base import ListOf, Strict
from patchrank.config.trial import TrialConfig
from patchrank.config.validation import known_keys, leaves
from patchrank.utils.errors import near

# what stands beside a trial's own measures, to be compared with: `against` -> measure -> its counterpart
BESIDE = {
    "unpruned": {
        "accuracy": "unpruned",
        "val_accuracy": "val_unpruned",
        "knn_accuracy": "knn_unpruned",
        "val_knn_accuracy": "val_knn_unpruned",
    },
    "prior": {"matching": "matching_prior"},
}


class Claim(Strict):
    """A sentence about the settings of a sweep, and what would make it true; see `patchrank/report/claims.py`."""

    say: str = Field(pattern=r"^\S[^\n]*$")
    of: dict[str, Any]  # settings: dotted path -> value, or a part of the value where it is a mapping
    against: str | float | dict[str, Any] | None = None  # a key of BESIDE, a number, or what to change in `of`
    measure: Literal[
        "accuracy", "unpruned", "random", "reversed", "agreement", "cosine", "drift",
        "knn_accuracy", "knn_unpruned", "knn_random", "knn_reversed", "knn_agreement",
        "matching", "matching_prior", "kendall", "ndcg",
        "val_accuracy", "val_unpruned", "val_agreement", "val_cosine", "val_drift",
        "val_knn_accuracy", "val_knn_unpruned", "val_knn_agreement",
    ]  # fmt: skip
    # what the other side has in common, where `against` is not all that it differs in; it may be several settings then
    match: ListOf[str] | None = None
    at_least: float | None = None  # left out: above 0
    not_behind: bool = False  # true where the interval does not lie below 0
    within: float | None = Field(None, gt=0)
    share: float | None = Field(None, gt=0)  # at most so much of what it is set against
    task: str | None = None  # on the images of this task alone
    answers: bool = False  # it is the answer to `question`; where none is marked, the first claim is
    each: ListOf[str] = ()  # one comparison for each value of these paths, or for each task

    @field_validator("of", "against", "each", "match")
    @classmethod
    def _settings_exist(cls, value: Any) -> Any:
        sections = [key for key in known_keys(TrialConfig, ()) if key not in ("seed", "controls")]
        # seeds are averaged over, and a control is a measure of its trial
        known = sections + [f"{section}.{key}" for section in sections for key in known_keys(TrialConfig, (section,))]
        if isinstance(value, tuple):
            paths, known = list(value), ["task", *known]
        else:
            paths = [*value, *leaves(value)] if isinstance(value, dict) else []
        for path in paths:
            if path not in known:
                raise ValueError(f"{path!r} is no setting that can be compared; {near(path, known)}")
        return value

    @model_validator(mode="after")
    def _sides_fit(self) -> Claim:
        if isinstance(self.against, str) and self.measure not in BESIDE.get(self.against, {}):
            pairs = [f"{measure} against {other}" for other, measures in BESIDE.items() for measure in measures]
            raise ValueError(f"{self.measure} against {self.against!r} cannot be compared; known: {', '.join(pairs)}")
        if isinstance(self.against, dict) and leaves(self.against).items() <= leaves(self.of).items():
            raise ValueError("against changes nothing of `of`: a setting would be compared with itself")
        if sum(rule is not None for rule in (self.at_least, self.within, self.share, self.not_behind or None)) > 1:
            raise ValueError("at_least and within exclude each other, and share and not_behind all of them")
        if self.match is not None and not isinstance(self.against, dict):
            raise ValueError("match needs settings of the other side in `against`; try {pruning.reducer: tome}")
        if self.share is not None and not isinstance(self.against, (str, dict)):
            raise ValueError("share needs another side in `against`, of which it is one")
        if self.task is not None and "task" in self.each:
            raise ValueError("task names one task, and `each` asks for all of them")
        return self


class ReportConfig(Strict):
    table: str = Field(pattern=r"^[A-Za-z0-9_-]+$")
    question: str | None = Field(None, pattern=r"^\S[^\n]*$")  # what the sweep is to answer, in one plain sentence
    paper: str | None = None
    claims: ListOf[Claim] = ()
    beside: ListOf[str] = ()  # roots of other sweeps, whose rows are shown and compared as well
    # by_task: the change of each task with its interval; seen: images and labels that were learned from, and the drift;
    # share: of the unpruned tower's MACs; parts: MACs of image tower, ranking, matching and one caption
    columns: ListOf[Literal["by_task", "seen", "share", "parts"]] = ()

    @field_validator("claims")
    @classmethod
    def _one_answer(cls, claims: tuple[Claim, ...]) -> tuple[Claim, ...]:
        if sum(claim.answers for claim in claims) > 1:
            raise ValueError("only one claim can answer the question; try `answers: true` at that one alone")
        return claims
