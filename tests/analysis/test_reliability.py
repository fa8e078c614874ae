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
    cells = Store(root).cells
    for drop, parts in losses.items():
        for part in reversed(range(len(parts))):
            row = {
                "task": task,
                "metric": metric,
                "drop": list(drop),
                "drop_parts": [],
                "part": part,
                "samples": list(parts[part]),
                "weights": [1.0] * len(parts[part]),
            }
            content = repr((99 - part, drop, task, metric)).encode()
            cells.write(identity, sha256(content).hexdigest()[:20], [row])


def read(root: Path, *layers: int) -> np.ndarray:
    values = dict.fromkeys(reversed(layers), 1.0)
    return increases(Warehouse(root), LayerValues(values=values, run_id="e", task=TASK))


LOSSES: Losses = {(): [[1.0, 2.0], [3.0]], (0,): [[1.5, 2.0], [3.25]], (1,): [[2.0, 3.0], [4.5]]}
OTHER_LOSSES: Losses = {layers: [[9.0, 9.0], [9.0]] for layers in LOSSES}
WITHOUT_LAYERS: Losses = {(0,): LOSSES[0,], (1,): LOSSES[1,]}


def test_increases_are_those_of_each_sequence_in_the_order_of_the_text(tmp_path: Path) -> None:
    written(tmp_path, LOSSES)
    written(tmp_path, OTHER_LOSSES, run_id="f")
    written(tmp_path, OTHER_LOSSES, task=TASK + "2")
    written(tmp_path, OTHER_LOSSES, metric="chance")
    assert read(tmp_path, 0, 1).tolist() == [[0.5, 1.0], [0.0, 1.0], [0.25, 1.5]]


def test_increases_need_an_evaluation_of_their_own(tmp_path: Path) -> None:
    written(tmp_path, {(): [[1.0]]}, run_id="f")
    assert read(tmp_path, 0).shape == (0, 1)


@pytest.mark.parametrize(
    ("losses", "layers"),
    [
        pytest.param(LOSSES, [0], id="a layer that is not asked for"),
        pytest.param(LOSSES, [0, 1, 2], id="a layer that is missing"),
        pytest.param(WITHOUT_LAYERS, [0, 1], id="no whole model"),
        pytest.param({**LOSSES, (0, 1): LOSSES[0,]}, [0, 1], id="a set of layers"),
        pytest.param({**LOSSES, (1,): [[2.0, 3.0]]}, [0, 1], id="a shorter text"),
    ],
)
def test_increases_need_the_cells_of_every_layer_on_the_same_text(
    tmp_path: Path, losses: Losses, layers: list[int]
) -> None:
    """Those of layers that are not asked for, or of sets, are of another evaluation."""
    written(tmp_path, losses)
    assert read(tmp_path, *layers).shape == (0, len(layers))


@pytest.mark.parametrize("noise", [0.5, 2.0])
def test_reliability_is_what_a_second_measurement_would_agree_by(noise: float) -> None:
    """Layers of known damage, measured on sequences that differ: many second measurements of the same size."""
    rng = np.random.default_rng(1)
    damage = rng.normal(size=30)
    measured = damage + noise * rng.normal(size=(400, 16, 30))
    stepped_up = [reliability(samples) for samples in measured[:40]]
    sums = measured.sum(axis=1)
    again = []
    for i in range(0, len(sums), 2):
        again.append(spearman(sums[i], sums[i + 1]))
    assert np.mean(stepped_up) == pytest.approx(np.mean(again), abs=0.03)
    assert reliability(measured[0]) == reliability(measured[0])


def test_few_sequences_have_no_reliability() -> None:
    rng = np.random.default_rng(0)
    few = np.arange(8.0) + 0.1 * rng.normal(size=(3, 8))
    assert np.isnan(reliability(few))
    assert np.isnan(reliability(few[:0]))


def halves_agree_by(first: np.ndarray, second: np.ndarray) -> float:
    """Return the rank correlation of the sums of two halves, by another program."""
    return stats.spearmanr(first.sum(axis=0), second.sum(axis=0)).statistic


@pytest.mark.parametrize("sequences", [4, 5, 9])
def test_reliability_is_the_mean_over_halves_stepped_up(sequences: int) -> None:
    """Of an odd number, the first half has one sequence less."""
    noise = np.random.default_rng(3).normal(size=(sequences, 6))
    samples = 0.3 * np.arange(6.0) + noise
    rng = np.random.default_rng(0)
    correlations = []
    for _ in range(200):
        order = rng.permutation(sequences)
        first, second = np.split(samples[order], [sequences // 2])
        correlations.append(halves_agree_by(first, second))
    agreement = np.mean(correlations)
    expected = 2 * agreement / (1 + agreement)
    assert 0.5 < expected < 0.99
    assert reliability(samples) == pytest.approx(expected, rel=1e-12)


def test_halves_that_contradict_each_other_have_no_reliability() -> None:
    up = np.arange(6.0)
    samples = np.array([4 * up, -up, -up, -2 * up])
    assert np.isnan(reliability(samples))


def test_halves_without_any_correlation_have_no_reliability() -> None:
    """The correlation of x and x + y is 0, in every split."""
    x = [1.0, 2.0, 3.0, 4.0]
    y = [1.0, 2.0, -2.0, -1.0]
    samples = np.array([x, x, x, y])
    assert np.isnan(reliability(samples))


TRUTH = np.array([1.0, 2.0, 3.0, 4.0, np.nan])


@pytest.mark.parametrize(
    ("scores", "wrong"),
    [
        pytest.param([1.0, 2.0, 3.0, 4.0, 0.0], 0, id="same order"),
        pytest.param([4.0, 3.0, 2.0, 1.0, 0.0], 1, id="reverse order"),
        pytest.param([2.0, 1.0, 3.0, 4.0, 0.0], 1 / 6, id="one pair of six"),
        pytest.param([1.0, 1.0, 3.0, 4.0, 0.0], 0, id="a tie orders nothing"),
        pytest.param([2.0, 1.0, np.nan, 4.0, 0.0], 1 / 3, id="one of three pairs of numbers"),
        pytest.param([2.0, 1.0, 3.0, np.inf, 0.0], 1 / 3, id="one of three finite pairs"),
    ],
)
def test_pairs_in_the_wrong_order_are_counted(scores: list[float], wrong: float) -> None:
    assert misranked(np.array(scores), TRUTH) == pytest.approx(wrong, abs=0)


def test_scores_that_are_all_equal_order_nothing() -> None:
    assert misranked(np.array([1.0, 1.0, 1.0, 1.0, 0.0]), TRUTH) is None
