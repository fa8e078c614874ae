"""Searches, told losses of a function of the set: what they ask, what they choose, how far a budget goes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from itertools import combinations
from math import nan
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from avss_dist.core.errors import ConfigError
from avss_dist.core.intervention import (
    Removal,
    Removals,
    can_be_added,
    encode_removals,
    joined,
    size_removed,
    sublayers_of,
)
from avss_dist.pruning.search import Effort, Expansion, search_for
from avss_dist.pruning.selection import Choice, PlanError

Loss = Callable[[Removals], float]


def rugged(seed: int, n: int) -> Loss:
    """A loss to which layers add alone and in pairs."""
    rng = np.random.default_rng(seed)
    b, h = rng.gamma(1.0, size=n), rng.normal(size=(n, n))
    return lambda drop: float(b[[*drop]].sum() + h[np.ix_(drop, drop)].sum() / 2)


def run(
    choice: Choice, effort: Effort, layers: int, loss: Loss, starts: tuple[Removals, ...] = ()
) -> tuple[Removals, list[list[Expansion]], dict[Removals, float]]:
    """What a search chooses, what it asked, and what it was told."""
    search = search_for(choice, effort, layers, starts)
    asked, told = [next(search)], {}
    while True:
        answers: Mapping[Removals, float] = {drop: loss(drop) for one in asked[-1] for drop in one.sets}
        assert len(answers) == sum(len(one.sets) for one in asked[-1]) and not answers.keys() & told.keys()
        told |= answers
        try:
            asked.append(search.send(answers))
        except StopIteration as chosen:
            return chosen.value, asked, told


def greedy(loss: Loss, layers: int, count: int) -> Removals:
    drop: Removals = ()
    while len(drop) < count:
        drop = min((tuple(sorted({*drop, more})) for more in range(layers) if more not in drop), key=loss)
    return drop


@given(st.integers(0, 10**6), st.integers(2, 9), st.data())
def test_greedy_takes_the_best_layer_at_each_step(seed: int, layers: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(1, layers - 1))
    loss = rugged(seed, layers)
    drop, asked, told = run(Choice(by="greedy", count=count), Effort(), layers, loss)
    assert drop == greedy(loss, layers, count)
    assert [len(one.base) for (one,) in asked] == list(range(count))
    assert len(told) == sum(layers - size for size in range(count))


@given(st.integers(0, 10**6), st.integers(2, 7), st.data())
def test_a_beam_is_as_good_as_it_is_wide(seed: int, layers: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(1, layers - 1))
    loss = rugged(seed, layers)
    one, *_ = run(Choice(by="beam", count=count), Effort(width=1), layers, loss)
    assert one == greedy(loss, layers, count)
    for width in (2, 3):
        some, *_ = run(Choice(by="beam", count=count), Effort(width=width), layers, loss)
        assert loss(some) <= loss(one)
    every, _, told = run(Choice(by="beam", count=count), Effort(width=1000), layers, loss)
    assert every == min(combinations(range(layers), count), key=loss)
    assert len(told) == sum(len([*combinations(range(layers), size)]) for size in range(1, count + 1))


@given(st.integers(0, 10**6), st.sampled_from(["greedy", "beam", "evolve"]), st.integers(9, 80), st.integers(0, 9))
def test_a_budget_is_kept_and_ends_are_protected(seed: int, by: str, budget: int, number: int) -> None:
    choice = Choice(by=by, count=4, first=1, last=2, seed=number)
    start = () if by != "evolve" else ((1, 2, 3, 4), (2, 4, 6, 7))
    drop, _, told = run(choice, Effort(budget=budget), 10, rugged(seed, 10), start)
    assert len(told) <= budget
    assert len(drop) == 4 and 0 not in drop and not {8, 9} & {*drop}
    assert told[drop] == min(loss for other, loss in told.items() if len(other) == 4)


def test_where_a_budget_ends_the_last_step_decides() -> None:
    """After one step, the lowest of leaving one out; after two, the lowest beside the first."""
    losses = {0: 0.4, 1: 0.1, 2: 0.2, 3: 0.3}

    def loss(drop: Removals) -> float:
        return sum(losses[layer] for layer in drop) + (5 if {1, 2} <= {*drop} else 0)

    expected = {5: (1, 2, 3), 7: (1, 2, 3), 8: (0, 1, 3), 9: (0, 1, 3)}
    for budget, drop in expected.items():
        found, asked, told = run(Choice(by="greedy", count=3), Effort(budget=budget), 4, loss)
        assert (found, len(told)) == (drop, {5: 5, 7: 5, 8: 8, 9: 9}[budget])
        assert budget == 9 or asked[-1] == [Expansion(drop)]


@given(st.integers(0, 10**6), st.integers(0, 20))
def test_evolution_is_no_worse_than_greedy_and_more_of_it_no_worse_than_less(seed: int, number: int) -> None:
    loss, choice = rugged(seed, 12), Choice(by="evolve", count=4, seed=number)
    reached = [loss(run(choice, Effort(budget=budget), 12, loss)[0]) for budget in (84, 120, 200, 480)]
    assert reached == sorted(reached, reverse=True)
    assert reached[0] <= loss(greedy(loss, 12, 4))
    drop, _, told = run(choice, Effort(budget=480), 12, loss)
    assert (drop, told) == run(choice, Effort(budget=480), 12, loss)[::2]
    if len(told) < 480:  # no exchange was left to try
        swaps = [tuple(sorted({*drop, more} - {out})) for out in drop for more in range(12) if more not in drop]
        assert told.keys() >= {*swaps}


@given(st.integers(0, 10**6), st.integers(2, 5), st.data())
def test_sublayers_are_halves_of_layers(seed: int, layers: int, data: st.DataObject) -> None:
    """Greedy takes a sublayer or, beside what it had a step before, a layer; enough width finds the best set."""
    count, rng = data.draw(st.integers(1, layers - 1)), np.random.default_rng(seed)
    weights = {one: rng.normal() for one in (*range(layers), *sublayers_of(range(layers)))}

    def loss(drop: Removals) -> float:
        numbers = encode_removals(drop)
        return sum(weights[one] for one in drop) + 0.3 * float(np.sin([sum(numbers), max(numbers) % 7]).sum())

    def larger(drop: Removals, among: Iterable[Removal]) -> list[Removals]:
        return [joined([*drop, one]) for one in among if can_be_added(one, drop)]

    every: list[set[Removals]] = [{()}]
    line: list[Removals] = [()]
    for size in range(1, 2 * count + 1):
        reached = larger(line[-1], sublayers_of(range(layers))) + (larger(line[-2], range(layers)) if size > 1 else [])
        line.append(min(reached, key=lambda drop: (loss(drop), drop)))
        every.append({more for drop in every[-1] for more in larger(drop, sublayers_of(range(layers)))})
    choice = Choice(by="greedy", count=count, sublayers=True)
    found, *_ = run(choice, Effort(), layers, loss)
    assert found == line[-1] and size_removed(found) == count
    best, *_ = run(Choice(by="beam", count=count, sublayers=True), Effort(width=10**6), layers, loss)
    assert best == min(every[-1], key=loss)
    budget = data.draw(st.integers(2 * layers + 1, 200))
    some, _, told = run(choice, Effort(budget=budget), layers, loss)
    assert len(told) <= budget and size_removed(some) == count and some in told


def test_evolution_begins_with_what_it_is_given() -> None:
    def loss(drop: Removals) -> float:
        return 0.0 if drop == (3, 5, 7) else 1.0 + min(drop)

    choice = Choice(by="evolve", count=3)
    assert run(choice, Effort(budget=20), 8, loss, ((3, 5, 7),))[0] == (3, 5, 7)
    assert run(choice, Effort(budget=20), 8, loss)[0] != (3, 5, 7)


def test_sets_that_the_model_breaks_without_are_never_chosen() -> None:
    def loss(drop: Removals) -> float:
        return nan if 0 in drop else float(sum(drop))

    for by in ("greedy", "beam", "evolve"):
        assert run(Choice(by=by, count=2), Effort(budget=40), 5, loss)[0] == (1, 2)


def test_a_set_is_made_from_the_base_that_shares_most_of_its_pass() -> None:
    """With two bases, (0,) and (3,): (0, 3) is asked as (0,) without 3, whose pass begins later."""
    *_, last = run(Choice(by="beam", count=2), Effort(width=2), 4, lambda drop: 0.0 if {*drop} <= {0, 3} else 1.0)[1]
    assert {(one.base, layer) for one in last for layer in one.layers} == {
        ((0,), 1),
        ((0,), 2),
        ((0,), 3),
        ((3,), 1),
        ((3,), 2),
    }


@pytest.mark.parametrize(
    ("choice", "effort", "words"),
    [
        ({"by": "greedy"}, {"width": 2}, "`width` has no effect"),
        ({"by": "greedy", "count": 2}, {"budget": 8}, "`budget` 8 does not suffice for one step.*\n.*at least 9"),
        ({"by": "beam", "count": 1}, {"budget": 7}, "at least 8"),
        ({"by": "beam", "count": 2, "first": 3}, {"budget": 5}, "at least 6"),
        ({"by": "evolve", "count": 2}, {"budget": 9}, "at least 10"),
        ({"by": "evolve", "count": 2}, {}, "needs a `budget`.*\n.*a greedy search takes 15"),
    ],
)
def test_what_cannot_make_a_step_is_refused(choice: dict[str, Any], effort: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        search_for(Choice(**choice), Effort(**effort), 8)


def test_what_is_no_search_is_refused() -> None:
    for wrong in ({"mass": 0.2}, {"contiguous": True}, {"highest": True}):
        with pytest.raises(ConfigError, match="chooses among sets"):
            Choice(by="beam", **wrong)
    with pytest.raises(ConfigError, match="begins with the whole model"):
        search_for(Choice(by="beam"), Effort(), 8, [(1, 2)])
    with pytest.raises(PlanError, match="not protected"):
        search_for(Choice(by="greedy", count=6, first=2, last=1), Effort(), 8)
    with pytest.raises(ConfigError, match="`budget` must be at least 1"):
        Effort(budget=0)
