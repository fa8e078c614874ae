"""Routed experts: every sum against numpy over what routers gave, of families that spell them differently.

By hand, outputs that are not finite, probabilities, and experts without a router.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose
from support.checkpoints import VOCABULARY
from support.command_line import avss
from support.families import tiny_batch, tiny_model
from support.tables import run_rows
from support.tiers import all_of
from torch import nn

from avss_dist.analysis.experts import require_experts
from avss_dist.analysis.findings import findings
from avss_dist.core.errors import ModelError
from avss_dist.core.process import bound
from avss_dist.core.thresholds import THRESHOLDS
from avss_dist.measure.observer import PASSES, EnteredLayer, ExpertCounter, Observer, Pass, attached
from avss_dist.models.checkpoint.loading import Backbone, forward_function, open_module
from avss_dist.models.structure.layers import Experts, Routing
from avss_dist.stats.layer_stats import EXPERT_FIELDS, ExpertStats, merge_stats
from avss_dist.warehouse.encoding import to_experts
from avss_dist.warehouse.reader import Warehouse

FAMILIES = ("mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss", "granitemoe")
MASK = np.ones((2, 12), bool)
MASK[1, 7:] = False  # padding


def observed(backbone: Backbone, ids: torch.Tensor, mask: np.ndarray) -> dict[int, ExpertStats]:
    run = forward_function(backbone.module)
    with attached(backbone.layers, ("block",), experts=True) as hooks, torch.no_grad():
        observer = Observer(hooks, THRESHOLDS)
        with observer.batch(mask):
            run(ids, None)
    return observer.experts.send()()


def captured(backbone: Backbone, ids: torch.Tensor) -> dict[int, tuple[Any, ...]]:
    """By layer, what its router returned, and what its experts read."""
    captures: dict[int, list[Any]] = {}
    handles = []
    for layer in backbone.layers:
        if experts := layer.experts:
            capture = captures.setdefault(layer.index, [None, None])

            def router(_module: Any, _args: Any, output: Any, capture: list[Any] = capture) -> None:
                capture[0] = [t.clone() for t in output]

            def read(_module: Any, args: Any, _output: Any, capture: list[Any] = capture) -> None:
                capture[1] = args[0].clone()

            assert experts.router is not None
            handles += [experts.router.register_forward_hook(router), experts.module.register_forward_hook(read)]
    with torch.no_grad():
        before = forward_function(backbone.module)(ids, None)
    for handle in handles:
        handle.remove()
    assert before is not None
    return {layer: tuple(capture) for layer, capture in captures.items()}


def recount(module: Any, number: int, router: Any, hidden: torch.Tensor, mask: np.ndarray) -> dict[str, np.ndarray]:
    """Every field, token by token, in numpy; an expert runs on one token at a time."""
    logits, gates, index = [t.reshape(hidden.shape[0], -1).double().numpy() for t in router]
    fields = {name: np.zeros(number) for name in EXPERT_FIELDS}
    for token in np.flatnonzero(mask.reshape(-1)):
        exponents = np.exp(logits[token] - logits[token].max())
        shares = exponents / exponents.sum()
        fields["router_entropy_sum"] += -(shares * np.log(shares)).sum()
        fields["token_count"] += 1
        for gate, expert in zip(gates[token], index[token].astype(int), strict=True):
            chosen = torch.tensor([[expert]])
            with torch.no_grad():
                x = module(hidden[token : token + 1], chosen, torch.ones(1, 1)).double().numpy()
            fields["routed_tokens"][expert] += 1
            fields["gate_sum"][expert] += gate
            fields["gated_norm_sum"][expert] += gate * np.linalg.norm(x)
            fields["output_count"][expert] += x.size
            fields["output_sum"][expert] += x.sum()
            fields["output_sum_sq"][expert] += (x**2).sum()
    return fields


@pytest.mark.parametrize("family", all_of(FAMILIES, ["mixtral", "deepseek_v3", "gpt_oss"]))
def test_counts_are_those_of_what_the_router_gave(family: str) -> None:
    backbone = open_module(tiny_model("causal", family))
    ids = tiny_batch()
    seen = captured(backbone, ids)
    stats = observed(backbone, ids, MASK)
    assert list(stats) == list(seen)
    assert stats
    for layer, (router, hidden) in seen.items():
        experts = backbone.layers[layer].experts
        assert experts is not None
        expected = recount(experts.module, experts.number, router, hidden, MASK)
        for name in ("routed_tokens", "token_count", "output_count"):
            assert getattr(stats[layer], name).tolist() == expected[name].astype(int).tolist(), (family, layer, name)
        for name in EXPERT_FIELDS:
            assert_allclose(getattr(stats[layer], name), expected[name], rtol=1e-4, atol=1e-7)
    for module in backbone.module.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


def test_rows_merge_and_a_router_that_gives_probabilities_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("causal", "mixtral")
    backbone = open_module(model)
    ids = tiny_batch()
    rows = [observed(backbone, ids[i : i + 1], MASK[i : i + 1]) for i in range(2)]
    whole = observed(backbone, ids, MASK)
    merged = merge_stats(rows)
    for layer, stats in whole.items():
        assert stats.routed_tokens.tolist() == merged[layer].routed_tokens.tolist()
        for name in EXPERT_FIELDS:
            assert_allclose(getattr(merged[layer], name), getattr(stats, name), rtol=1e-4, atol=1e-7)
    for layer in backbone.layers:
        assert layer.experts
        assert layer.experts.router
        assert not layer.experts.normalized
        router = layer.experts.router
        given = router.forward
        monkeypatch.setattr(router, "forward", lambda x, given=given: _with_probabilities(given(x)))
    again = open_module(model)
    for layer in again.layers:
        assert layer.experts
        assert layer.experts.normalized
    for layer, stats in observed(again, ids, MASK).items():
        assert_allclose(stats.router_entropy_sum, whole[layer].router_entropy_sum, rtol=1e-4, atol=1e-7)


def _with_probabilities(output: Any) -> Any:
    return output[0].softmax(dim=-1), *output[1:]


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory, save_checkpoint: Callable[[Any, Path], Path]) -> Iterator[Path]:
    """A mixture of experts of which one is never chosen, and one carries the last layer, scored in two shards."""
    root = tmp_path_factory.mktemp("experts")
    model = tiny_model("causal", "deepseek_v3")
    model.resize_token_embeddings(VOCABULARY)
    for layer in model.model.layers[1:]:
        layer.mlp.gate.e_score_correction_bias[0] = -100.0
    model.model.layers[2].mlp.experts.down_proj.data[1] *= 1000
    folder = save_checkpoint(model, root / "model")
    small = ("--sequence-length", "32", "--max-sequences", "4", "--sequences-per-shard", "2", "--executor", "local")
    done = avss("score", folder, "--corpus", "builtin:pydoc", "-w", root / "warehouse", "--experts", *small)
    assert done.exit_code == 0, done.stderr
    yield root / "warehouse"


def test_the_warehouse_has_a_row_for_each_expert_and_the_sums_of_its_shards(scored: Path) -> None:
    warehouse = Warehouse(str(scored))
    (run,) = warehouse.runs().to_pylist()
    merged = to_experts(warehouse.table("expert_stats"))
    shards = warehouse.table("shard_expert_stats").to_pylist()
    assert {row["shard_id"] for row in shards} == {0, 1}
    for layer, stats in merged.items():
        assert len(stats.routed_tokens) == 4
        assert stats.routed_tokens.sum() == 2 * run["num_tokens"] == 2 * stats.token_count[0]
        for expert, tokens in enumerate(stats.routed_tokens.tolist()):
            assert (tokens == 0) == (expert == 0)
            own_rows = [row for row in shards if (row["layer"], row["expert"]) == (layer, expert)]
            assert tokens == sum(row["routed_tokens"] for row in own_rows)
        (shown,) = [shown for shown in require_experts(warehouse, run["run_id"]) if shown.layer == layer]
        shares = stats.routed_tokens[1:] / stats.routed_tokens.sum()
        assert_allclose(shown.balance, -(shares * np.log(shares)).sum() / np.log(4))
        assert shown.idle == [0]
        assert 0 < shown.router_entropy < 1


def test_experts_are_shown_and_found(scored: Path) -> None:
    shown = avss("show", "-w", scored, "--experts")
    assert shown.exit_code == 0, shown.stderr
    assert "least salient" in shown.stdout, shown.stderr
    kinds = {row["kind"]: row["message"] for row in findings(Warehouse(str(scored))).to_pylist()}
    assert "2 of 8 experts got no token of this text, in layers 1-2 (layer 1: 0; layer 2: 0)" in kinds["idle_experts"]
    dominant = "more than half of what all experts add, in layer 2 (expert 1 gives 100% in layer 2)"
    assert dominant in kinds["dominant_expert"]


def test_a_run_without_experts_says_how_to_get_them(tiny_llama: Path, tmp_path: Path) -> None:
    small = ("--sequence-length", "32", "--max-sequences", "2", "--executor", "local")
    out = tmp_path / "warehouse"
    assert avss("score", tiny_llama, "--corpus", "builtin:pydoc", "-w", out, "--experts", *small).exit_code == 0
    (run,) = run_rows(str(out))
    assert any("no layer has routed experts" in note for note in run["notes"])
    refused = avss("show", "-w", out, "--experts")
    assert refused.exit_code == 2
    assert "has no statistics of routed experts" in refused.stderr


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
    ((layer, stats),) = counter.send()().items()
    assert layer == 7
    assert stats.token_count.tolist() == [3] * 4
    assert stats.routed_tokens.tolist() == [2, 1, 3, 0]
    assert stats.gate_sum.tolist() == [0.75, 0.5, 2.0, 0]
    assert stats.gated_norm_sum.tolist() == [0.5 * 5, 0.5 * 13, 0.25 * 10 + 1.0 * 1, 0]
    assert stats.output_count.tolist() == [2, 2, 4, 0]
    assert stats.output_sum.tolist() == [7, 17, 15, 0]
    assert stats.output_sum_sq.tolist() == [25, 169, 101, 0]


@pytest.mark.parametrize("normalized", [True, False])
def test_the_entropy_of_routers_that_give_probabilities_or_logits(normalized: bool) -> None:
    """Probabilities need not add up to 1."""
    given = torch.tensor([[1.0, 1.0, 2.0, 0.0], [0.0, 0.0, 0.0, 3.0]])
    counter = ExpertCounter()
    counter.add_entropy(0, experts(normalized=normalized), given)
    wide = given.double().numpy()
    weights = wide if normalized else np.exp(wide)
    shares = weights / weights.sum(axis=1, keepdims=True)
    expected = -(shares * np.log(np.where(shares > 0, shares, 1))).sum()
    assert counter.send()()[0].router_entropy_sum == pytest.approx([expected] * 4, rel=1e-12)


def layer_of(own_experts: Experts | None) -> Any:
    """A layer of an index, with these experts alone."""
    return SimpleNamespace(index=5, module=nn.Identity(), call=0, taps={}, experts=own_experts)


@pytest.mark.parametrize("router", [True, False])
def test_only_routers_that_are_modules_are_hooked(router: bool) -> None:
    own_experts = experts(router=router)
    with attached([layer_of(own_experts), layer_of(None), layer_of(own_experts)], (), experts=True):
        assert len(own_experts.module._forward_pre_hooks) == 1
        if own_experts.router:
            assert len(own_experts.router._forward_hooks) == 1
    assert not own_experts.module._forward_pre_hooks


def test_nothing_counts_outside_of_a_pass_of_a_layer_and_where_no_token_does() -> None:
    own_experts = experts()
    tokens = torch.zeros(2, 4)
    assert own_experts.router is not None
    with attached([layer_of(own_experts)], (), experts=True) as hooks:
        observer = Observer(hooks, ())
        for counted in (False, True):
            mask = torch.full((2, 1), counted)
            for passes in ((), (Pass(observer, mask, slice(None), None),)):
                with bound(PASSES, passes):
                    own_experts.router(tokens)
                    own_experts.module(tokens)
        assert observer.experts.send()() == {}


def test_experts_that_see_other_tokens_than_the_batch_are_refused() -> None:
    own_experts = experts()
    mask = torch.ones((1, 3), dtype=torch.bool)
    assert own_experts.router is not None
    with attached([layer_of(own_experts)], (), experts=True) as hooks:
        observer = Observer(hooks, ())
        current = Pass(observer, mask, slice(None), None, entered=EnteredLayer(layer_of(own_experts), None, 0))
        with bound(PASSES, (current,)):
            own_experts.router(torch.zeros(3, 4))
            with pytest.raises(ModelError, match="The experts of layer 5 see 2 tokens in a batch of 3"):
                own_experts.router(torch.zeros(2, 4))
        assert observer.experts.send()()[5].router_entropy_sum == pytest.approx([3 * np.log(4)] * 4)


def test_without_a_router_there_is_no_entropy() -> None:
    counter = ExpertCounter()
    counter.add(0, experts(router=False), Routing(hidden=torch.zeros(3, 2), index=INDEX, gates=GATES), OUTPUTS)
    assert np.isnan(counter.send()()[0].router_entropy_sum).all()
