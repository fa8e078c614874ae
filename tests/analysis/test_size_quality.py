"""Quality by size: sizes of plans of layers, sparse activations and rounded weights, against sums written out."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from math import exp
from pathlib import Path
from typing import Any

import pytest

from avss_dist.analysis.size_quality import SizedPlan, size_quality
from avss_dist.warehouse.reader import Warehouse
from avss_dist.warehouse.schema import RunIdentity
from avss_dist.warehouse.store import Store

pytestmark = pytest.mark.nightly

ABOUT = {"model": "org/a", "revision": "r", "family": "llama"}
NOW = datetime(2026, 1, 1, tzinfo=UTC)
RUN = {**ABOUT, "run_id": "a-0", "num_layers": 4, "projections": None, "status": "done", "created_at": NOW}
WEIGHTS = {"attn": 100, "mlp": 300}  # of each of the four layers
FORMATS = {"attn": 8.0, "mlp": 4.0}


def loss(value: float, **changes: Any) -> dict[str, Any]:
    """A row of ``evaluations`` without the columns of the checkpoint."""
    common = {"task": "perplexity:t.txt", "metric": "loss", "drop": [], "settings": "{}", "created_at": NOW}
    return {**common, "stderr": 0.0, "num_samples": 9, "value": value, **changes}


def written(folder: Path, rows: Sequence[dict[str, Any]]) -> Store:
    """A warehouse with a run, and an evaluation of its checkpoint."""
    store = Store(folder)
    store.write_run(RUN)
    store.write_evaluations(RunIdentity(run_id="a-1", **ABOUT), rows)
    return store


def kept_by_size(tmp_path: Path, *rows: dict[str, Any], maps: bool = True) -> dict[str, SizedPlan]:
    """The plans of the only text, by description. ``maps`` writes a plan of formats and one of zeros."""
    store = written(tmp_path / "w", rows)
    places = [(layer, path) for layer in range(4) for path in WEIGHTS] if maps else []
    rounded = [
        {
            "rounding": "bits",
            "method": "predicted",
            "layer": layer,
            "map": path,
            "format": "int8",
            "num_weights": WEIGHTS[path],
            "bits_per_weight": FORMATS[path],
        }
        for layer, path in places
    ]
    plan = {"method": "teal", "target": 0.5, "rule": "all", "site": "neuron", "by": "threshold", "value": 0.1}
    shape = {"sparsity": 0.5, "outputs": 10, "created_at": NOW, "sparsity_plan": "zeros"}
    zeros = [
        {**plan, **shape, "layer": layer, "map": path, "inputs": WEIGHTS[path] // 10}
        for layer, path in places
        if path == "mlp"
    ]
    if maps:
        store.write_precision(RunIdentity(run_id="a-1", **ABOUT), "0" * 20, rounded)
        store.write_sparsity(RunIdentity(run_id="a-0", **ABOUT), "1" * 20, zeros)
    (result,) = size_quality(Warehouse(tmp_path / "w"), RUN)
    assert result.has_sizes == maps
    assert [plan.size for plan in result.plans] == sorted(plan.size for plan in result.plans)
    return {plan.description: plan for plan in result.plans}


def test_sizes_of_every_kind_of_plan_and_of_several_at_once(tmp_path: Path) -> None:
    plans = kept_by_size(
        tmp_path,
        loss(2.0),
        loss(2.2, drop=[1]),
        loss(2.1, drop=[1], patch="p"),
        loss(2.05, rounding="bits"),
        loss(2.3, sparsity_plan="zeros"),
        loss(2.4, rounding="bits", sparsity_plan="zeros"),
        loss(2.5, rounding="bits", drop=[0, 3]),
    )
    mean = (100 * 8 + 300 * 4) / 400
    assert {name: (plan.kind, plan.size) for name, plan in plans.items()} == {
        "1 layer dropped": ("layers", 0.75),
        "1 layer dropped, repaired": ("layers", 0.75),
        "5.00 bits by predicted": ("bits", mean / 16),
        "50% zeros by teal": ("sparsity", (100 + 150) / 400),
        "50% zeros by teal, 5.00 bits by predicted": ("sparsity + bits", (100 * 8 + 150 * 4) / 6400),
        "2 layers dropped, 5.00 bits by predicted": ("layers + bits", mean / 32),
    }
    assert plans["1 layer dropped"].retention == pytest.approx(exp(-0.2))
    assert plans["5.00 bits by predicted"].perplexity == pytest.approx(exp(2.05))
    assert {name for name, plan in plans.items() if plan.is_best} == {
        "2 layers dropped, 5.00 bits by predicted",
        "50% zeros by teal, 5.00 bits by predicted",
        "5.00 bits by predicted",
    }


def test_plans_whose_size_is_not_known_are_left_out(tmp_path: Path) -> None:
    plans = kept_by_size(
        tmp_path,
        loss(2.0),
        loss(2.1, drop=[1]),
        loss(2.2, drop=[2, 3]),
        loss(2.3, drop=[10001]),
        loss(2.3, drop=[1000000]),
        loss(2.3, drop=[1], factor=0.5),
        loss(2.3, rounding="of another warehouse"),
        loss(2.3, sparsity_plan="of another warehouse"),
    )
    assert {*plans} == {"1 layer dropped", "2 layers dropped"}


def test_without_sizes_of_maps_every_layer_counts_the_same(tmp_path: Path) -> None:
    plans = kept_by_size(tmp_path, loss(2.0), loss(2.1, drop=[1]), loss(2.2, drop=[2, 3]), maps=False)
    assert [plan.size for plan in plans.values()] == [0.5, 0.75]


def test_a_plan_that_is_hardly_smaller_and_keeps_less_is_not_one_of_the_best(tmp_path: Path) -> None:
    """Formats of plans fill a budget nearly: 4.249 bits and 4.25 bits are the same size."""
    store = written(tmp_path / "w", [loss(2.0), *(loss(2.0 + i / 10, rounding=f"bits {i}") for i in (1, 2, 3))])
    for number, bits in ((1, 4.25), (2, 4.249), (3, 4.0)):
        row = {"rounding": f"bits {number}", "layer": 0, "map": "mlp", "format": "int4", "num_weights": 1}
        store.write_precision(RunIdentity(run_id="a-1", **ABOUT), f"{number}" * 20, [{**row, "bits_per_weight": bits}])
    (result,) = size_quality(Warehouse(tmp_path / "w"), RUN)
    assert [(plan.size, plan.is_best) for plan in result.plans] == [
        (4.0 / 16, True),
        (4.249 / 16, False),
        (4.25 / 16, True),
    ]


@pytest.mark.parametrize(
    ("name", "rows"),
    [
        ("no whole model on this text", [loss(2.0, settings='{"text": 1}'), loss(2.1, drop=[1]), loss(2.2, drop=[2])]),
        ("one plan", [loss(2.0), loss(2.1, drop=[1])]),
        ("another task", [loss(2.0 + i, drop=[i] * (i > 0), task="ablation:t.txt") for i in range(3)]),
    ],
)
def test_there_is_nothing_to_compare(name: str, rows: list[dict[str, Any]], tmp_path: Path) -> None:
    written(tmp_path / "w", rows)
    assert size_quality(Warehouse(tmp_path / "w"), RUN) == []


def test_the_share_of_all_parameters_counts_those_that_plans_leave(tmp_path: Path) -> None:
    """Four layers of 400 weights, and 1,200 parameters of embeddings and norms."""
    plans = kept_by_size(tmp_path, loss(2.0), loss(2.1, drop=[1]), loss(2.05, rounding="bits"))
    assert {plan.share_of_model for plan in plans.values()} == {None}
    rows = size_quality(Warehouse(tmp_path / "w"), RUN | {"num_parameters": 2800})[0].plans
    shares = {plan.description: plan.share_of_model for plan in rows}
    assert shares["1 layer dropped"] == pytest.approx(2400 / 2800)
    assert shares["5.00 bits by predicted"] == pytest.approx((1200 * 16 + 1600 * 5) / (2800 * 16))
