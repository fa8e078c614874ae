"""Rankings of many runs: correlations by matrix products, groups against a plain loop, maps, and along an axis."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from scipy import stats
from support.command_line import avss, mistake, succeed
from support.rows import column, columns
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
            depth = np.delete(depth, 3)
            values = np.delete(values, 3)
        if index == 10:
            values[:] = 1.0
        scores.append((depth, values))
    return scores


def test_products_are_what_pair_by_pair_gives() -> None:
    scores = draw_scores()
    every = np.arange(len(scores))
    rho, partial = RankMatrix(scores).correlations(every, every)
    i, j = np.triu_indices(len(scores), 1)
    expected = correlate_pairs(scores, i, j)
    np.testing.assert_array_equal(rho[i, j], expected["spearman"])
    np.testing.assert_allclose(partial[i, j], expected["given_depth"], rtol=1e-12)
    np.testing.assert_array_equal(rho, rho.T)


NUMBER = 60


def draw_properties(across_models: bool) -> list[ScoreProperties]:
    """Properties of scores of 15 models, four for each: two strata, and two values that are compared."""
    members = []
    for index in range(NUMBER):
        value = "xy"[index % 4 // 2]
        model = index // 4
        stratum: Any = index % 2
        group = "xy"[model % 2]
        if not across_models:
            stratum = (index % 2, model)
            group = value
        members.append(ScoreProperties(stratum=stratum, value=value, model=str(model), group=group))
    return members


def defined_pairs_of_groups(
    members: list[ScoreProperties], rho: np.ndarray, across_models: bool
) -> dict[tuple[str, str], list[float]]:
    """Return the correlations of pairs in a stratum, by the groups of both."""
    correlations: dict[tuple[str, str], list[float]] = {}
    for i, j in combinations(range(NUMBER), 2):
        a = members[i]
        b = members[j]
        if a.stratum != b.stratum or (a.model != b.model) != across_models:
            continue
        if np.isfinite(rho[i, j]):
            first, second = sorted((a.group, b.group))
            correlations.setdefault((first, second), []).append(rho[i, j])
    return correlations


def pairs_of_other_values(members: list[ScoreProperties], rho: np.ndarray) -> list[float]:
    """Return the correlations of pairs in a stratum whose values differ."""
    correlations = []
    for i, j in combinations(range(NUMBER), 2):
        if members[i].stratum == members[j].stratum and members[i].value != members[j].value:
            correlations.append(rho[i, j])
    return correlations


@pytest.mark.parametrize("across_models", [True, False])
def test_groups_are_what_a_loop_over_pairs_gives(across_models: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agreement, "BLOCK_ROWS", 7)
    matrix = RankMatrix(draw_scores(NUMBER))
    members = draw_properties(across_models)
    survey = survey_pairs(matrix, members, by="family", across_models=across_models, most=3)
    rho, _ = matrix.correlations(np.arange(NUMBER), np.arange(NUMBER))

    pairs_of_groups = columns(survey.groups.to_pylist(), "a", "b")
    if across_models:
        assert set(pairs_of_groups) == {("x", "x"), ("x", "y"), ("y", "y")}
    else:
        assert pairs_of_groups == [("x", "y")]
    of_groups = defined_pairs_of_groups(members, rho, across_models)
    for groups, row in rows_of_groups(survey.groups).items():
        assert row["pairs"] == len(of_groups[groups])
        assert row["spearman"] == pytest.approx(np.mean(of_groups[groups]))

    of_values = pairs_of_other_values(members, rho)
    assert survey.number == len(of_values)
    defined = np.sort(of_values)[: np.isfinite(of_values).sum()]  # NaN comes last
    summary = survey.spearman
    assert summary.count == len(defined)
    assert summary.median == pytest.approx(np.median(defined), abs=2e-5)
    assert summary.lowest == pytest.approx(defined[0], abs=2e-5)
    assert summary.highest == pytest.approx(defined[-1], abs=2e-5)
    extremes = np.sort(rho[tuple(survey.extremes)])
    np.testing.assert_array_equal(extremes, [*defined[:3], *defined[-3:]])


def rows_of_groups(groups: pa.Table) -> dict[tuple[str, str], dict[str, Any]]:
    """Return the rows of a table of pairs of groups, by the names of both in order."""
    rows = {}
    for row in groups.to_pylist():
        first, second = sorted((row["a"], row["b"]))
        rows[first, second] = row
    assert len(rows) == len(groups)
    return rows


SHAPES = {"llama": np.arange(12.0), "gemma": 4 * np.sin(np.arange(12.0))}


def write_models(root: Path) -> Warehouse:
    """Ten models of two families, alike within a family, and of two sizes."""
    rng = np.random.default_rng(0)
    for index in range(20):
        family = ("llama", "gemma")[index % 2]
        billions = (1, 7)[index // 10]
        scores = SHAPES[family] + rng.normal(0, 1, 12) + 20
        columns: dict[str, Any] = {"num_parameters": billions * 10**9, "family": family}
        write_scores(root, f"run-{index}", scores.tolist(), model=f"org/{family}-{index}", **columns)
    return Warehouse(root)


def comparison(warehouse: Warehouse, by: str, **options: Any) -> RankingComparison:
    return compare(warehouse, warehouse.runs()["run_id"].to_pylist(), by=by, threshold=PUBLISHED, **options)


@pytest.mark.nightly
def test_models_of_a_family_agree_more_than_those_of_two(tmp_path: Path) -> None:
    compared = comparison(write_models(tmp_path), "family")
    rows = rows_of_groups(compared.groups)
    within = rows["llama", "llama"]
    between = rows["gemma", "llama"]
    assert within["spearman"] > 0.8
    assert between["spearman"] < 0.8
    assert within["pairs"] == 45
    assert between["pairs"] == 100
    assert within["given_depth"] < within["spearman"], "depth is most of it"
    assert compared.number == 100
    assert len(compared.pairs) == 100


@pytest.mark.parametrize(
    ("parameters", "label"),
    [(10**8, "under 0.5B"), (10**9, "0.5B to 1.5B"), (200 * 10**9, "150B and more"), (None, "unknown")],
)
def test_a_size_has_a_label(parameters: int | None, label: str) -> None:
    assert size_label(parameters) == label


SMALL = "0.5B to 1.5B"
LARGE = "4B to 10B"


def test_models_are_grouped_by_size(tmp_path: Path) -> None:
    compared = comparison(write_models(tmp_path), "size")
    assert compared.number == 100
    pairs = columns(compared.groups.to_pylist(), "a", "b")
    assert set(pairs) == {(SMALL, SMALL), (SMALL, LARGE), (LARGE, LARGE)}


# Maps: alike ones stand beside each other, and a cell is a mean.


def draw_families(number: int, seed: int = 0) -> tuple[RankMatrix, list[str]]:
    """Scores of three families of different depth, in turn, alike within a family."""
    rng = np.random.default_rng(seed)
    shapes = [rng.normal(0, 1, size) for size in (16, 20, 24)]
    scores = []
    labels = []
    for index in range(number):
        shape = shapes[index % 3]
        depth = (np.arange(len(shape)) + 0.5) / len(shape)
        scores.append((depth, shape + rng.normal(0, 0.2, len(shape))))
        labels.append(f"{'abc'[index % 3]}-{index}")
    return RankMatrix(scores), labels


def initials(labels: Iterable[str]) -> str:
    """Return the first letters of labels."""
    return "".join(label[0] for label in labels)


def test_alike_rankings_stand_beside_each_other() -> None:
    matrix, labels = draw_families(30)
    shown = similarity_map(matrix, labels, [*initials(labels)])
    groups = "".join(shown.groups)
    assert groups.count("a" * 10) == 1
    assert groups.count("b" * 10) == 1
    assert initials(shown.labels) == groups
    order = np.array([labels.index(label) for label in shown.labels])
    expected, _ = matrix.correlations(order, order)
    np.testing.assert_array_equal(shown.rho, expected)


def test_of_many_rankings_a_cell_is_the_mean_of_its_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix, labels = draw_families(30)
    every = similarity_map(matrix, labels, labels)
    monkeypatch.setattr(agreement, "CELLS", 10)
    few = similarity_map(matrix, labels, labels)
    blocks = every.rho.reshape(10, 3, 10, 3)
    np.testing.assert_allclose(few.rho, blocks.mean(axis=(1, 3)))
    assert few.scores == 30
    assert few.left_out == 0
    assert few.labels[0] == f"{every.labels[0]} and 2 more"


def test_the_oldest_are_left_out_of_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agreement, "MAX_SCORES", 12)
    matrix, labels = draw_families(30)
    shown = similarity_map(matrix, labels, labels)
    assert shown.scores == 12
    assert shown.left_out == 18
    assert set(shown.labels) == set(labels[18:])


@pytest.mark.parametrize("number", [1, 2])
def test_one_or_two_rankings_need_no_order(number: int) -> None:
    matrix, labels = draw_families(number)
    assert similarity_map(matrix, labels, labels).labels == tuple(labels)


def test_a_constant_ranking_is_like_none() -> None:
    rising = np.arange(8.0)
    scores = [(rising, np.ones(8)), (rising, rising), (rising, rising + 1)]
    shown = similarity_map(RankMatrix(scores), ["constant", "up", "also up"], ["x"] * 3)
    place = shown.labels.index
    assert np.isnan(shown.rho[place("constant")]).all()
    assert abs(place("up") - place("also up")) == 1


def test_the_command_draws_the_map(tmp_path: Path) -> None:
    for index in range(4):
        distances = np.arange(8.0) - index % 2 * 7
        write_scores(tmp_path, f"run-{index}", (distances**2).tolist())
    picture = tmp_path / "map.svg"
    result = succeed("compare", "-w", tmp_path, "-o", picture)
    assert result.stderr.startswith(f"Map of 4 runs: {picture}\n")
    drawn = picture.read_text()
    assert "Agreement of layer rankings" in drawn
    assert "run-3" in drawn


def test_the_command_draws_no_map_of_scores(tmp_path: Path) -> None:
    for index in range(4):
        write_scores(tmp_path, f"run-{index}", EARLY)
    refused = mistake("compare", "-w", tmp_path, "--by", "score", "-o", tmp_path / "map.svg")
    assert "A map shows runs" in refused


@pytest.fixture
def two_texts(tmp_path: Path) -> Path:
    """Two models, each measured on the same two texts."""
    for model in "ab":
        columns = {"model": f"org/{model}", "revision": model}
        for text in ("x.txt", "y.txt"):
            rng = np.random.default_rng(len(text) + ord(model))
            write_scores(tmp_path, f"{model}-{text[0]}", rng.random(8).tolist(), corpus=text, **columns)
    return tmp_path


def map_of(root: Path, **options: Any) -> SimilarityMap:
    run_ids = Warehouse(root).runs()["run_id"].to_pylist()
    similarity = compare(Warehouse(root), run_ids, threshold=PUBLISHED, mapped=True, **options).similarity
    assert similarity is not None
    return similarity


def test_a_map_by_text_has_the_runs_of_every_text_and_model(two_texts: Path) -> None:
    similarity = map_of(two_texts, by="corpus")
    assert similarity.scores == 4
    assert sorted(similarity.groups) == ["x.txt", "x.txt", "y.txt", "y.txt"]


def test_a_map_by_run_has_the_runs_of_one_text_and_counts_the_others(two_texts: Path) -> None:
    similarity = map_of(two_texts)
    assert similarity.scores == 2
    assert similarity.mismatched == 2


def test_a_map_of_different_conditions_has_every_run(two_texts: Path) -> None:
    similarity = map_of(two_texts, allow_mismatch=True)
    assert similarity.scores == 4
    assert similarity.mismatched == 0


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
        ranking = np.array(EARLY if step < 6 else LATE)
        scores = ranking + random.uniform(-0.9, 0.9, 8)
        columns = {**SERIES, "training_step": 1000 * step, "revision": f"r{step}"}
        write_scores(tmp_path, f"a-{step}", scores.tolist(), **columns)
    return tmp_path


def agreement_with(values: np.ndarray, profiles: Iterable[np.ndarray]) -> list[float]:
    """Return the rank correlation of values with each of several profiles."""
    return [stats.spearmanr(values, profile).statistic for profile in profiles]


@pytest.mark.nightly
def test_a_training_is_followed_in_its_order(training: Path) -> None:
    write_scores(training, "b", EARLY, model="org/b")
    result = follow(training, "step")
    (curve,) = result.curves
    assert column(curve.runs, "training_step") == [*range(0, 12_000, 1000)]
    assert curve.points[3] == "3,000"
    assert curve.name == "org/a@step*"
    assert result.left_out == {"b": "its step is not known"}


@pytest.mark.nightly
def test_a_training_is_compared_with_its_end_its_last_point_and_its_order(training: Path) -> None:
    (curve,) = follow(training, "step").curves
    table, _ = curve_section(curve, "curve").tables
    points = [row.values for row in table.rows]
    assert column(points, "with_last") == pytest.approx(agreement_with(curve.values[-1], curve.values))
    assert np.isnan(points[0]["with_previous"])
    for i in range(1, 12):
        with_previous = stats.spearmanr(curve.values[i - 1], curve.values[i]).statistic
        assert points[i]["with_previous"] == pytest.approx(with_previous)
    order = np.arange(12)
    assert curve.trend == pytest.approx(agreement_with(order, curve.ranks.T), nan_ok=True)


@pytest.mark.nightly
def test_a_training_is_a_table_of_ranks(training: Path) -> None:
    table = follow(training, "step").table()
    assert table.schema.equals(SCHEMA)
    assert len(table) == 12 * 8
    first = table.slice(0, 8)
    assert set(first["run_id"].to_pylist()) == {"a-0"}
    assert first["is_lowest"].to_pylist().count(True) == 2
    assert first["rank"].to_pylist() == stats.rankdata(first["score"]).tolist()


@pytest.mark.nightly
def test_models_of_a_family_are_followed_by_size_at_equal_depth(tmp_path: Path) -> None:
    for name, layers in (("large", 12), ("small", 4), ("middle", 8)):
        depth = (np.arange(layers) + 0.5) / layers
        columns: dict[str, Any] = {"family": "f", "num_parameters": layers * 10**9}
        write_scores(tmp_path, name, depth.tolist(), model=f"org/{name}", **columns)
    write_scores(tmp_path, "other", EARLY, family="g", num_parameters=5)
    result = follow(tmp_path, "size")
    (curve,) = result.curves
    assert column(curve.runs, "run_id") == ["small", "middle", "large"]
    assert curve.depth == pytest.approx([1 / 8, 3 / 8, 5 / 8, 7 / 8])
    assert curve.values == pytest.approx(np.tile(curve.depth, (3, 1)))
    assert result.left_out["other"].startswith("no other run differs from it in size alone")


@pytest.mark.nightly
def test_other_conditions_make_other_curves_and_the_newest_run_of_a_place_counts(tmp_path: Path) -> None:
    def write(run_id: str, scores: list[float], corpus: str, length: int) -> None:
        text: dict[str, Any] = {"corpus": corpus, "corpus_fingerprint": corpus, "sequence_length": length}
        write_scores(tmp_path, run_id, scores, model="org/m", **text)

    write("x-128", EARLY, "x.txt", 128)
    write("x-256", EARLY, "x.txt", 256)
    write("y-128", EARLY, "y.txt", 128)
    write("y-256", EARLY, "y.txt", 256)
    write("x-again", LATE, "x.txt", 256)
    by_length = follow(tmp_path, "sequence_length")
    on_x, on_y = by_length.curves
    assert on_x.name.endswith(", corpus x.txt")
    assert on_y.name.endswith(", corpus y.txt")
    assert column(on_x.runs, "run_id") == ["x-128", "x-again"]
    assert set(by_length.left_out) == {"x-256"}


@pytest.mark.nightly
def test_scores_of_other_sites_and_layers_without_a_score(tmp_path: Path) -> None:
    for step, last in ((1, 4.0), (2, float("nan"))):
        profiles = {("block", "pooled", 1e-5): EARLY, ("mlp", "pooled", 1e-5): [3.0, 1.0, 2.0, last]}
        columns = {**SERIES, "training_step": step, "revision": f"r{step}"}
        write_profiles(tmp_path, f"a-{step}", profiles, **columns)
    (curve,) = follow(tmp_path, "step").curves
    assert len(curve.depth) == 8
    (curve,) = follow(tmp_path, "step", site="mlp").curves
    assert curve.layers == [0, 1, 2], "the layer without a score at one point is left out"
    with pytest.raises(QueryError, match="No two runs are along step: it has no such scores"):
        follow(tmp_path, "step", site="attention")


@pytest.mark.nightly
def test_the_command_prints_draws_and_exports(training: Path, tmp_path: Path) -> None:
    picture = tmp_path / "ranks.svg"
    printed = succeed("compare", "-w", training, "--along", "step", "-o", picture).stdout
    assert "The lowest 25% are those of the last point from" in printed
    assert "Ranks along training step" not in printed
    assert "training step" in picture.read_text(encoding="utf-8")
    lines = succeed("compare", "-w", training, "--along", "step", "--format", "csv").stdout
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
    assert "Did you mean 'step'?" in mistake("compare", "-w", training, "--along", "steps")
    nothing = mistake("compare", "-w", training, "--along", "size")
    assert "No two runs are along size" in nothing
    assert "set --allow-mismatch" in nothing
