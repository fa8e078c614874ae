"""Maps of the similarity of rankings: alike ones stand beside each other, and a cell is a mean."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from support.command_line import avss
from support.warehouses import write_scores

from avss_dist.analysis import groups
from avss_dist.analysis.agreement import RankMatrix
from avss_dist.analysis.groups import similarity_map


def draw(number: int, seed: int = 0) -> tuple[RankMatrix, list[str]]:
    """Scores of three families of different depth, in turn, alike within a family."""
    rng = np.random.default_rng(seed)
    shapes = [rng.normal(0, 1, size) for size in (16, 20, 24)]
    scores = []
    for index in range(number):
        shape = shapes[index % 3]
        scores.append(((np.arange(len(shape)) + 0.5) / len(shape), shape + rng.normal(0, 0.2, len(shape))))
    return RankMatrix(scores), [f"{'abc'[index % 3]}-{index}" for index in range(number)]


def test_alike_rankings_stand_beside_each_other() -> None:
    matrix, labels = draw(30)
    shown = similarity_map(matrix, labels, [label[0] for label in labels])
    assert "".join(shown.groups).count("a" * 10) == "".join(shown.groups).count("b" * 10) == 1
    assert [label[0] for label in shown.labels] == list(shown.groups)
    order = [labels.index(label) for label in shown.labels]
    expected, _ = matrix.correlations(np.array(order), np.array(order))
    np.testing.assert_array_equal(shown.rho, expected)


def test_of_many_rankings_a_cell_is_the_mean_of_its_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix, labels = draw(30)
    every = similarity_map(matrix, labels, labels)
    monkeypatch.setattr(groups, "CELLS", 10)
    few = similarity_map(matrix, labels, labels)
    np.testing.assert_allclose(few.rho, every.rho.reshape(10, 3, 10, 3).mean(axis=(1, 3)))
    assert (few.scores, few.left_out, few.labels[0]) == (30, 0, f"{every.labels[0]} and 2 more")


def test_the_oldest_are_left_out_of_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(groups, "MAX_SCORES", 12)
    matrix, labels = draw(30)
    shown = similarity_map(matrix, labels, labels)
    assert (shown.scores, shown.left_out) == (12, 18)
    assert set(shown.labels) == set(labels[18:])


@pytest.mark.parametrize("number", [1, 2])
def test_one_or_two_rankings_need_no_order(number: int) -> None:
    matrix, labels = draw(number)
    assert similarity_map(matrix, labels, labels).labels == tuple(labels)


def test_a_constant_ranking_is_like_none() -> None:
    rising = np.arange(8.0)
    scores = [(rising, np.ones(8)), (rising, rising), (rising, rising + 1)]
    shown = similarity_map(RankMatrix(scores), ["constant", "up", "also up"], ["x"] * 3)
    assert np.isnan(shown.rho[shown.labels.index("constant")]).all()
    assert abs(shown.labels.index("up") - shown.labels.index("also up")) == 1


def test_the_command_draws_the_map(tmp_path: Path) -> None:
    for index in range(4):
        write_scores(tmp_path, f"run-{index}", [float(index % 2 * 7 - layer) ** 2 for layer in range(8)])
    picture = tmp_path / "map.svg"
    result = avss("compare", "-w", tmp_path, "-o", picture)
    assert result.exit_code == 0 and result.stderr.startswith(f"Map of all pairs: {picture}\n")
    drawn = picture.read_text()
    assert "Agreement of layer rankings" in drawn and "run-3" in drawn
    refused = avss("compare", "-w", tmp_path, "--by", "score", "-o", picture)
    assert refused.exit_code == 2 and "A map shows runs" in refused.stderr
