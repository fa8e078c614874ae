"""Scores: AVSS by recipe, ranks, relative thresholds, intervals and rivals, against the raw activations."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
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
        m2 = float(number * spread)
        stats.append(replace(zero, near_zero=np.array([below]), count=int(number), m2=m2))
    return SiteTable(stats)


def paper_avss(variance: Float64, sparsity: Float64) -> dict[str, Float64]:
    """arXiv 2411.02117, section 3."""
    nav = variance / variance.sum()
    nas = sparsity / sparsity.sum()
    return {"variance": variance, "sparsity": sparsity, "nav": nav, "nas": nas, "avss": nav / nas}


def sparsity_of(values: Float64, threshold: float) -> float:
    """Return the share of values that are near zero."""
    is_near_zero = np.abs(values) < threshold
    return is_near_zero.mean()


def measure_pooled(x: Float64, threshold: float) -> tuple[float, float]:
    variances = x.mean(1).var(1, ddof=1)
    return variances.mean(), sparsity_of(x, threshold)


def measure_element(x: Float64, threshold: float) -> tuple[float, float]:
    return x.var(), sparsity_of(x, threshold)


def measure_unit(x: Float64, threshold: float) -> tuple[float, float]:
    means = x.mean((0, 1))
    return means.var(), sparsity_of(means, threshold)


MEASURES = {"pooled": measure_pooled, "element": measure_element, "unit": measure_unit}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("recipe", MEASURES)
def test_avss_is_the_papers_formula_on_the_activations(recipe: str, seed: int) -> None:
    x = activations(seed)
    rows = score_run(merge_stats(stats_of(x)), LAYERS)
    sequences = x.swapaxes(0, 1).reshape(4, -1, *x.shape[3:])
    measured = np.array([MEASURES[recipe](layer, 1e-1) for layer in sequences])
    variance, sparsity = measured.T
    for name, want in paper_avss(variance, sparsity).items():
        np.testing.assert_allclose(layer_values(rows, name, recipe), want, rtol=1e-10, err_msg=name)


def test_literal_avss_is_undefined_exactly_where_nothing_is_near_zero() -> None:
    """Each layer has a fifth of the variance, and 5 or 10 of the 20 elements that are near zero."""
    scored = table_of([0, 5, 10, 0, 5]).score("element", PUBLISHED)
    expected = [math.nan, 0.8, 0.4, math.nan, 0.8]
    assert scored["avss"] == pytest.approx(expected, nan_ok=True)
    assert not np.isnan(scored["avss_smoothed"]).any()


def test_avss_is_of_shares_of_elements_also_where_layers_have_other_numbers() -> None:
    variance = np.array([1.0, 2.0, 5.0])
    scored = table_of([5, 10, 400], [100, 1000, 2000], variance).score("element", PUBLISHED)
    want = paper_avss(variance, np.array([0.05, 0.01, 0.2]))
    for name in ("sparsity", "nav", "nas", "avss"):
        assert scored[name] == pytest.approx(want[name].tolist(), rel=1e-12), name


def test_one_element_is_enough_for_a_share() -> None:
    near_zero = np.array([1.0, 5.0])
    count = np.array([1.0, 10.0])
    scores_of_layers = avss(np.array([1.0, 3.0]), near_zero, count, smoothed=False)
    assert scores_of_layers == pytest.approx([0.25 / (1 / 1.5), 0.75 / (0.5 / 1.5)], rel=1e-12)


def test_a_layer_without_elements_has_no_score() -> None:
    near_zero = np.array([0.0, 5.0])
    count = np.array([0.0, 10.0])
    nothing, something = avss(np.ones(2), near_zero, count, smoothed=True)
    assert np.isnan(nothing)
    assert np.isfinite(something)


def test_shares_of_nothing_are_not_a_number_and_no_warning(recwarn: pytest.WarningsRecorder) -> None:
    of_zeros = share(np.zeros((2, 3)))
    assert np.isnan(of_zeros).all()
    of_nan = share(np.array([np.nan, np.nan]))
    assert np.isnan(of_nan).all()
    of_some = share(np.array([1.0, np.nan, 3.0]))
    assert of_some.tolist() == pytest.approx([0.25, np.nan, 0.75], nan_ok=True)
    assert not recwarn.list


def test_a_unit_at_the_threshold_is_not_near_zero() -> None:
    means = np.array([0.5, -0.5, 0.25, 1.5])
    stats = replace(LayerStats.zero((0.5,)), unit_count=2, unit_sum=2 * means)
    scored = SiteTable([stats]).score("unit", Threshold(value=0.5, kind="absolute"))
    assert scored["near_zero_count"] == [1.0]
    assert scored["count"] == [4]
    assert scored["variance"] == pytest.approx([means.var()], rel=1e-12)


def test_smoothed_avss_adds_half_a_count() -> None:
    variance = np.array([1.0, 2.0, 5.0])
    scored = table_of([0, 5, 10], [9, 99, 999], variance).score("element", PUBLISHED)
    want = paper_avss(variance, np.array([0.5 / 10, 5.5 / 100, 10.5 / 1000]))
    assert scored["avss_smoothed"] == pytest.approx(want["avss"].tolist(), rel=1e-12)


def test_quality_says_how_many_were_near_zero() -> None:
    scored = table_of([0, 1, 99, 100, 500]).score("element", PUBLISHED)
    assert scored["quality"] == ["zero_sparsity", "noisy_sparsity", "noisy_sparsity", "ok", "ok"]


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
    scored = table_of([0, 5, 10], variance=[1.0, 2.0, 0.1]).score("element", PUBLISHED)
    assert scored["rank"] == [3, 2, 1]
    for rank in scored["rank"]:
        assert type(rank) is int


def test_normalized_scores_are_undefined_where_one_layer_has_nothing_near_zero() -> None:
    scored = table_of([0, 5, 10], variance=[1.0, 2.0, 0.1]).score("element", PUBLISHED)
    assert np.isnan(scored["avss_normalized"]).all()
    assert np.isnan(scored["avss_cumulative"]).all()


def test_scores_from_activations_are_columns() -> None:
    assert [SCORES[name].column for name in FROM_ACTIVATIONS] == ["avss_smoothed", *BASELINES]


@pytest.mark.parametrize(("layers", "lowest"), [(30, 8), (18, 4), (4, 1), (1, 1), (32, 8), (22, 6)])
def test_the_lowest_quarter_is_rounded_half_to_even_and_never_nothing(layers: int, lowest: int) -> None:
    assert count_lowest(layers) == lowest


@pytest.mark.parametrize("recipe", MEASURES)
def test_normalized_scores_sum_to_one_and_cumulate(recipe: str) -> None:
    rows = score_run(merge_stats(stats_of(activations())), LAYERS)
    scores = np.array(layer_values(rows, "avss", recipe))
    normalized = np.array(layer_values(rows, "avss_normalized", recipe))
    cumulative = np.array(layer_values(rows, "avss_cumulative", recipe))
    np.testing.assert_allclose(normalized, scores / scores.sum(), rtol=1e-12)
    np.testing.assert_allclose(cumulative, normalized.cumsum(), rtol=1e-12)
    assert cumulative[-1] == pytest.approx(1.0, rel=1e-12)


@pytest.fixture(scope="module")
def two_sites() -> dict[LayerKey, LayerStats]:
    """Merged statistics of a block site with means of units, and of an MLP site without."""
    x = activations()
    return merge_stats([*stats_of(x), *stats_of(x, "mlp", units=False)])


def test_one_row_for_each_layer_site_recipe_and_threshold(two_sites: dict[LayerKey, LayerStats]) -> None:
    rows = score_run(two_sites, LAYERS)
    thresholds = [(t, "absolute") for t in GRID] + [(t, "rms") for t in RELATIVE_THRESHOLDS]
    recipes = [("block", "pooled"), ("block", "element"), ("block", "unit"), ("mlp", "pooled"), ("mlp", "element")]
    expected = []
    for site, recipe in recipes:
        for threshold, kind in thresholds:
            expected += [(layer, site, recipe, threshold, kind) for layer in range(4)]
    places = columns(rows, "layer", "site", "recipe", "threshold", "threshold_kind")
    assert sorted(places) == sorted(expected)


def test_rows_have_the_place_of_their_layer(two_sites: dict[LayerKey, LayerStats]) -> None:
    rows = score_run(two_sites, LAYERS)
    assert column(rows[:4], "depth") == [0.125, 0.375, 0.625, 0.875]
    assert column(rows[:4], "layer_name") == list(LAYERS)


def test_rows_have_the_columns_of_their_table(two_sites: dict[LayerKey, LayerStats]) -> None:
    rows = score_run(two_sites, LAYERS)
    schema = pa.schema([field for field in SCHEMAS["scores"] if field.name not in IDENTITY])
    for row in rows:
        assert row.keys() == set(schema.names)
    assert pa.Table.from_pylist(rows, schema).num_rows == len(rows)


@pytest.mark.parametrize(
    ("sites", "scored"), [(None, {"block", "mlp"}), (["mlp"], {"mlp"}), (["mlp", "update"], {"mlp"}), ([], set())]
)
def test_sites_are_chosen(two_sites: dict[LayerKey, LayerStats], sites: list[str] | None, scored: set[str]) -> None:
    rows = score_run(two_sites, LAYERS, sites=sites)
    assert set(column(rows, "site")) == scored


@pytest.mark.parametrize("multiple", RELATIVE_THRESHOLDS)
def test_relative_thresholds_count_within_a_percent(multiple: float) -> None:
    scales = np.array([0.01, 1, 300])
    rng = np.random.default_rng(0)
    x = rng.normal(0.5, 1.0, (1, 3, 16, 128, 128)) * scales[:, None, None, None]
    x = x.astype(np.float32).astype(np.float64)
    (stats,) = stats_of(x)
    rows = score_run(stats, LAYERS[:3])
    direct = []
    for layer in x[0]:
        rms = np.sqrt((layer**2).mean())
        direct.append(sparsity_of(layer, multiple * rms))
    assert layer_values(rows, "sparsity", threshold=multiple, kind="rms") == pytest.approx(direct, rel=0.01)


@pytest.mark.parametrize("recipe", MEASURES)
def test_lowest_set_probabilities_sum_to_the_size_of_the_set(recipe: str) -> None:
    shards = stats_of(activations(3, shards=8, layers=9, last=0.51))
    rows = score_run(merge_stats(shards), [str(i) for i in range(9)], shards)
    probabilities = layer_values(rows, "lowest_set_probability", recipe)
    assert sum(probabilities) == pytest.approx(count_lowest(9), rel=1e-12)
    assert min(probabilities) >= 0
    assert max(probabilities) <= 1
    assert any(0 < probability < 1 for probability in probabilities)


@pytest.mark.parametrize("offset", [0.0, 1e4], ids=["centered", "large offset"])
@pytest.mark.parametrize("recipe", MEASURES)
def test_intervals_equal_merging_the_shards_again(monkeypatch: pytest.MonkeyPatch, recipe: str, offset: float) -> None:
    """By the jackknife over the other shards, and by the share of drawn shards."""
    for module in (intervals, scores):
        monkeypatch.setattr(module, "BOOTSTRAP_RESAMPLES", 6)
    shards = stats_of(activations(4, shards=8, offset=offset, last=0.5))
    by_shard = [list(shard.values()) for shard in shards]
    table = SiteTable(list(merge_stats(shards).values()), by_shard)
    assert table.weights is not None
    assert (table.weights.sum(1) == [8] * 6 + [7] * 8).all()
    threshold = Threshold(value=1e-1, kind="absolute")
    scored = table.score(recipe, threshold)
    scores_of_draws = []
    for weights in table.weights:
        drawn: list[Mapping[LayerKey, LayerStats]] = []
        for shard, times in zip(shards, weights, strict=True):
            drawn += [shard] * int(times)
        merged = SiteTable(list(merge_stats(drawn).values()))
        scores_of_draws.append(merged.score(recipe, threshold)["avss_smoothed"])
    scores_of_merged = np.array(scores_of_draws)
    low, high = jackknife_interval(scored["avss_smoothed"], scores_of_merged[6:], scale="log")
    if recipe != "unit":
        enough = np.array(scored["near_zero_count"]) >= 5
        low = np.where(enough, low, np.nan)
        high = np.where(enough, high, np.nan)
    np.testing.assert_allclose(scored["avss_low"], low, rtol=1e-7)
    np.testing.assert_allclose(scored["avss_high"], high, rtol=1e-7)
    lowest_of_draws = scores_of_merged[:6].argmin(1)
    assert scored["lowest_set_probability"] == pytest.approx(np.bincount(lowest_of_draws, minlength=4) / 6)


def without_place(rows: Rows, layer: int) -> list[dict[str, Any]]:
    """Return the rows of a layer, without what says which layer it is."""
    of_layer = []
    for row in where(rows, layer=layer):
        of_layer.append({name: value for name, value in row.items() if name not in PLACE})
    return of_layer


def test_a_site_that_only_some_layers_have_is_scored_over_those() -> None:
    shards = stats_of(activations(5, layers=2), "neuron", units=False)
    sparse = [{(1, "neuron"): shard[0, "neuron"], (3, "neuron"): shard[1, "neuron"]} for shard in shards]
    dense_rows = score_run(merge_stats(shards), LAYERS[:2], shards)
    sparse_rows = score_run(merge_stats(sparse), LAYERS, sparse)
    places = columns(sparse_rows, "layer", "layer_name", "depth")
    assert set(places) == {(1, LAYERS[1], 0.375), (3, LAYERS[3], 0.875)}
    assert repr(without_place(sparse_rows, 1)) == repr(without_place(dense_rows, 0))
    assert repr(without_place(sparse_rows, 3)) == repr(without_place(dense_rows, 1))


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
    ends = columns(where(rows, threshold=1e-1), "avss_low", "avss_high")
    assert np.isfinite(ends).all()


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
    (stats,) = stats_of(x[None])
    rows = score_run(stats, LAYERS)
    normalized = layer_values(rows, "avss_normalized")
    assert np.isnan(normalized).tolist() == [False, True, False, False]
    assert np.nansum(normalized) == pytest.approx(1.0)
    cumulative = layer_values(rows, "avss_cumulative")
    assert np.isnan(cumulative).tolist() == [False, True, False, False]
    assert cumulative[3] == pytest.approx(1.0)
    assert sum(layer_values(rows, "avss_normalized", "element")) == pytest.approx(1.0)


def compared(seed: int = 0) -> tuple[Float64, Float64, Stats]:
    """A block's input and output, and the statistics of its block and update sites."""
    rng = np.random.default_rng(seed)
    before = rng.normal(size=(2, 5, 8))
    update = 0.3 * rng.normal(size=(2, 5, 8))
    after = before + update
    mask = np.ones((2, 5), bool)
    of_block = oracle_stats(after, mask, GRID, units=True, before=before)
    of_update = oracle_stats(update, mask, GRID, units=True)
    return before, after, {(0, "block"): of_block, (0, "update"): of_update}


