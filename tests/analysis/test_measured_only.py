"""Plans for checkpoints that `avss ablate` measured and `avss score` did not score."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from support.checkpoints import llama

import avss_dist
from avss_dist.core.errors import QueryError
from avss_dist.models.checkpoints import resolve
from avss_dist.models.number_formats import FORMATS
from avss_dist.warehouse.schema import RunIdentity
from avss_dist.warehouse.store import Store

NOW = datetime(2026, 1, 1, tzinfo=UTC)
COMMON = {"settings": '{"dtype": "float32"}', "created_at": NOW, "stderr": 0.0, "num_samples": 8}


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory, save_checkpoint: Callable[[Any, Path], Path]) -> Path:
    """A warehouse of a model of four layers: the loss without each, then predictions for rounded weights."""
    folder = save_checkpoint(llama(num_hidden_layers=4), tmp_path_factory.mktemp("models") / "tiny")
    root = tmp_path_factory.mktemp("measured") / "w"
    store, about = Store(root), {"model": str(folder), "revision": resolve(str(folder)).revision, "family": "llama"}
    losses: list[dict[str, Any]] = [{"drop": [], "value": 2.0}]
    losses += [{"drop": [layer], "value": 2.5 - layer / 10} for layer in range(4)]
    loss = {"task": "ablation:t.txt", "metric": "loss", **COMMON}
    store.write_evaluations(RunIdentity(run_id="tiny-1", **about), [loss | row for row in losses])
    rows = []
    for layer in range(4):
        for name, damage in (("int8", 0.01), ("bf16", 0.0)):
            values = {"second_order": damage, "bits_per_weight": FORMATS[name].bits(16, 32), "num_weights": 512.0}
            place = {"drop": [], "rounding": f"{name}@{layer}.mlp.up_proj"}
            rows += [{"metric": metric, "value": value} | place for metric, value in values.items()]
    later = {"task": "rounding:t.txt", **COMMON, "created_at": NOW + timedelta(hours=1)}
    store.write_evaluations(RunIdentity(run_id="tiny-2", **about), [later | row for row in rows])
    for run_id in ("tiny-1", "tiny-2"):
        (root / "cells" / f"run_id={run_id}").mkdir(parents=True)
    return root


def test_layers_are_chosen_by_what_was_measured(measured: Path) -> None:
    plan = avss_dist.plan(warehouse=measured)
    assert plan.drop == (3,) and plan.num_layers == 4 and plan.layers == "layers"
    assert plan.run_id is None and plan.why["evaluation"] == "tiny-1"
    assert avss_dist.plan(warehouse=measured, run="tiny", by="loss", count=2).drop == (2, 3)


def test_formats_are_chosen_by_what_was_predicted(measured: Path) -> None:
    plan = avss_dist.quantize(warehouse=measured, bits=12.5)
    assert (plan.num_layers, plan.run_id, plan.evaluation) == (4, None, "tiny-2")
    assert [entry.format for entry in plan.rounded].count("bf16") == 2


def test_a_score_of_activations_is_still_needed_for_itself(measured: Path) -> None:
    with pytest.raises(QueryError, match="was not scored"):
        avss_dist.plan(warehouse=measured, by="block_influence")
    with pytest.raises(QueryError, match="has no finished run"):
        avss_dist.compare(warehouse=measured)
