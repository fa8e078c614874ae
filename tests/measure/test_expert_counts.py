"""Sums over what experts gave, by hand: outputs that are not finite, probabilities, and experts without a router."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from support.observing import observe
from torch import nn

from avss_dist.core.errors import ModelError
from avss_dist.measure.observer import ExpertCounter, Pass, RunningLayer, expert_hooks
from avss_dist.models.layers import Experts, Routing

INDEX = torch.tensor([[0, 2], [2, 1], [2, 0]])
GATES = torch.tensor([[0.5, 0.25], [1.0, 0.5], [0.75, 0.25]])
OUTPUTS = [
    torch.tensor([[3.0, 4.0], [0.0, 1.0], [torch.inf, 1.0]]),
    torch.tensor([[6.0, 8.0], [5.0, 12.0], [0.0, torch.nan]]),
]


def experts(*, normalized: bool = False, router: bool = True) -> Experts:
    return Experts(module=nn.Identity(), number=4, router=nn.Identity() if router else None, normalized=normalized)


def test_sums_by_expert_and_outputs_that_are_not_finite_count_as_routed_alone() -> None:
    counter = ExpertCounter()
    routing = Routing(hidden=torch.zeros(3, 2), index=INDEX, gates=GATES)
    counter.add(7, experts(), routing, OUTPUTS)
    ((layer, found),) = counter.send()().items()
    assert layer == 7 and found.token_count.tolist() == [3] * 4
    assert found.routed_tokens.tolist() == [2, 1, 3, 0]
    assert found.gate_sum.tolist() == [0.75, 0.5, 2.0, 0]
    assert found.gated_norm_sum.tolist() == [0.5 * 5, 0.5 * 13, 0.25 * 10 + 1.0 * 1, 0]
    assert found.output_count.tolist() == [2, 2, 4, 0]
    assert found.output_sum.tolist() == [7, 17, 15, 0]
    assert found.output_sum_sq.tolist() == [25, 169, 101, 0]


@pytest.mark.parametrize("normalized", [True, False])
def test_the_entropy_of_routers_that_give_probabilities_or_logits(normalized: bool) -> None:
    """Probabilities need not add up to 1."""
    given = torch.tensor([[1.0, 1.0, 2.0, 0.0], [0.0, 0.0, 0.0, 3.0]])
    counter = ExpertCounter()
    counter.add_entropy(0, experts(normalized=normalized), given)
    wide = given.double().numpy()
    shares = (wide if normalized else np.exp(wide)) / (wide if normalized else np.exp(wide)).sum(axis=1, keepdims=True)
    expected = -(shares * np.log(np.where(shares > 0, shares, 1))).sum()
    assert counter.send()()[0].router_entropy_sum == pytest.approx([expected] * 4, rel=1e-12)


@pytest.mark.parametrize(("router", "hooks"), [(True, 2), (False, 1)])
def test_only_routers_that_are_modules_are_hooked(router: bool, hooks: int) -> None:
    found = experts(router=router)
    layers: list[Any] = [SimpleNamespace(experts=found), SimpleNamespace(experts=None), SimpleNamespace(experts=found)]
    handles = expert_hooks(layers, lambda: None)
    assert len(handles) == hooks
    for handle in handles:
        handle.remove()
    assert not found.module._forward_pre_hooks


def test_nothing_counts_outside_of_a_pass_of_a_layer_and_where_no_token_does() -> None:
    found, tokens = experts(), torch.zeros(2, 4)
    assert found.router is not None
    with observe([], (), ()) as observer:
        for mask in (None, torch.ones((2, 1), dtype=torch.bool)):
            now = Pass(observer, mask, slice(None), {}, None)
            for current in (lambda: None, lambda now=now: now):
                handles = expert_hooks([SimpleNamespace(experts=found)], current)  # type: ignore[list-item]
                found.router(tokens)
                found.module(tokens)
                for handle in handles:
                    handle.remove()
        assert observer.experts.send()() == {}


def test_experts_that_see_other_tokens_than_the_batch_are_refused() -> None:
    found, mask = experts(), torch.ones((1, 3), dtype=torch.bool)
    assert found.router is not None
    layer: Any = SimpleNamespace(index=5, experts=found)
    with observe([], (), ()) as observer:
        now = Pass(observer, mask, slice(None), {}, None, entered=RunningLayer(layer, None, 0))
        handles = expert_hooks([layer], lambda: now)
        found.router(torch.zeros(3, 4))
        with pytest.raises(ModelError, match="The experts of layer 5 see 2 tokens in a batch of 3"):
            found.router(torch.zeros(2, 4))
        assert observer.experts.send()()[5].router_entropy_sum == pytest.approx([3 * np.log(4)] * 4)
    for handle in handles:
        handle.remove()


def test_without_a_router_there_is_no_entropy() -> None:
    counter = ExpertCounter()
    counter.add(0, experts(router=False), Routing(hidden=torch.zeros(3, 2), index=INDEX, gates=GATES), OUTPUTS)
    assert np.isnan(counter.send()()[0].router_entropy_sum).all()
