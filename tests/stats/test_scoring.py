"""Scores: AVSS by recipe, ranks, relative thresholds, intervals and rivals, against the raw activations."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.oracle import Float64, oracle_stats
from support.rows import column, columns, where
from support.warehouses import GRID, PUBLISHED, Stats, stats_of

from avss_dist.stats import intervals, scores
from avss_dist.stats.catalog import BASELINES, FROM_ACTIVATIONS, SCORES
from avss_dist.stats.intervals import jackknife_interval
from avss_dist.stats.layer_stats import LayerKey, LayerStats, merge_stats
from avss_dist.stats.rankings import count_lowest, rank_lowest
from avss_dist.stats.scores import RELATIVE_THRESHOLDS, SiteTable, Threshold, avss, score_run, share
from avss_dist.warehouse.schema import SCHEMAS

LAYERS = tuple(f"model.layers.{i}" for i in range(4))
Rows = list[dict[str, Any]]
IDENTITY = {"run_id", "model", "revision", "family"}
PLACE = {"layer", "layer_name", "depth", "site", "recipe", "threshold", "threshold_kind"}


def activations(seed: int = 0, shards: int = 6, layers: int = 4, offset: float = 0.0, last: float = 2.0) -> Float64:
    """float32 values x[shards, layers, sequences, tokens, units]; later layers are wider, up to a scale of ``last``."""
    rng = np.random.default_rng(seed)
    scale = np.linspace(0.5, last, layers)[:, None, None, None]
    centers = rng.normal(0, 0.15, (layers, 1, 1, 24)) * scale**2
    values = offset + centers + scale * rng.normal(size=(shards, layers, 4, 8, 24))
    return values.astype(np.float32).astype(np.float64)


def layer_values(
    rows: Rows, name: str, recipe: str = "pooled", threshold: float = 1e-1, kind: str = "absolute", site: str = "block"
) -> list[Any]:
    """One column over layers."""
    key = {"site": site, "recipe": recipe, "threshold": threshold, "threshold_kind": kind}
    values = [row[name] for row in rows if key.items() <= row.items()]
    assert values
    return values


def table_of(
    near_zero: Sequence[int], count: int | Sequence[int] = 1000, variance: float | Sequence[float] = 1.0
) -> SiteTable:
    """A table of layers with nothing but these counts at a threshold of 1e-5."""
    layers = np.broadcast_arrays(near_zero, count, variance)
    zero = LayerStats.zero((1e-5,))
    stats = []
    for below, number, spread in zip(*layers, strict=True):
        stats.append(replace(zero, near_zero=np.array([below]), count=int(number), m2=float(number * spread)))
    return SiteTable(stats)


def paper_avss(variance: Float64, sparsity: Float64) -> dict[str, Float64]:
    """arXiv 2411.02117, section 3."""
    nav = variance / variance.sum()
    nas = sparsity / sparsity.sum()
    return {"variance": variance, "sparsity": sparsity, "nav": nav, "nas": nas, "avss": nav / nas}


def measure_pooled(x: Float64, threshold: float) -> tuple[float, float]:
    return x.mean(1).var(1, ddof=1).mean(), (np.abs(x) < threshold).mean()


def measure_element(x: Float64, threshold: float) -> tuple[float, float]:
    return x.var(), (np.abs(x) < threshold).mean()


def measure_unit(x: Float64, threshold: float) -> tuple[float, float]:
    means = x.mean((0, 1))
    return means.var(), (np.abs(means) < threshold).mean()


MEASURES = {"pooled": measure_pooled, "element": measure_element, "unit": measure_unit}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("recipe", MEASURES)
def test_avss_is_the_papers_formula_on_the_activations(recipe: str, seed: int) -> None:
    x = activations(seed)
    rows = score_run(merge_stats(stats_of(x)), LAYERS)
    sequences = x.swapaxes(0, 1).reshape(4, -1, *x.shape[3:])
    variance, sparsity = np.array([MEASURES[recipe](layer, 1e-1) for layer in sequences]).T
    for name, want in paper_avss(variance, sparsity).items():
        np.testing.assert_allclose(layer_values(rows, name, recipe), want, rtol=1e-10, err_msg=name)


def test_literal_avss_is_undefined_exactly_where_nothing_is_near_zero() -> None:
    columns = table_of([0, 5, 10, 0, 5]).score("element", PUBLISHED)
    assert np.isnan(columns["avss"]).tolist() == [True, False, False, True, False]
    assert np.array(columns["avss"])[[1, 2, 4]].tolist() == pytest.approx([0.8, 0.4, 0.8])  # 0.2 / (5, 10 of 20)
    assert not np.isnan(columns["avss_smoothed"]).any()


def test_avss_is_of_shares_of_elements_also_where_layers_have_other_numbers() -> None:
    columns = table_of([5, 10, 400], [100, 1000, 2000], [1.0, 2.0, 5.0]).score("element", PUBLISHED)
    want = paper_avss(np.array([1.0, 2.0, 5.0]), np.array([0.05, 0.01, 0.2]))
    for name in ("sparsity", "nav", "nas", "avss"):
        assert columns[name] == pytest.approx(want[name].tolist(), rel=1e-12), name


def test_one_element_is_enough_for_a_share() -> None:
    scores_of_layers = avss(np.array([1.0, 3.0]), np.array([1.0, 5.0]), np.array([1.0, 10.0]), smoothed=False)
    assert scores_of_layers == pytest.approx([0.25 / (1 / 1.5), 0.75 / (0.5 / 1.5)], rel=1e-12)
    smoothed = avss(np.ones(2), np.array([0.0, 5.0]), np.array([0.0, 10.0]), smoothed=True)
    assert np.isnan(smoothed).tolist() == [True, False]


def test_shares_of_nothing_are_not_a_number_and_no_warning(recwarn: pytest.WarningsRecorder) -> None:
    assert np.isnan(share(np.zeros((2, 3)))).all()
    assert np.isnan(share(np.array([np.nan, np.nan]))).all()
    assert share(np.array([1.0, np.nan, 3.0])).tolist() == pytest.approx([0.25, np.nan, 0.75], nan_ok=True)
    assert not recwarn.list


def test_a_unit_at_the_threshold_is_not_near_zero() -> None:
    stats = replace(LayerStats.zero((0.5,)), unit_count=2, unit_sum=np.array([1.0, -1.0, 0.5, 3.0]))
    columns = SiteTable([stats]).score("unit", Threshold(value=0.5, kind="absolute"))
    assert columns["near_zero_count"] == [1.0]
    assert columns["count"] == [4]
    assert columns["variance"] == pytest.approx([np.var([0.5, -0.5, 0.25, 1.5])], rel=1e-12)


def test_smoothed_avss_adds_half_a_count() -> None:
    columns = table_of([0, 5, 10], [9, 99, 999], [1.0, 2.0, 5.0]).score("element", PUBLISHED)
    want = paper_avss(np.array([1.0, 2.0, 5.0]), np.array([0.5 / 10, 5.5 / 100, 10.5 / 1000]))["avss"]
    assert columns["avss_smoothed"] == pytest.approx(want.tolist(), rel=1e-12)


def test_quality_says_how_many_were_near_zero() -> None:
    columns = table_of([0, 1, 99, 100, 500]).score("element", PUBLISHED)
    assert columns["quality"] == ["zero_sparsity", "noisy_sparsity", "noisy_sparsity", "ok", "ok"]


def ranks_of_twenty_ties() -> list[int]:
    """Return the ranks where a high score and a low one take turns, twenty times."""
    ranks = []
    for i in range(20):
        ranks += [21 + i, 1 + i]
    return ranks


@pytest.mark.parametrize(
    ("scores", "ranks"),
    [
        ([3.0, 1.0, 2.0], [3, 1, 2]),
        ([1.0, 1.0, 0.5, 1.0], [2, 3, 1, 4]),
        ([1.0, 0.0] * 20, ranks_of_twenty_ties()),
        ([math.nan, 2.0, math.nan, 1.0], [math.nan, 2, math.nan, 1]),
    ],
    ids=["plain", "ties to the earlier layer", "many ties", "undefined is unranked"],
)
def test_rank_one_is_the_lowest(scores: list[float], ranks: list[float]) -> None:
    np.testing.assert_array_equal(rank_lowest(np.array(scores)), ranks)
    np.testing.assert_array_equal(rank_lowest(np.array([scores, scores])), [ranks, ranks])


def test_ranks_follow_the_smoothed_score_and_are_integers() -> None:
    columns = table_of([0, 5, 10], variance=[1.0, 2.0, 0.1]).score("element", PUBLISHED)
    assert columns["rank"] == [3, 2, 1]
    for rank in columns["rank"]:
        assert type(rank) is int
    assert np.isnan([columns["avss_normalized"], columns["avss_cumulative"]]).all(), "one layer has nothing near zero"
    assert [SCORES[name].column for name in FROM_ACTIVATIONS] == ["avss_smoothed", *BASELINES]


def test_the_lowest_quarter_is_rounded_half_to_even_and_never_nothing() -> None:
    assert [count_lowest(layers) for layers in (30, 18, 4, 1, 32, 22)] == [8, 4, 1, 1, 8, 6]


@pytest.mark.parametrize("recipe", MEASURES)
def test_normalized_scores_sum_to_one_and_cumulate(recipe: str) -> None:
    rows = score_run(merge_stats(stats_of(activations())), LAYERS)
    scores = np.array(layer_values(rows, "avss", recipe))
    normalized = np.array(layer_values(rows, "avss_normalized", recipe))
    cumulative = np.array(layer_values(rows, "avss_cumulative", recipe))
    np.testing.assert_allclose(normalized, scores / scores.sum(), rtol=1e-12)
    np.testing.assert_allclose(cumulative, [normalized[: i + 1].sum() for i in range(4)], rtol=1e-12)
    assert cumulative[-1] == pytest.approx(1.0, rel=1e-12)


def test_one_row_for_each_layer_site_recipe_and_threshold() -> None:
    x = activations()
    merged = merge_stats([*stats_of(x), *stats_of(x, "mlp", units=False)])
    rows = score_run(merged, LAYERS)
    thresholds = [(t, "absolute") for t in GRID] + [(t, "rms") for t in RELATIVE_THRESHOLDS]
    recipes = [("block", "pooled"), ("block", "element"), ("block", "unit"), ("mlp", "pooled"), ("mlp", "element")]
    want = []
    for site, recipe in recipes:
        for threshold, kind in thresholds:
            want += [(layer, site, recipe, threshold, kind) for layer in range(4)]
    place = itemgetter("layer", "site", "recipe", "threshold", "threshold_kind")
    assert sorted(place(row) for row in rows) == sorted(want)
    assert column(rows[:4], "depth") == [0.125, 0.375, 0.625, 0.875]
    assert column(rows[:4], "layer_name") == list(LAYERS)
    schema = pa.schema([field for field in SCHEMAS["scores"] if field.name not in IDENTITY])
    for row in rows:
        assert row.keys() == set(schema.names)
    assert pa.Table.from_pylist(rows, schema).num_rows == len(rows)
    for sites, chosen in ((None, {"block", "mlp"}), (["mlp"], {"mlp"}), (["mlp", "update"], {"mlp"}), ([], set())):
        assert set(column(score_run(merged, LAYERS, sites=sites), "site")) == chosen


@pytest.mark.parametrize("multiple", RELATIVE_THRESHOLDS)
def test_relative_thresholds_count_within_a_percent(multiple: float) -> None:
    scales = np.array([0.01, 1, 300])[:, None, None, None]
    x = np.random.default_rng(0).normal(0.5, 1.0, (1, 3, 16, 128, 128)) * scales
    x = x.astype(np.float32).astype(np.float64)
    rows = score_run(stats_of(x)[0], LAYERS[:3])
    direct = []
    for layer in x[0]:
        rms = np.sqrt((layer**2).mean())
        direct.append((np.abs(layer) < multiple * rms).mean())
    assert layer_values(rows, "sparsity", threshold=multiple, kind="rms") == pytest.approx(direct, rel=0.01)


@pytest.mark.parametrize("recipe", MEASURES)
def test_lowest_set_probabilities_sum_to_the_size_of_the_set(recipe: str) -> None:
    shards = stats_of(activations(3, shards=8, layers=9, last=0.51))
    rows = score_run(merge_stats(shards), [str(i) for i in range(9)], shards)
    probabilities = layer_values(rows, "lowest_set_probability", recipe)
    assert sum(probabilities) == pytest.approx(count_lowest(9), rel=1e-12)
    assert 0 <= min(probabilities) < max(probabilities) <= 1
    assert any(0 < p < 1 for p in probabilities)


@pytest.mark.parametrize("offset", [0.0, 1e4], ids=["centered", "large offset"])
@pytest.mark.parametrize("recipe", MEASURES)
def test_intervals_equal_merging_the_shards_again(monkeypatch: pytest.MonkeyPatch, recipe: str, offset: float) -> None:
    """By the jackknife over the other shards, and by the share of drawn shards."""
    for module in (intervals, scores):
        monkeypatch.setattr(module, "BOOTSTRAP_RESAMPLES", 6)
    shards = stats_of(activations(4, shards=8, offset=offset, last=0.5))
    table = SiteTable(list(merge_stats(shards).values()), [list(shard.values()) for shard in shards])
    assert table.weights is not None
    assert (table.weights.sum(1) == [8] * 6 + [7] * 8).all()
    threshold = Threshold(value=1e-1, kind="absolute")
    columns = table.score(recipe, threshold)
    scores_of_draws = []
    for weights in table.weights:
        drawn: list[Mapping[LayerKey, LayerStats]] = []
        for shard, times in zip(shards, weights, strict=True):
            drawn += [shard] * int(times)
        merged = SiteTable(list(merge_stats(drawn).values()))
        scores_of_draws.append(merged.score(recipe, threshold)["avss_smoothed"])
    scores_of_merged = np.array(scores_of_draws)
    low, high = jackknife_interval(columns["avss_smoothed"], scores_of_merged[6:], scale="log")
    if recipe != "unit":
        enough = np.array(columns["near_zero_count"]) >= 5
        low = np.where(enough, low, np.nan)
        high = np.where(enough, high, np.nan)
    np.testing.assert_allclose(columns["avss_low"], low, rtol=1e-7)
    np.testing.assert_allclose(columns["avss_high"], high, rtol=1e-7)
    lowest = [(scores_of_merged[:6].argmin(1) == layer).mean() for layer in range(4)]
    assert columns["lowest_set_probability"] == pytest.approx(lowest)


def without_place(rows: Rows, layer: int) -> list[dict[str, Any]]:
    rest_of_rows = []
    for row in rows:
        if row["layer"] == layer:
            rest_of_rows.append({name: value for name, value in row.items() if name not in PLACE})
    return rest_of_rows


def test_a_site_that_only_some_layers_have_is_scored_over_those() -> None:
    shards = stats_of(activations(5, layers=2), "neuron", units=False)
    sparse = [{(1, "neuron"): shard[0, "neuron"], (3, "neuron"): shard[1, "neuron"]} for shard in shards]
    dense_rows = score_run(merge_stats(shards), LAYERS[:2], shards)
    sparse_rows = score_run(merge_stats(sparse), LAYERS, sparse)
    assert set(columns(sparse_rows, "layer", "layer_name", "depth")) == {
        (1, LAYERS[1], 0.375),
        (3, LAYERS[3], 0.875),
    }
    for sparse_layer, dense_layer in ((1, 0), (3, 1)):
        assert repr(without_place(sparse_rows, sparse_layer)) == repr(without_place(dense_rows, dense_layer))


def test_a_layer_that_some_shards_lack_counts_in_the_others() -> None:
    shards: list[Mapping[LayerKey, LayerStats]] = list(stats_of(activations(6, shards=12)))
    zero = LayerStats.zero(GRID)
    holes = [dict(shard) for shard in shards]
    zeros = [dict(shard) for shard in shards]
    for even in range(0, 12, 2):
        del holes[even][2, "block"]
        zeros[even][2, "block"] = zero
    merged = merge_stats(holes)
    rows = score_run(merged, LAYERS, holes)
    assert repr(rows) == repr(score_run(merged, LAYERS, zeros))
    intervals_of_rows = columns(where(rows, threshold=1e-1), "avss_low", "avss_high")
    assert np.isfinite(intervals_of_rows).all()


def empty_layer(kind: str) -> LayerStats:
    """Nothing at all, or nothing but NaN (an overflow), as a kernel reports it."""
    if kind == "zero":
        return LayerStats.zero(GRID)
    return oracle_stats(np.full((4, 8, 24), np.nan), np.ones((4, 8), bool), GRID, units=True)


@pytest.mark.parametrize(
    ("kind", "recipes"), [("zero", ["pooled", "element"]), ("overflow", ["pooled", "element", "unit"])]
)
def test_an_empty_layer_is_unscored_and_leaves_the_others_alone(kind: str, recipes: list[str]) -> None:
    alone = stats_of(activations(7, shards=8, layers=3))
    beside = [shard | {(3, "block"): empty_layer(kind)} for shard in alone]
    want = score_run(merge_stats(alone), LAYERS[:3], alone)
    rows = score_run(merge_stats(beside), LAYERS, beside)
    assert list(dict.fromkeys(column(rows, "recipe"))) == recipes
    unchanged = set(want[0]) - PLACE - {"lowest_set_probability"}
    for recipe in recipes:
        for name in unchanged:
            *others, empty = layer_values(rows, name, recipe)
            assert repr(others) == repr(layer_values(want, name, recipe)), (recipe, name)
            if name.startswith(("avss", "na")):
                assert math.isnan(empty), (recipe, name)
        assert layer_values(rows, "rank", recipe)[3] is None
        assert layer_values(rows, "quality", recipe)[3] == "zero_sparsity"
        assert layer_values(rows, "lowest_set_probability", recipe)[3] == 0


def test_a_layer_with_no_whole_sequence_leaves_normalized_scores_to_the_others() -> None:
    x = activations(8)[0]
    x[1, :, 0, 0] = np.nan
    rows = score_run(stats_of(x[None])[0], LAYERS)
    assert np.isnan(layer_values(rows, "avss_normalized")).tolist() == [False, True, False, False]
    assert np.isnan(layer_values(rows, "avss_cumulative")).tolist() == [False, True, False, False]
    assert np.nansum(layer_values(rows, "avss_normalized")) == pytest.approx(1.0)
    assert layer_values(rows, "avss_cumulative")[3] == pytest.approx(1.0)
    assert sum(layer_values(rows, "avss_normalized", "element")) == pytest.approx(1.0)


def compared(seed: int = 0) -> tuple[Float64, Float64, Stats]:
    """A block's input and output, and the statistics of its block and update sites."""
    rng = np.random.default_rng(seed)
    before = rng.normal(size=(2, 5, 8))
    update = 0.3 * rng.normal(size=(2, 5, 8))
    after = before + update
    mask = np.ones((2, 5), bool)
    block = oracle_stats(after, mask, GRID, units=True, before=before)
    return before, after, {(0, "block"): block, (0, "update"): oracle_stats(update, mask, GRID, units=True)}


