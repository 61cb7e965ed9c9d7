"""What a forward ranks and chooses by: which functions of torch are noted, and what forcing them changes."""

import pytest
import torch

from patchrank.export.choices import Choices, Step
from patchrank.utils.errors import UserError

SCORES = torch.tensor([[0.1, 0.9, 0.5, 0.3], [4.0, 3.0, 1.0, 2.0]])

CHOOSING = {
    "argsort": (lambda x: torch.argsort(x), [[0, 3, 2, 1], [2, 3, 1, 0]], False),
    "argsort, largest first": (lambda x: x.argsort(-1, True), [[1, 2, 3, 0], [0, 1, 3, 2]], True),
    "argsort by keywords": (
        lambda x: torch.argsort(input=x, stable=True, descending=True), [[1, 2, 3, 0], [0, 1, 3, 2]], True
    ),
    "sort": (lambda x: x.sort(), [[0, 3, 2, 1], [2, 3, 1, 0]], False),
    "sort, largest first": (lambda x: torch.sort(x, -1, True), [[1, 2, 3, 0], [0, 1, 3, 2]], True),
    "stable sort by keywords": (
        lambda x: torch.sort(x, stable=True, dim=1, descending=True), [[1, 2, 3, 0], [0, 1, 3, 2]], True
    ),
    "topk": (lambda x: x.topk(2), [[1, 2], [0, 1]], True),
    "topk, smallest": (lambda x: torch.topk(x, 2, -1, False), [[0, 3], [2, 3]], False),
    "topk by keywords": (lambda x: torch.topk(input=x, k=2, largest=False), [[0, 3], [2, 3]], False),
    "argmax": (lambda x: x.argmax(-1), [1, 0], True),
    "argmin": (lambda x: torch.argmin(x, dim=1), [0, 2], False),
    "max": (lambda x: x.max(dim=-1), [1, 0], True),
    "min": (lambda x: torch.min(x, 1), [0, 2], False),
}  # fmt: skip


@pytest.mark.parametrize("name", CHOOSING)
def test_what_chooses_is_noted_with_what_comes_first(name):
    choose, index, descending = CHOOSING[name]
    with Choices() as noted:
        choose(SCORES)
    (step,) = noted.steps
    assert step.scores is SCORES and step.index.tolist() == index and noted.descending == [descending]
    assert step.unfit(SCORES, descending).tolist() == [0, 0]
    assert step.unfit(SCORES, not descending).min() > 0


@pytest.mark.parametrize(
    "compute",
    [
        lambda x: torch.max(x, x.flip(0)),
        lambda x: torch.max(x.long(), x.long().flip(0)),
        lambda x: torch.min(x.long(), other=x.long().flip(0)),
        lambda x: x.max(),
        lambda x: x[0].argmax(),
        lambda x: x.sum(1),
        lambda x: x[:, :0].sort(),
        lambda x: x[:, :0].argsort(),
        lambda x: x.topk(0),
        lambda x: max([3, 1]),
    ],
)
def test_what_chooses_no_places_is_not_noted(compute):
    with Choices() as noted:
        compute(SCORES)
    assert noted.steps == [] == noted.descending


def test_a_program_notes_by_the_names_of_operators():
    values, index = SCORES.sort(dim=-1)
    assert torch.equal(Step.of("sort", SCORES, (values, index)).index, index)
    assert Step.of("split", SCORES, (values, index)) is None and Step.of("sort", None, (values, index)) is None


PARTIAL = [
    ([[1, 2], [0, 1]], [0, 0]),
    ([[2, 1], [0, 1]], [0.4, 0]),  # in the wrong order
    ([[1, 3], [0, 3]], [0.2, 1.0]),  # 0.3 in the place of 0.5, 2 in that of 3, in order
    ([[1, 2], [1, 3]], [0, 2.0]),  # the best is not among them
]


@pytest.mark.parametrize("index, unfit", PARTIAL)
def test_of_a_part_that_is_chosen_the_set_counts_too(index, unfit):
    step = Step(SCORES, torch.tensor(index))
    torch.testing.assert_close(step.unfit(SCORES, True), torch.tensor(unfit).float())
    torch.testing.assert_close(step.unfit(-SCORES, False), torch.tensor(unfit).float())


def test_unfit_is_of_the_worst_place_of_an_image():
    scores = torch.stack([SCORES, 10 * SCORES])  # (2, 2, 4): images, rows
    step = Step(scores, torch.tensor([[1, 0], [2, 0]]))
    torch.testing.assert_close(step.unfit(scores, True), torch.tensor([0.0, 4.0]))


def test_infinite_scores_are_no_contradiction_among_themselves():
    scores = torch.tensor([[torch.inf, 1.0, torch.inf, -torch.inf, -torch.inf]])
    assert Step(scores, torch.tensor([[2, 0, 1, 4, 3]])).unfit(scores, True).tolist() == [0]
    assert Step(scores, torch.tensor([[0, 2]])).unfit(scores, True).tolist() == [0]
    assert Step(scores, torch.tensor([[0, 1]])).unfit(scores, True).tolist() == [torch.inf]
    assert Step(scores, torch.tensor([2])).unfit(scores, True).tolist() == [0]


FORCED = torch.tensor([[2, 0, 3, 1], [3, 2, 1, 0]])
ORDERING = [name for name in CHOOSING if "sort" in name]


@pytest.mark.parametrize("name", ORDERING)
def test_forced_orders_come_out_with_their_values(name):
    choose, *_ = CHOOSING[name]
    with Choices([FORCED]) as forced:
        found = choose(SCORES)
    if "argsort" not in name:
        assert torch.equal(found.values, SCORES.gather(1, FORCED))
        found = found.indices
    assert torch.equal(found, FORCED) and torch.equal(forced.steps[0].index, FORCED)


@pytest.mark.parametrize("name", ["argmax", "argmin", "max", "min"])
def test_forced_single_places_come_out_with_their_values(name):
    choose, *_ = CHOOSING[name]
    places = torch.tensor([3, 1])
    with Choices([places]):
        found = choose(SCORES)
    if not name.startswith("arg"):
        assert torch.equal(found.values, SCORES.gather(1, places[:, None])[:, 0])
        found = found.indices
    assert torch.equal(found, places)


def test_choices_are_forced_in_their_order_and_take_other_shapes_of_the_same_count():
    first, second = torch.tensor([[3, 1], [2, 0]], dtype=torch.int32), torch.tensor([[3], [1]])
    with Choices([first, second]) as forced:
        assert torch.equal(SCORES.topk(2).indices, first.long())
        assert SCORES.argmax(1).tolist() == [3, 1]
    assert forced.steps[1].unfit(SCORES, True).tolist() == pytest.approx([0.6, 1.0])


@pytest.mark.parametrize("counts", [[], [4], [2], [2, 4, 4]])
def test_another_number_of_choices_is_refused_in_one_line(counts):
    choices = [torch.zeros(2, count, dtype=torch.long) for count in counts]
    with pytest.raises(UserError, match="does not choose as this tower does, .*; try to export anew") as caught:
        with Choices(choices):
            SCORES.topk(2)
            SCORES.sort()
    assert "\n" not in str(caught.value)
