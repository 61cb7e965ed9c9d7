"""Trials that tests run one by one, without a sweep."""

from patchrank.trial.run import run_trial
from patchrank.tune.space import configure


def runner(base, inputs, folder):
    """Runs a trial that differs from `base` in what is named, with `__` for the dots of paths; returns its record."""

    def run_one(**changes):
        settings = configure(base, {key.replace("__", "."): value for key, value in changes.items()})
        return run_trial(settings, inputs, str(folder), str(folder / "shards"), "test", quiet=True)

    return run_one
