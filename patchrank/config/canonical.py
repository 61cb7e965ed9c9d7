"""The canonical form of settings, which records state and content ids are made of.

A setting that is added later stands in it only where it is not at its default. So ids stay what they were, and records
and prompts of earlier versions are found again, whatever settings come on top.
"""

from __future__ import annotations

from pydantic import BaseModel

# The settings of a trial, by section, that were there when ids were first given out: these always stand in it. Whoever
# adds a setting does NOT write it down here.
FIRST = {
    "": {"seed", "model", "data", "golden", "predictor", "pruning", "controls", "prompt"},
    "model": {"name", "checkpoint"},
    "data": {"tasks", "root", "vocabulary", "templates", "n_train", "n_val", "n_test", "n_oracle"},
    "golden": {"metric", "window", "stride", "remove_at", "rounds"},
    "predictor": {"name", "dim", "head", "loss", "epochs", "lr", "fit_on"},
    "pruning": {"reducer", "leftovers", "keep_rate", "drop_counts", "locations"},
    "prompt": {
        *("mode", "loss", "norm_gains", "num_tokens", "preset", "shots", "images", "epochs", "lr", "batch_size"),
        *("bias", "class_specific", "words", "augment", "patience", "precision", "checkpointing"),
    },
}

# Sections that came later are null by default, which changes no id. Where they are not null, these settings stand in
# them, so that records say what they were.
LATER = {"repair": {"images", "ridge"}}


def canonical(settings: BaseModel, section: str = "") -> dict:
    """Plain values, lists for tuples, without settings that were added later and stand at their default.

    Args:
        settings: a whole trial, or one section of it.
        section: which one: `data`, `prompt`, ...; "" for the whole trial.
    """
    plain = settings.model_dump(mode="json")
    for name, field in type(settings).model_fields.items():
        value = getattr(settings, name)
        if name not in (FIRST | LATER).get(section, ()) and value == field.get_default(call_default_factory=True):
            del plain[name]
        elif isinstance(value, BaseModel):
            plain[name] = canonical(value, name)
    return plain
