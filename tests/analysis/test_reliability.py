"""How far a measurement can be trusted: against second measurements, and counts by hand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from avss_dist.analysis.scorecard import increases, misranked, reliability
from avss_dist.plans.criteria import LayerValues
from avss_dist.stats.rankings import spearman
from avss_dist.warehouse.reader import Warehouse
from avss_dist.warehouse.schema import RunIdentity
from avss_dist.warehouse.store import Store

TASK = "perplexity:text.txt"
Losses = Mapping[tuple[int, ...], Sequence[Sequence[float]]]


def written(root: Path, losses: Losses, *, run_id: str = "e", task: str = TASK, metric: str = "loss") -> None:
    """Cells of an evaluation: the losses of the sequences of each part, by layers left out, the last part first."""
    identity = RunIdentity(run_id=run_id, model="m", revision="main", family="llama")
    for drop, parts in losses.items():
        for part, samples in reversed([*enumerate(parts)]):
            row = {
                "task": task,
                "metric": metric,
                "drop": list(drop),
                "drop_parts": [],
                "part": part,
                "samples": list(samples),
            }
            cell = sha256(repr((99 - part, drop, task, metric)).encode()).hexdigest()[:20]
            Store(root).cells.write(identity, cell, [{**row, "weights": [1.0] * len(samples)}])


def read(root: Path, *layers: int) -> np.ndarray:
    truth = LayerValues(values=dict.fromkeys(reversed(layers), 1.0), run_id="e", task=TASK)
    return increases(Warehouse(root), truth)


LOSSES: Losses = {(): [[1.0, 2.0], [3.0]], (0,): [[1.5, 2.0], [3.25]], (1,): [[2.0, 3.0], [4.5]]}


def test_increases_are_those_of_each_sequence_in_the_order_of_the_text(tmp_path: Path) -> None:
    written(tmp_path, LOSSES)
    other = {drop: [[9.0] * len(part) for part in parts] for drop, parts in LOSSES.items()}
    written(tmp_path, other, run_id="f")
    written(tmp_path, other, task=TASK + "2")
    written(tmp_path, other, metric="chance")
    assert read(tmp_path, 0, 1).tolist() == [[0.5, 1.0], [0.0, 1.0], [0.25, 1.5]]


def test_increases_need_the_cells_of_every_layer_on_the_same_text(tmp_path: Path) -> None:
    """Those of layers that are not asked for, or of sets, are of another evaluation."""
    written(tmp_path / "nothing", {(): [[1.0]]}, run_id="f")
    written(tmp_path / "all", LOSSES)
    written(tmp_path / "whole", {drop: parts for drop, parts in LOSSES.items() if drop})
    written(tmp_path / "sets", {**LOSSES, (0, 1): LOSSES[0,]})
    written(tmp_path / "shorter", {**LOSSES, (1,): [[2.0, 3.0]]})
    for name, layers in (("nothing", [0]), ("all", [0]), ("all", [0, 1, 2]), ("whole", [0, 1]), ("sets", [0, 1])):
        assert read(tmp_path / name, *layers).shape == (0, len(layers)), name
    assert read(tmp_path / "shorter", 0, 1).shape == (0, 2)


@pytest.mark.parametrize("noise", [0.5, 2.0])
def test_reliability_is_what_a_second_measurement_would_agree_by(noise: float) -> None:
    """Layers of known damage, measured on sequences that differ: many second measurements of the same size."""
    rng = np.random.default_rng(1)
    damage = rng.normal(size=30)
    measured = damage + noise * rng.normal(size=(400, 16, 30))
    stepped_up = [reliability(samples) for samples in measured[:40]]
    sums = measured.sum(axis=1)
    again = [spearman(a, b) for a, b in zip(sums[0::2], sums[1::2], strict=True)]
    assert np.mean(stepped_up) == pytest.approx(np.mean(again), abs=0.03)
    assert reliability(measured[0]) == reliability(measured[0])


def test_few_sequences_have_no_reliability() -> None:
    few = np.arange(8.0) + 0.1 * np.random.default_rng(0).normal(size=(3, 8))
    assert np.isnan(reliability(few))
    assert np.isnan(reliability(few[:0]))


@pytest.mark.parametrize("sequences", [4, 5, 9])
def test_reliability_is_the_mean_over_halves_stepped_up(sequences: int) -> None:
    """Of an odd number, the first half has one sequence less."""
    samples = 0.3 * np.arange(6.0) + np.random.default_rng(3).normal(size=(sequences, 6))
    rng = np.random.default_rng(0)
    found = []
    for _ in range(200):
        order = rng.permutation(sequences)
        first, second = np.split(samples[order], [sequences // 2])
        found.append(stats.spearmanr(first.sum(axis=0), second.sum(axis=0)).statistic)
    expected = 2 * np.mean(found) / (1 + np.mean(found))
    assert 0.5 < expected < 0.99
    assert reliability(samples) == pytest.approx(expected, rel=1e-12)


def test_halves_that_contradict_each_other_have_no_reliability() -> None:
    up = np.arange(6.0)
    assert np.isnan(reliability(np.array([4 * up, -up, -up, -2 * up])))
    x = np.array([1.0, 2.0, 3.0, 4.0])
    y = np.array([1.0, 2.0, -2.0, -1.0])
    assert np.isnan(reliability(np.array([x, x, x, y]))), "the correlation of x and x + y is 0, in every split"


def test_pairs_in_the_wrong_order_are_counted() -> None:
    truth = np.array([1.0, 2.0, 3.0, 4.0, np.nan])
    assert misranked(np.array([1.0, 2.0, 3.0, 4.0, 0.0]), truth) == 0
    assert misranked(np.array([4.0, 3.0, 2.0, 1.0, 0.0]), truth) == 1
    assert misranked(np.array([2.0, 1.0, 3.0, 4.0, 0.0]), truth) == pytest.approx(1 / 6)
    assert misranked(np.array([1.0, 1.0, 3.0, 4.0, 0.0]), truth) == 0  # a tie orders nothing
    assert misranked(np.array([1.0, 1.0, 1.0, 1.0, 0.0]), truth) is None
    assert misranked(np.array([2.0, 1.0, np.nan, 4.0, 0.0]), truth) == pytest.approx(1 / 3)
    assert misranked(np.array([2.0, 1.0, 3.0, np.inf, 0.0]), truth) == pytest.approx(1 / 3)
