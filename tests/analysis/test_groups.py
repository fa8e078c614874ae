"""Rankings of many runs: correlations by matrix products, groups against a plain loop, maps, and along an axis."""

from __future__ import annotations

import csv
import io
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats
from support.command_line import avss
from support.warehouses import PUBLISHED, write_profiles, write_scores

import avss_dist
from avss_dist.analysis import agreement
from avss_dist.analysis.agreement import (
    RankMatrix,
    ScoreProperties,
    Scores,
    SimilarityMap,
    correlate_pairs,
    similarity_map,
    survey_pairs,
)
from avss_dist.analysis.comparison import RankingComparison, compare, size_label
from avss_dist.analysis.curves import SCHEMA, RankingCurves, curve_section, ranking_curves
from avss_dist.core.errors import ConfigError, QueryError
from avss_dist.warehouse.reader import Warehouse


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
    expected = correlate_pairs(scores, *pairs)
    np.testing.assert_array_equal(rho[tuple(pairs)], expected["spearman"])
    np.testing.assert_allclose(partial[tuple(pairs)], expected["given_depth"], rtol=1e-12)
    np.testing.assert_array_equal(rho, rho.T)


@pytest.mark.parametrize("across_models", [True, False])
def test_groups_are_what_a_loop_over_pairs_gives(across_models: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agreement, "BLOCK_ROWS", 7)
    scores = draw_scores(60)
    strata = [index % 2 if across_models else (index % 2, index // 4) for index in range(60)]
    labels = ["xy"[index % 4 // 2] for index in range(60)]
    models = [str(index // 4) for index in range(60)]
    families = ["xy"[index // 4 % 2] for index in range(60)] if across_models else labels
    members = [
        ScoreProperties(stratum=stratum, value=value, model=model, group=group)
        for stratum, value, model, group in zip(strata, labels, models, families, strict=True)
    ]
    rho, _ = RankMatrix(scores).correlations(np.arange(60), np.arange(60))
    survey = survey_pairs(RankMatrix(scores), members, by="family", across_models=across_models, most=3)

    def values(first: str, second: str) -> np.ndarray:
        chosen = []
        for i, j in combinations(range(60), 2):
            are_of_groups = {families[i], families[j]} == {first, second}
            are_of_models = (models[i] != models[j]) == across_models
            if strata[i] == strata[j] and are_of_groups and are_of_models and np.isfinite(rho[i, j]):
                chosen.append(rho[i, j])
        return np.array(chosen)

    rows = {(row["a"], row["b"]): row for row in survey.groups.to_pylist()}
    assert set(rows) == ({("x", "x"), ("x", "y"), ("y", "y")} if across_models else {("x", "y")})
    for (first, second), row in rows.items():
        every = values(first, second)
        assert row["pairs"] == len(every)
        assert row["spearman"] == pytest.approx(every.mean())
    wanted = []
    for i, j in combinations(range(60), 2):
        if strata[i] == strata[j] and labels[i] != labels[j]:
            wanted.append(rho[i, j])
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
    return compare(warehouse, warehouse.runs()["run_id"].to_pylist(), by=by, threshold=PUBLISHED, **options)


def test_models_of_a_family_agree_more_than_those_of_two(tmp_path: Path) -> None:
    compared = comparison(write_models(tmp_path), "family")
    rows = {(row["a"], row["b"]): row for row in compared.groups.to_pylist()}
    within = rows["llama", "llama"]
    between = rows.get(("llama", "gemma")) or rows["gemma", "llama"]
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
    monkeypatch.setattr(agreement, "CELLS", 10)
    few = similarity_map(matrix, labels, labels)
    np.testing.assert_allclose(few.rho, every.rho.reshape(10, 3, 10, 3).mean(axis=(1, 3)))
    assert (few.scores, few.left_out, few.labels[0]) == (30, 0, f"{every.labels[0]} and 2 more")


def test_the_oldest_are_left_out_of_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agreement, "MAX_SCORES", 12)
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
    assert result.exit_code == 0
    assert result.stderr.startswith(f"Map of 4 runs: {picture}\n")
    drawn = picture.read_text()
    assert "Agreement of layer rankings" in drawn
    assert "run-3" in drawn
    refused = avss("compare", "-w", tmp_path, "--by", "score", "-o", picture)
    assert refused.exit_code == 2
    assert "A map shows runs" in refused.stderr


@pytest.fixture
def two_texts(tmp_path: Path) -> Path:
    """Two models, each measured on the same two texts."""
    for model in "ab":
        for text in ("x.txt", "y.txt"):
            scores = np.random.default_rng(len(text) + ord(model)).random(8).tolist()
            write_scores(tmp_path, f"{model}-{text[0]}", scores, model=f"org/{model}", revision=model, corpus=text)
    return tmp_path


def map_of(root: Path, **options: Any) -> SimilarityMap:
    run_ids = Warehouse(root).runs()["run_id"].to_pylist()
    similarity = compare(Warehouse(root), run_ids, threshold=PUBLISHED, mapped=True, **options).similarity
    assert similarity is not None
    return similarity


def test_a_map_by_text_has_the_runs_of_every_text_and_model(two_texts: Path) -> None:
    similarity = map_of(two_texts, by="corpus")
    assert (similarity.scores, sorted(similarity.groups)) == (4, ["x.txt", "x.txt", "y.txt", "y.txt"])


def test_a_map_by_run_has_the_runs_of_one_text_and_counts_the_others(two_texts: Path) -> None:
    similarity = map_of(two_texts)
    assert (similarity.scores, similarity.mismatched) == (2, 2)


def test_a_map_of_different_conditions_has_every_run(two_texts: Path) -> None:
    similarity = map_of(two_texts, allow_mismatch=True)
    assert (similarity.scores, similarity.mismatched) == (4, 0)


def test_a_run_that_is_in_no_pair_is_not_on_a_map(two_texts: Path) -> None:
    write_scores(two_texts, "c-x", [1.0, 3, 2, 5, 4, 6, 8, 7], model="org/c", revision="c", corpus="x.txt")
    assert map_of(two_texts, by="corpus").scores == 4


def test_the_command_says_which_runs_are_not_on_the_map(two_texts: Path) -> None:
    result = avss("compare", "-w", two_texts, "-o", two_texts / "map.svg")
    assert "2 runs under other conditions are not on it. --allow-mismatch draws all." in result.stderr


# Along an axis.

EARLY = [1.0, 2, 3, 4, 5, 6, 7, 8]
LATE = [8.0, 7, 6, 5, 4, 3, 2, 1]
SERIES = {"series": "org/a@step*", "model": "org/a"}


def follow(root: Path, along: str, **options: Any) -> RankingCurves:
    run_ids = Warehouse(root).runs()["run_id"].to_pylist()
    return ranking_curves(Warehouse(root), run_ids, along=along, threshold=PUBLISHED, **options)


@pytest.fixture
def training(tmp_path: Path) -> Path:
    """A training of 12 checkpoints whose ranking turns round at step 6,000, written in another order."""
    random = np.random.default_rng(0)
    for step in random.permutation(12).tolist():
        scores = (np.array(EARLY if step < 6 else LATE) + random.uniform(-0.9, 0.9, 8)).tolist()
        write_scores(tmp_path, f"a-{step}", scores, **SERIES, training_step=1000 * step, revision=f"r{step}")
    return tmp_path


@pytest.mark.nightly
def test_a_training_is_followed_in_its_order(training: Path) -> None:
    write_scores(training, "b", EARLY, model="org/b")
    result = follow(training, "step")
    (curve,) = result.curves
    assert [run["training_step"] for run in curve.runs] == [1000 * step for step in range(12)]
    assert curve.points[3] == "3,000"
    assert curve.name == "org/a@step*"
    assert result.left_out == {"b": "its step is not known"}
    expected = [stats.spearmanr(row, curve.values[-1]).statistic for row in curve.values]
    points = [row.values for row in curve_section(curve, "curve").tables[0].rows]
    assert [point["with_last"] for point in points] == pytest.approx(expected)
    before = [stats.spearmanr(*curve.values[at - 1 : at + 1]).statistic for at in range(1, 12)]
    assert [point["with_previous"] for point in points] == pytest.approx([np.nan, *before], nan_ok=True)
    assert curve.trend == pytest.approx(
        [stats.spearmanr(range(12), ranks).statistic for ranks in curve.ranks.T], nan_ok=True
    )
    table = result.table()
    assert table.schema.equals(SCHEMA)
    assert len(table) == 12 * 8
    first = table.to_pylist()[:8]
    assert {row["run_id"] for row in first} == {"a-0"}
    assert [row["is_lowest"] for row in first].count(True) == 2
    assert [row["rank"] for row in first] == stats.rankdata([row["score"] for row in first]).tolist()


@pytest.mark.nightly
def test_models_of_a_family_are_followed_by_size_at_equal_depth(tmp_path: Path) -> None:
    for name, layers in (("large", 12), ("small", 4), ("middle", 8)):
        scores = ((np.arange(layers) + 0.5) / layers).tolist()
        write_scores(tmp_path, name, scores, model=f"org/{name}", family="f", num_parameters=layers * 10**9)
    write_scores(tmp_path, "other", EARLY, family="g", num_parameters=5)
    result = follow(tmp_path, "size")
    (curve,) = result.curves
    assert [run["run_id"] for run in curve.runs] == ["small", "middle", "large"]
    assert curve.depth == pytest.approx([1 / 8, 3 / 8, 5 / 8, 7 / 8])
    assert curve.values == pytest.approx(np.tile(curve.depth, (3, 1)))
    assert result.left_out["other"].startswith("no other run differs from it in size alone")


@pytest.mark.nightly
def test_other_conditions_make_other_curves_and_the_newest_run_of_a_place_counts(tmp_path: Path) -> None:
    for corpus in ("x.txt", "y.txt"):
        for length in (128, 256):
            columns: dict[str, Any] = {"corpus": corpus, "corpus_fingerprint": corpus, "sequence_length": length}
            columns["model"] = "org/m"
            write_scores(tmp_path, f"{corpus[0]}-{length}", EARLY, **columns)
    write_scores(tmp_path, "x-again", LATE, **{**columns, "corpus": "x.txt", "corpus_fingerprint": "x.txt"})
    by_length = follow(tmp_path, "sequence_length")
    assert [curve.name.rpartition(", ")[2] for curve in by_length.curves] == ["corpus x.txt", "corpus y.txt"]
    assert [run["run_id"] for run in by_length.curves[0].runs] == ["x-128", "x-again"]
    assert set(by_length.left_out) == {"x-256"}


@pytest.mark.nightly
def test_scores_of_other_sites_and_layers_without_a_score(tmp_path: Path) -> None:
    for step, last in ((1, 4.0), (2, float("nan"))):
        profiles = {("block", "pooled", 1e-5): EARLY, ("mlp", "pooled", 1e-5): [3.0, 1.0, 2.0, last]}
        write_profiles(tmp_path, f"a-{step}", profiles, **SERIES, training_step=step, revision=f"r{step}")
    assert len(follow(tmp_path, "step").curves[0].depth) == 8
    (curve,) = follow(tmp_path, "step", site="mlp").curves
    assert curve.layers == [0, 1, 2], "the layer without a score at one point is left out"
    with pytest.raises(QueryError, match="No two runs are along step: it has no such scores"):
        follow(tmp_path, "step", site="attention")


@pytest.mark.nightly
def test_the_command_prints_draws_and_exports(training: Path, tmp_path: Path) -> None:
    picture = tmp_path / "ranks.svg"
    result = avss("compare", "-w", training, "--along", "step", "-o", picture)
    assert result.exit_code == 0, result.stderr
    assert "The lowest 25% are those of the last point from" in result.stdout
    assert "Ranks along training step" not in result.stdout
    assert "training step" in picture.read_text(encoding="utf-8")
    lines = avss("compare", "-w", training, "--along", "step", "--format", "csv").stdout
    rows = list(csv.DictReader(io.StringIO(lines)))
    assert len(rows) == 96
    assert rows[-1]["point"] == "11,000"
    curves = avss_dist.compare(warehouse=training, along="step")
    assert isinstance(curves, RankingCurves)
    assert curves.table().num_rows == 96


@pytest.mark.nightly
def test_mistakes_about_an_axis_are_refused(training: Path) -> None:
    with pytest.raises(ConfigError, match="`along` and `by` exclude each other"):
        avss_dist.compare(warehouse=training, along="step", by="family")
    result = avss("compare", "-w", training, "--along", "steps")
    assert result.exit_code == 2
    assert "Did you mean 'step'?" in result.stderr
    nothing = avss("compare", "-w", training, "--along", "size")
    assert nothing.exit_code == 2
    assert "No two runs are along size" in nothing.stderr
    assert "set --allow-mismatch" in nothing.stderr
