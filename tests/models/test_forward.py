"""Changes of a forward pass: their order, their passes, and what is left of them."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar, copy_context
from typing import Any

import pytest
import torch
from torch import nn

from avss_dist.models.forward import (
    BindVariable,
    CallAfter,
    CallBefore,
    ReplaceAttributes,
    ReplaceParameter,
    RunThrough,
    changing,
    while_running,
)

ONES = torch.ones(1, 2)


def linear() -> nn.Linear:
    """A map whose output is the sum of its two inputs."""
    module = nn.Linear(2, 1, bias=False)
    module.weight.data = torch.ones(1, 2)
    return module


def writing(name: str, log: list[str]) -> Callable[..., Any]:
    """An action that writes its name before it runs what it is given."""

    def run(forward: Callable[..., Any], *args: Any) -> Any:
        log.append(name)
        return forward(*args)

    return run


def test_the_action_of_a_later_change_runs_the_earlier_ones() -> None:
    module = linear()
    log: list[str] = []
    inner = [RunThrough(module, writing("second", log)), RunThrough(module, writing("third", log))]
    with changing([RunThrough(module, writing("first", log))]), changing(inner):
        module(ONES)
    assert log == ["third", "second", "first"]


def test_actions_on_weights_run_in_the_order_of_their_changes() -> None:
    module = linear()
    log: list[str] = []
    changes = [RunThrough(module, writing(name, log), needs_weights=True) for name in ("first", "second")]
    with changing(changes):
        module(ONES)
    assert log == ["first", "second"]


@pytest.mark.parametrize("when_called", [False, True])
def test_a_value_is_computed_from_what_earlier_changes_left(when_called: bool) -> None:
    module = linear()
    changes: list[Any] = [
        ReplaceParameter(module, "weight", torch.full((1, 2), 3.0)),
        ReplaceParameter(module, "weight", lambda: module.weight.detach() + 1),
    ]
    if when_called:
        changes = [while_running(change) for change in changes]
    with changing(changes):
        assert module(ONES).item() == 8
    assert module(ONES).item() == 2


def test_a_value_that_is_replaced_while_its_module_runs_is_not_seen_between_runs() -> None:
    module = linear()
    with changing([while_running(ReplaceParameter(module, "weight", torch.zeros(1, 2)))]):
        module(ONES)
        assert module.weight.tolist() == [[1, 1]]


def test_hooks_replace_arguments_and_outputs() -> None:
    module = linear()
    changes = [
        CallBefore(module, lambda args, kwargs: ((args[0] * 10,), kwargs)),
        CallAfter(module, lambda args, kwargs, output: output + 1),
    ]
    with changing(changes):
        assert module(ONES).item() == 21


def test_another_context_does_not_see_actions_hooks_and_variables() -> None:
    module = linear()
    variable: ContextVar[int] = ContextVar("variable", default=0)
    other = copy_context()
    changes = [
        RunThrough(module, lambda forward, x: forward(x) * 100),
        CallAfter(module, lambda args, kwargs, output: output + 1),
        BindVariable(variable, 1),
    ]
    with changing(changes):
        assert module(ONES).item() == 201
        assert variable.get() == 1
        assert other.run(module, ONES).item() == 2
        assert other.run(variable.get) == 0


def test_contexts_of_several_passes_end_in_any_order() -> None:
    module = linear()
    first = changing([RunThrough(module, lambda forward, x: forward(x) * 10)])
    second = changing([RunThrough(module, lambda forward, x: forward(x) * 100)])
    one_pass = copy_context()
    another = copy_context()
    one_pass.run(first.__enter__)
    another.run(second.__enter__)
    one_pass.run(first.__exit__, None, None, None)
    assert another.run(module, ONES).item() == 200
    another.run(second.__exit__, None, None, None)
    assert "forward" not in vars(module)


def test_attributes_are_restored_and_new_ones_removed_after_an_error() -> None:
    module = linear()
    before = dict(vars(module))
    with pytest.raises(KeyError), changing([ReplaceAttributes(module, {"out_features": 7, "new": 1})]):
        assert module.out_features == 7
        raise KeyError
    assert vars(module) == before


def test_a_change_that_fails_undoes_those_before_it() -> None:
    module = linear()
    changes = [ReplaceParameter(module, "weight", torch.zeros(1, 2)), ReplaceParameter(module, "bias", ONES)]
    with pytest.raises(AttributeError), changing(changes):
        pass
    assert module.weight.tolist() == [[1, 1]]