def test_rivals_are_their_papers_formulas() -> None:
    before, after, stats = compared()
    cosines = []
    magnitudes = []
    for token_before, token_after in zip(before.reshape(-1, 8), after.reshape(-1, 8), strict=True):
        norm_before = np.linalg.norm(token_before)
        norm_after = np.linalg.norm(token_after)
        cosines.append(token_before @ token_after / (norm_before * norm_after))
        magnitudes.append(np.linalg.norm(token_after - token_before) / norm_before)
    angles = np.arccos(cosines) / math.pi
    want = {
        "block_influence": 1 - np.mean(cosines),
        "angular_distance": angles.mean(),
        "relative_magnitude": np.mean(magnitudes),
        "update_variance_ratio": (after - before).var() / before.var(),
    }
    assert want.keys() == set(BASELINES)
    for row in score_run(stats, LAYERS[:1]):
        for name, value in want.items():
            assert row[name] == pytest.approx(value, rel=1e-10), name


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
        for name in BASELINES:
            assert math.isnan(row[name]) == (name in undefined), name


@settings(max_examples=50, derandomize=True)
@given(st.lists(st.tuples(st.integers(0, 200), st.floats(0, 1e12)), min_size=1, max_size=6))
def test_whatever_the_counts_columns_are_finite_or_nan_and_ranks_a_permutation(layers: list[tuple[int, float]]) -> None:
    near_zero, variance = zip(*layers, strict=True)
    scored = table_of(near_zero, 200, variance).score("element", PUBLISHED)
    for name, values in scored.items():
        if name.startswith("avss"):
            assert not np.isinf(values).any(), name
    ranked = sorted(rank for rank in scored["rank"] if rank is not None)
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
    known = json.loads(done.stdout.splitlines()[-1])
    assert known["stored"] == [3.0, 2.0, 1.0]
    assert known["dropped"] == [2]
    assert known["compared"] == [1.0]
    assert known["drawn"] is True