def test_rivals_are_their_papers_formulas() -> None:
    before, after, stats = compared()
    cosines = []
    magnitudes = []
    for token_before, token_after in zip(before.reshape(-1, 8), after.reshape(-1, 8), strict=True):
        norm_before = np.linalg.norm(token_before)
        norm_after = np.linalg.norm(token_after)
        cosines.append(token_before @ token_after / (norm_before * norm_after))
        magnitudes.append(np.linalg.norm(token_after - token_before) / norm_before)
    angles = [math.acos(cosine) / math.pi for cosine in cosines]
    want = {
        "block_influence": 1 - np.mean(cosines),
        "angular_distance": np.mean(angles),
        "relative_magnitude": np.mean(magnitudes),
        "update_variance_ratio": (after - before).var() / before.var(),
    }
    for row in score_run(stats, LAYERS[:1]):
        assert {name: row[name] for name in BASELINES} == pytest.approx(want, rel=1e-10)


@pytest.mark.parametrize(
    ("change", "undefined"),
    [
        ({"input_m2": 0.0}, {"update_variance_ratio"}),
        ({"token_count": 0, "input_count": 0}, set(BASELINES)),
        ("update", {"update_variance_ratio"}),
        ("block", set(BASELINES)),
    ],
)
def test_rivals_are_undefined_without_their_site_or_what_they_divide_by(change: Any, undefined: set[str]) -> None:
    _, _, stats = compared()
    if isinstance(change, dict):
        stats[0, "block"] = replace(stats[0, "block"], **change)
    else:
        stats.pop((0, change))
    for row in score_run(stats, LAYERS[:1]):
        assert {name for name in BASELINES if math.isnan(row[name])} == undefined


