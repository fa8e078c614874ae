"""Correlations of all pairs by matrix products, the agreement of groups against a plain loop, and maps of many."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.command_line import avss
from support.warehouses import write_scores

from avss_dist.analysis import groups
from avss_dist.analysis.agreement import RankMatrix, Scores, rank_correlations
from avss_dist.analysis.comparison import RankingComparison, compare, size_label
from avss_dist.analysis.groups import similarity_map, survey_pairs
from avss_dist.core.settings import PUBLISHED_THRESHOLD
from avss_dist.stats.scores import Threshold
from avss_dist.warehouse.reader import Warehouse

AT = Threshold(value=PUBLISHED_THRESHOLD, kind="absolute")


def draw_scores(number: int = 40) -> list[Scores]:
    """Scores of models of several depths, with ties, constants, missing layers, NaN and infinities among them."""
    rng = np.random.default_rng(1)
    scores: list[Scores] = []
    for index in range(number):
        size = (12, 12, 24, 30, 2)[index % 5]
        values = rng.integers(0, 40, size).astype(float)
        depth = (np.arange(size) + 0.5) / size
        if index == 3:
            values[4] = np.nan
        if index == 6:
            values[0] = np.inf
        if index == 7:
            depth, values = np.delete(depth, 3), np.delete(values, 3)
        if index == 10:
            values[:] = 1.0
        scores.append((depth, values))
    return scores


def test_products_are_what_pair_by_pair_gives() -> None:
    scores = draw_scores()
    every = np.arange(len(scores))
    rho, partial = RankMatrix(scores).correlations(every, every)
    pairs = np.array([*combinations(range(len(scores)), 2)]).T
    expected = rank_correlations(scores, *pairs)
    np.testing.assert_array_equal(rho[tuple(pairs)], expected[0])
    np.testing.assert_allclose(partial[tuple(pairs)], expected[1], rtol=1e-12)
    np.testing.assert_array_equal(rho, rho.T)


@pytest.mark.parametrize("across_models", [True, False])
def test_groups_are_what_a_loop_over_pairs_gives(across_models: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(groups, "AT_ONCE", 7)
    scores = draw_scores(60)
    strata = [index % 2 if across_models else (index % 2, index // 4) for index in range(60)]
    labels = ["xy"[index % 4 // 2] for index in range(60)]
    models = [str(index // 4) for index in range(60)]
    families = ["xy"[index // 4 % 2] for index in range(60)] if across_models else labels
    members = {"stratum": strata, "value": labels, "model": models, "group": families}
    rho, _ = RankMatrix(scores).correlations(np.arange(60), np.arange(60))
    survey = survey_pairs(RankMatrix(scores), members, by="family", across_models=across_models, most=3)

    def values(first: str, second: str) -> np.ndarray:
        chosen = [
            rho[i, j]
            for i, j in combinations(range(60), 2)
            if strata[i] == strata[j]
            and {families[i], families[j]} == {first, second}
            and (models[i] != models[j]) == across_models
        ]
        return np.array([value for value in chosen if np.isfinite(value)])

    rows = {(row["a"], row["b"]): row for row in survey.groups.to_pylist()}
    assert set(rows) == ({("x", "x"), ("x", "y"), ("y", "y")} if across_models else {("x", "y")})
    for (first, second), row in rows.items():
        every = values(first, second)
        assert (row["pairs"], row["spearman"]) == (len(every), pytest.approx(every.mean()))
    wanted = [rho[i, j] for i, j in combinations(range(60), 2) if strata[i] == strata[j] and labels[i] != labels[j]]
    defined = np.sort([value for value in wanted if np.isfinite(value)])
    assert survey.number == len(wanted)
    summary = survey.spearman
    assert summary.count == len(defined)
    expected = np.median(defined), defined[0], defined[-1]
    assert (summary.median, summary.lowest, summary.highest) == pytest.approx(expected, abs=2e-5)
    extremes = np.sort([rho[i, j] for i, j in survey.extremes.T])
    np.testing.assert_array_equal(extremes, [*defined[:3], *defined[-3:]])


def write_models(root: Path) -> Warehouse:
    """Ten models of two families, alike within a family, and of two sizes."""
    rng = np.random.default_rng(0)
    shape = {"llama": np.arange(12.0), "gemma": 4 * np.sin(np.arange(12.0))}
    for index in range(20):
        family = ("llama", "gemma")[index % 2]
        values = (shape[family] + rng.normal(0, 1, 12) + 20).tolist()
        columns: dict[str, Any] = {"num_parameters": (1, 7)[index // 10] * 10**9}
        write_scores(root, f"run-{index}", values, model=f"org/{family}-{index}", family=family, **columns)
    return Warehouse(root)


def comparison(warehouse: Warehouse, by: str, **options: Any) -> RankingComparison:
    return compare(warehouse, warehouse.runs()["run_id"].to_pylist(), by=by, threshold=AT, **options)


def test_models_of_a_family_agree_more_than_those_of_two(tmp_path: Path) -> None:
    compared = comparison(write_models(tmp_path), "family")
    rows = {(row["a"], row["b"]): row for row in compared.groups.to_pylist()}
    within, between = rows["llama", "llama"], rows.get(("llama", "gemma")) or rows["gemma", "llama"]
    assert within["spearman"] > 0.8 > between["spearman"]
    assert (within["pairs"], between["pairs"]) == (45, 100)
    assert within["given_depth"] < within["spearman"], "depth is most of it"
    assert compared.number == len(compared.pairs) == 100


def test_models_are_grouped_by_size(tmp_path: Path) -> None:
    assert [size_label(n) for n in (10**8, 10**9, 200 * 10**9, None)] == [
        "under 0.5B",
        "0.5B to 1.5B",
        "150B and more",
        "unknown",
    ]
    compared = comparison(write_models(tmp_path), "size")
    assert compared.number == 100
    assert {(row["a"], row["b"]) for row in compared.groups.to_pylist()} == {
        ("0.5B to 1.5B", "0.5B to 1.5B"),
        ("0.5B to 1.5B", "4B to 10B"),
        ("4B to 10B", "4B to 10B"),
    }


# Maps: alike ones stand beside each other, and a cell is a mean.


def draw_families(number: int, seed: int = 0) -> tuple[RankMatrix, list[str]]:
    """Scores of three families of different depth, in turn, alike within a family."""
    rng = np.random.default_rng(seed)
    shapes = [rng.normal(0, 1, size) for size in (16, 20, 24)]
    scores = []
    for index in range(number):
        shape = shapes[index % 3]
        scores.append(((np.arange(len(shape)) + 0.5) / len(shape), shape + rng.normal(0, 0.2, len(shape))))
    return RankMatrix(scores), [f"{'abc'[index % 3]}-{index}" for index in range(number)]


def test_alike_rankings_stand_beside_each_other() -> None:
    matrix, labels = draw_families(30)
    shown = similarity_map(matrix, labels, [label[0] for label in labels])
    assert "".join(shown.groups).count("a" * 10) == "".join(shown.groups).count("b" * 10) == 1
    assert [label[0] for label in shown.labels] == list(shown.groups)
    order = [labels.index(label) for label in shown.labels]
    expected, _ = matrix.correlations(np.array(order), np.array(order))
    np.testing.assert_array_equal(shown.rho, expected)


def test_of_many_rankings_a_cell_is_the_mean_of_its_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix, labels = draw_families(30)
    every = similarity_map(matrix, labels, labels)
    monkeypatch.setattr(groups, "CELLS", 10)
    few = similarity_map(matrix, labels, labels)
    np.testing.assert_allclose(few.rho, every.rho.reshape(10, 3, 10, 3).mean(axis=(1, 3)))
    assert (few.scores, few.left_out, few.labels[0]) == (30, 0, f"{every.labels[0]} and 2 more")


def test_the_oldest_are_left_out_of_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(groups, "MAX_SCORES", 12)
    matrix, labels = draw_families(30)
    shown = similarity_map(matrix, labels, labels)
    assert (shown.scores, shown.left_out) == (12, 18)
    assert set(shown.labels) == set(labels[18:])


@pytest.mark.parametrize("number", [1, 2])
def test_one_or_two_rankings_need_no_order(number: int) -> None:
    matrix, labels = draw_families(number)
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
