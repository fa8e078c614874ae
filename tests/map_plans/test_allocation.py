"""What sparsities are chosen by: damage against autograd, greedy paths against plain runs, plans of every method."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.causal_lm import opened, random_shard
from support.command_line import as_words, succeed
from support.experiments import cell_times
from support.tiers import nightly

from avss_dist import sparsify
from avss_dist.core.errors import ConfigError
from avss_dist.map_plans.plans import SparsityPlan
from avss_dist.models.causal_lm import LanguageModel
from avss_dist.pruning.plan import read_checked_plan
from avss_dist.runs.api import score
from avss_dist.tasks.block_search import GreedyBlock, Spectra, hill_exponent
from avss_dist.tasks.map_damage import MapDamage

TEXT = "builtin:pydoc"
SMALL = {"max_sequences": 2, "sequence_length": 32, "batch_size": 2, "sequences_per_shard": 2, "device": "cpu"}


@pytest.fixture(scope="module")
def model(tiny_llama: Path) -> LanguageModel:
    return opened(tiny_llama, dtype="float32")


def split(given: dict[int, torch.Tensor], number: int, _module: object, args: tuple[torch.Tensor]) -> Any:
    """Have the gradient of what goes through one map alone."""
    given[number] = args[0].detach().clone().requires_grad_()
    return (args[0] + given[number] - given[number].detach(),)


def test_damage_is_that_of_autograd(model: LanguageModel) -> None:
    shard = random_shard()
    keys = [(0, "self_attn.k_proj"), (1, "mlp.up_proj"), (2, "mlp.down_proj")]
    edges = (0.05, 0.4, 1.0)
    found = {
        (row.metric, row.layer): row.samples
        for row in MapDamage(shard=shard, thresholds=dict.fromkeys(keys, edges), seed=4)(model)
    }
    first, second = np.zeros((3, 3)), np.zeros((3, 3))
    for batch in shard.batches(1):
        given: dict[int, torch.Tensor] = {}
        handles = []
        for number, (layer, path) in enumerate(keys):
            hook = partial(split, given, number)
            handles.append(model.layers[layer].module.get_submodule(path).register_forward_pre_hook(hook))
        hidden = model.hidden_states(batch)
        seeds = model.loss_gradients(hidden.detach(), batch, 2, 4)
        for number, seed in enumerate(seeds):
            gradients = torch.autograd.grad(hidden, [given[i] for i in range(3)], seed, retain_graph=True)
            for i, gradient in enumerate(gradients):
                for k, edge in enumerate(edges):
                    change = -(gradient * given[i] * (given[i].abs() <= edge))[0].sum(dim=-1).double()
                    if number == 0:
                        first[i, k] += float(change.sum().detach())
                    else:
                        second[i, k] += float(change.square().sum().detach()) / 4
        for handle in handles:
            handle.remove()
    for i, (layer, path) in enumerate(keys):
        assert found[f"first_order:{path}", layer] == pytest.approx(first[i], rel=1e-3, abs=1e-6)
        assert found[f"second_order:{path}", layer] == pytest.approx(second[i], rel=1e-3)


def test_greedy_takes_the_step_that_changes_the_block_least(model: LanguageModel) -> None:
    shard = random_shard(rows=2)
    names = ("self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")
    thresholds = {"self_attn.o_proj": (0.1, 0.3), "mlp.gate_proj": (0.3, 0.8), "mlp.down_proj": (0.2, 0.6)}
    measure = GreedyBlock(layer=1, shards=(shard,), thresholds=thresholds, steps=dict.fromkeys(names, 0.4),
                          sizes=dict.fromkeys(names, 1))  # fmt: skip
    found = {row.metric: row.samples for row in measure(model)}
    batch = next(iter(shard.batches(2)))
    ids = torch.from_numpy(batch.input_ids).long()

    def output(cuts: dict[str, float]) -> torch.Tensor:
        kept: list[torch.Tensor] = []
        layer = model.layers[1].module
        handles = [
            layer.register_forward_hook(
                lambda _m, _a, out: kept.append(out if isinstance(out, torch.Tensor) else out[0])
            )
        ]
        for name, edge in cuts.items():
            hook = lambda _m, args, edge=edge: (args[0].where(args[0].abs() > edge, 0.0),)  # noqa: E731
            handles.append(layer.get_submodule(name).register_forward_pre_hook(hook))
        with torch.no_grad():
            model.module(input_ids=ids)
        for handle in handles:
            handle.remove()
        return kept[0][:, 18:].double()

    taken = dict.fromkeys(names, 0)
    dense = output({})
    for round_ in range(1, len(found["greedy_error"])):
        errors = {}
        for name in names:
            if taken[name] < 2:
                trial = taken | {name: taken[name] + 1}
                cuts = {one: thresholds[one][n - 1] for one, n in trial.items() if n}
                errors[name] = float((output(cuts) - dense).norm())
        best = min(errors, key=lambda name: errors[name])
        taken[best] += 1
        assert found["greedy_error"][round_] == pytest.approx(errors[best], rel=1e-4)
        assert {name: found[f"greedy:{name}"][round_] for name in names} == pytest.approx(
            {name: 0.4 * n for name, n in taken.items()}
        )
    assert sum(taken.values()) == 6  # 0.8 of all, and no step more below 1


def test_spectra_are_those_of_the_weights(model: LanguageModel) -> None:
    found = {row.metric: row.samples[0] for row in Spectra(1)(model)}
    weight = model.layers[1].module.mlp.up_proj.weight.detach().double().numpy()
    eigenvalues = np.linalg.eigvalsh(weight.T @ weight)
    assert found["hill:mlp.up_proj"] == pytest.approx(hill_exponent(eigenvalues), rel=1e-6)


@pytest.mark.parametrize("n", [2, 3, 12, 13])
def test_hills_estimate_is_of_the_larger_half_of_what_is_positive(n: int) -> None:
    values = np.random.default_rng(n).pareto(1.5, n) + 1
    tail = sorted(values)[-max(2, n // 2) :]
    expected = pytest.approx(1 + len(tail) / sum(math.log(x / tail[0]) for x in tail), rel=1e-12)
    assert hill_exponent(values) == hill_exponent([*values, *[0.0] * n, -1.0]) == expected
    assert hill_exponent([3.0] * n) == math.inf


@pytest.fixture(scope="module")
def scored(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    warehouse = tmp_path_factory.mktemp("scored")
    score(tiny_llama, corpus=TEXT, warehouse=warehouse, sites=("inputs",), dtype="bfloat16", **SMALL)
    return warehouse


@pytest.mark.parametrize("method", ["loss", "teal", "acttail"])
def test_every_method_meets_the_budget(scored: Path, tmp_path: Path, method: str) -> None:
    out = tmp_path / "sparse.yaml"
    options = {**SMALL, "warehouse": scored, "method": method}
    succeed("sparsify", 0.6, *as_words(options), "-o", out)
    made = read_checked_plan(SparsityPlan, out)
    assert made.sparsity == pytest.approx(0.6, abs=0.03)
    assert len({round(one.sparsity, 3) for one in made.projections}) > 3
    assert made.why["by"] == method and str(made.why["evaluation"]).startswith("tiny-llama-")
    times = cell_times(scored)
    assert sparsify(0.3, **options).sparsity == pytest.approx(0.3, abs=0.03)
    assert cell_times(scored) == times  # another target measures nothing


@pytest.mark.parametrize("method", ["loss", *nightly("teal", "acttail")])
def test_streaming_makes_the_same_plan(scored: Path, method: str) -> None:
    options = {**SMALL, "warehouse": scored, "method": method, "fresh": True}
    plans = [sparsify(0.6, partition=partition, **options) for partition in ("single", "streaming")]
    assert plans[0] == plans[1]


def test_a_partition_without_whole_weights_is_refused(scored: Path) -> None:
    with pytest.raises(ConfigError, match="`partition` zero3 has a part of each weight, and loss needs it whole"):
        sparsify(0.5, warehouse=scored, method="loss", partition="zero3", executor="ray")