@settings(max_examples=50, derandomize=True)
@given(st.lists(st.tuples(st.integers(0, 200), st.floats(0, 1e12)), min_size=1, max_size=6))
def test_whatever_the_counts_columns_are_finite_or_nan_and_ranks_a_permutation(layers: list[tuple[int, float]]) -> None:
    near_zero, variance = zip(*layers, strict=True)
    columns = table_of(near_zero, 200, variance).score("element", PUBLISHED)
    for name, values in columns.items():
        if name.startswith("avss"):
            for value in values:
                assert not math.isinf(value)
    ranked = sorted(rank for rank in columns["rank"] if rank is not None)
    assert ranked == list(range(1, len(ranked) + 1))


USE = """
import json, sys
from avss_dist.stats import catalog

catalog.SCORES["distance"] = catalog.ScoreInfo(
    title="distance to the end", meaning="number of layers behind it", column="distance",
    definition="layers behind it", caption="The layers that come after.",
)
catalog.FROM_ACTIVATIONS += ("distance",)
catalog.BASELINES += ("distance",)

from avss_dist.stats import scores

computed = scores.layer_baselines
scores.layer_baselines = lambda stats, layer: computed(stats, layer) | {"distance": 3.0 - layer}

import avss_dist
from avss_dist.reports.page.page import report_page
from avss_dist.warehouse.reader import Warehouse

model, folder = sys.argv[1:]
sizes = {"sequence_length": 32, "max_sequences": 4, "sequences_per_shard": 2, "device": "cpu", "executor": "local"}
runs = [
    avss_dist.score(model, warehouse=folder, corpus="builtin:pydoc", skip_first_tokens=skipped, **sizes)
    for skipped in (0, 1)
]
warehouse = Warehouse(folder)
rows = runs[0].scores(site="block", recipe="pooled", threshold=1e-5).sort_by("layer").to_pylist()
page = report_page(warehouse)
compared = avss_dist.compare(warehouse=folder, score="distance", allow_mismatch=True)
print(json.dumps({
    "stored": [row["distance"] for row in rows],
    "dropped": avss_dist.plan(warehouse=folder, run=runs[0].run_id, by="distance", count=1).drop,
    "compared": compared.pairs["spearman"].to_pylist(),
    "drawn": 'data-chart="distance"' in page and "The layers that come after." in page,
}))
"""


@pytest.mark.nightly
def test_a_new_score_is_known_everywhere(tiny_llama: Path, tmp_path: Path) -> None:
    """In a process of its own, which registers it before anything reads the registry, as an entry there would."""
    (tmp_path / "use.py").write_text(USE)
    command = [sys.executable, tmp_path / "use.py", tiny_llama, tmp_path / "warehouse"]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == {
        "stored": [3.0, 2.0, 1.0],
        "dropped": [2],
        "compared": [1.0],
        "drawn": True,
    }
