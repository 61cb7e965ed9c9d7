"""Reports know every reducer that ships: its name, its marks, and whether it learned from golden scores."""

from patchrank.layers.reducers import REDUCERS
from patchrank.report.labels import LEARNING, RANKINGS
from patchrank.report.plots.style import COLOURS, MARKERS
from patchrank.report.results import FITTED

OURS = {name for name, kind in REDUCERS.items() if kind.__module__.startswith("patchrank.")}


def test_every_reducer_has_a_name_a_colour_and_a_mark():
    assert OURS == {"predictor", *RANKINGS} == set(COLOURS) == set(MARKERS)


def test_what_is_fitted_is_known():
    fitted = {name for name in OURS if REDUCERS[name].fitted}
    assert fitted == set(FITTED) == set(LEARNING) - {"golden"}
