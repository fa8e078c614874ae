"""Contrasts of labels: a planted layer is named, and each control takes away what it should."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.command_line import avss
from support.warehouses import run_row

from avss_dist.analysis.contrast import contrast
from avss_dist.core.errors import QueryError
from avss_dist.core.names import AFTER_ANOTHER
from avss_dist.stats.layer_stats import AnswerRows, RowStats, ShardResult
from avss_dist.warehouse.reader import Warehouse
from avss_dist.warehouse.schema import RunIdentity
from avss_dist.warehouse.store import Store

PAIRS, LAYERS, PLANTED, GRID = 60, 6, 3, [1e-5, 1e-2]
STRATA = ("truthful", "incorrect", f"truthful{AFTER_ANOTHER}", f"incorrect{AFTER_ANOTHER}")


def write(root: Path, *, planted: float, elsewhere: float = 1.0, longer: int = 0, seed: int = 2) -> dict[str, Any]:
    """A run whose incorrect answers have ``planted`` times the variance in one layer, and are ``longer``.

    After another prompt it is ``elsewhere`` times. The variance of an answer goes with its length.
    """
    rng = np.random.default_rng(seed)
    n = 4 * PAIRS
    strata = STRATA * PAIRS
    tokens = np.repeat(rng.integers(10, 20, PAIRS), 4)
    tokens = tokens + longer * np.array([s.startswith("incorrect") for s in strata])
    stats = {}
    for layer in range(LAYERS):
        factor = {"incorrect": planted, STRATA[3]: elsewhere} if layer == PLANTED else {}
        own = np.array([factor.get(s, 1.0) for s in strata])
        variance = own * np.exp(0.2 * rng.normal(size=n)) * (layer + 1) * (tokens / 10 if layer == 1 else 1)
        count = tokens * 8
        near_zero = np.stack([np.zeros(n, np.int64), rng.binomial(count, 0.2)], axis=1)
        stats[layer, "block"] = RowStats(
            count=count,
            near_zero=near_zero,
            mean=np.zeros(n),
            m2=variance * count,
            pooled_variance=variance,
            norm=np.sqrt(variance * 8),
            relative_magnitude=np.ones(n),
        )
    rows = AnswerRows(
        row=np.arange(n),
        pair=np.repeat(np.arange(PAIRS), 4),
        strata=strata,
        prompt_tokens=np.full(n, 9),
        answer_tokens=tokens,
        stats=stats,
    )
    row = run_row("paired", num_layers=LAYERS, num_sequences=n, num_shards=1, thresholds=GRID, sites=["block"])
    identity = RunIdentity(**{name: row[name] for name in ("run_id", "model", "revision", "family")})
    store = Store(root)
    store.write_shard(identity, ShardResult(shard_id=0, content_hash="", layers=("a",) * LAYERS, stats={}, rows=rows))
    store.write_run(row)
    return row


def left(root: Path, row: dict[str, Any], **options: Any) -> list[int]:
    found = contrast(Warehouse(root), row, threshold=1e-2, **options)
    return [one["layer"] for one in found.layers.to_pylist() if one["stands"]]


def test_a_planted_layer_is_named(tmp_path: Path) -> None:
    row = write(tmp_path, planted=1.5)
    found = contrast(Warehouse(tmp_path), row, threshold=1e-2)
    layers = found.layers.to_pylist()
    assert [one["layer"] for one in layers if one["stands"]] == [PLANTED]
    planted = layers[PLANTED]
    assert (planted["rank"], planted["prone_probability"] > 0.99) == (1, True)
    assert planted["eavss_contrast_low"] < planted["eavss_contrast"] < planted["eavss_contrast_high"]
    assert planted["deviation"] == pytest.approx(np.log(1.5), abs=0.1)
    assert found.reading["hallucinated"] == "incorrect"
    assert f"Left after every control: {PLANTED}." in found.findings
    best = max(found.predictions.to_pylist(), key=lambda one: one["auroc"])
    assert best["layer"] == PLANTED and best["beats_baselines"] and best["auroc"] > 0.8 > 0.6 > best["after_another"]
    assert left(tmp_path, row, hallucinated="truthful", truthful="incorrect") == [PLANTED]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"planted": 1.5, "elsewhere": 1.5}, "Otherwise than for the same answers after another prompt: none."),
        ({"planted": 1.0, "longer": 8}, "With lengths matched (0 pairs): too few pairs to tell."),
        (
            {"planted": 1.0, "seed": 1},
            "No layer differs between hallucinated and truthful answers more than with labels exchanged inside pairs.",
        ),
    ],
)
def test_controls_take_away_what_they_should(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    row = write(tmp_path, **changes)
    found = contrast(Warehouse(tmp_path), row, threshold=1e-2)
    assert words in found.findings
    assert "Left after every control: none." in found.findings


def test_mistakes(tmp_path: Path) -> None:
    row = write(tmp_path, planted=1.0)
    for options, message in (
        ({"threshold": 0.5}, "did not count elements below 0.5"),
        ({"site": "mlp"}, "mlp"),
        ({"truthful": "right"}, "right"),
        ({"hallucinated": "truthful", "truthful": "truthful"}, "Labels: incorrect, truthful."),
    ):
        with pytest.raises(QueryError, match=message):
            contrast(Warehouse(tmp_path), row, **options)


def test_the_command_shows_layers_predictions_and_findings(tmp_path: Path) -> None:
    write(tmp_path, planted=1.5)
    shown = avss("contrast", "-w", tmp_path, "--threshold", "1e-2")
    assert shown.exit_code == 0
    assert "Left after every control: 3." in shown.stdout and "AUROC" in shown.stdout
    lines = avss("contrast", "-w", tmp_path, "--threshold", "1e-2", "--format", "json").stdout.splitlines()
    assert [json.loads(line)["stands"] for line in lines] == [layer == PLANTED for layer in range(LAYERS)]
