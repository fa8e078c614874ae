"""Every finding: a synthetic case that has it, and one that has not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from support.command_line import avss, mistake
from support.oracle import Float64, oracle_stats
from support.rows import column, columns, mapping, where
from support.warehouses import GRID, SCALES, activations, stats_of, write_measured, write_profiles, write_scores

from avss_dist.analysis.findings import KINDS, OF_RANKINGS, SCHEMA, findings
from avss_dist.reports.terminal.scores import findings_list
from avss_dist.stats.scores import Threshold
from avss_dist.warehouse.reader import Warehouse

RECIPES = ("pooled", "element", "unit")


def found(root: Path, kind: str | None = None, **options: Any) -> list[dict[str, Any]]:
    table = findings(Warehouse(root), **options)
    assert table.schema.equals(SCHEMA)
    rows = table.to_pylist()
    if kind is None:
        return rows
    return where(rows, kind=kind)


def with_dominant_unit(x: Float64, layers: list[int]) -> Float64:
    """Return activations of which unit 5 carries the variance of some layers."""
    x = x.copy()
    x[:, layers, ..., 5] += 60.0
    return x


def with_few_small_elements(x: Float64) -> Float64:
    """Return activations without elements below 1e-5."""
    return np.where(np.abs(x) < 1e-5, 0.5, x)


def largest_share_of_a_unit(x: Float64) -> float:
    """Return the largest share of a layer's variance that a unit has."""
    units = x.swapaxes(0, 1).reshape(8, -1, 24)
    squares = (units - units.mean((1, 2), keepdims=True)) ** 2
    deviations = squares.sum(1)
    shares = deviations / deviations.sum(1, keepdims=True)
    return shares.max()


def of(tmp_path: Path, x: Float64, kind: str | None = None, before: Float64 | None = None) -> list[dict[str, Any]]:
    """Findings of a run with these activations."""
    write_measured(tmp_path, "tiny-1", stats_of(x, before=before), x.shape[1])
    return found(tmp_path, kind)


@pytest.mark.parametrize(
    ("order", "words"), [(1, "rises with depth (Spearman 1.000 over 8 layers)"), (-1, "falls with")]
)
def test_a_score_that_follows_depth(tmp_path: Path, order: int, words: str) -> None:
    scales = np.sort(SCALES)[::order]
    rows = of(tmp_path, activations(scales=scales.copy()))
    assert set(columns(rows, "kind", "severity", "site")) == {("tracks_depth", "warning", "block")}
    assert mapping(rows, "recipe", "value") == pytest.approx(dict.fromkeys(RECIPES, order))
    assert f"AVSS {words}" in rows[0]["message"]


def test_one_unit_that_carries_the_variance_of_few_layers(tmp_path: Path) -> None:
    x = with_dominant_unit(activations(), [1, 4])
    rows = of(tmp_path, x, "dominant_unit")
    assert mapping(rows, "recipe", "severity") == dict.fromkeys(RECIPES, "note")
    shares = mapping(rows, "recipe", "value")
    assert shares["element"] == pytest.approx(largest_share_of_a_unit(x))
    assert "in 2 of 8 layers (unit 5 carries 9" in rows[0]["message"]


def test_one_unit_that_carries_the_variance_of_most_layers(tmp_path: Path) -> None:
    rows = of(tmp_path, with_dominant_unit(activations(), [0, 1, 2, 3, 4]), "dominant_unit")
    assert set(column(rows, "severity")) == {"warning"}


def test_one_unit_that_carries_the_variance_but_has_the_mean_of_others(tmp_path: Path) -> None:
    x = activations()
    x[:, 1, ..., ::2, 5] = 60.0
    x[:, 1, ..., 1::2, 5] = -60.0
    rows = of(tmp_path, x, "dominant_unit")
    assert set(column(rows, "recipe")) == {"element"}


def write_with_first_tokens(root: Path, x: Float64) -> None:
    """Write a run whose statistics tell first tokens apart."""
    mask = np.ones(x.shape[2:4], bool)
    by_shard = []
    for shard in x:
        stats = {}
        for layer, values in enumerate(shard):
            stats[layer, "block"] = oracle_stats(values, mask, GRID, units=True, first_tokens=True)
        by_shard.append(stats)
    write_measured(root, "tiny-1", by_shard, 8)


def test_a_first_token_like_the_others(tmp_path: Path) -> None:
    write_with_first_tokens(tmp_path, activations())
    assert found(tmp_path, "first_token") == []


def test_the_first_token_that_carries_the_variance(tmp_path: Path) -> None:
    x = activations()
    x[..., 0, :] *= 50.0
    write_with_first_tokens(tmp_path, x)
    (row,) = found(tmp_path, "first_token")
    assert row["severity"] == "warning"
    assert row["recipe"] == "element"
    shares = []
    for layer in range(8):
        squares = (x[:, layer] - x[:, layer].mean()) ** 2
        shares.append(squares[:, :, 0].sum() / squares.sum())
    assert row["value"] == pytest.approx(max(shares))
    assert "in 8 of 8 layers" in row["message"]
    assert row["message"].endswith("leave it out: --skip-first-tokens 1.")


@pytest.mark.nightly
def test_runs_that_are_read_one_by_one_have_the_same_findings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_measured(tmp_path, "one", stats_of(with_dominant_unit(activations(), [1, 4])), 8)
    write_measured(tmp_path, "other", stats_of(activations(scales=np.sort(SCALES))), 8)
    together = found(tmp_path)
    assert {"dominant_unit", "tracks_depth"} <= set(column(together, "kind"))
    rankings = found(tmp_path, rankings_alone=True)
    assert rankings
    monkeypatch.setattr("avss_dist.analysis.findings.RUNS_AT_ONCE", 1)
    assert found(tmp_path) == together
    assert found(tmp_path, rankings_alone=True) == rankings


def test_sparsity_of_all_layers_that_is_noise(tmp_path: Path) -> None:
    x = with_few_small_elements(activations())
    x[:, 2:, 0, 0, 0] = 1e-7
    rows = of(tmp_path, x, "noisy_sparsity")
    of_recipes = columns(rows, "recipe", "severity", "value")
    assert set(of_recipes) == {("pooled", "warning", 1.0), ("element", "warning", 1.0)}
    assert "8 of 8 layers have fewer than 100 elements with |x| < 1e-05 (0 to 8 in a layer)" in rows[0]["message"]


def test_sparsity_of_one_layer_that_is_noise(tmp_path: Path) -> None:
    x = activations()
    x[:, 3] = with_few_small_elements(x[:, 3])
    rows = of(tmp_path, x, "noisy_sparsity")
    assert set(columns(rows, "severity", "value")) == {("note", 1 / 8)}


@pytest.mark.parametrize(
    ("site", "severity", "cause"), [("block", "warning", "rounding"), ("neuron", "note", "activation function")]
)
def test_exact_zeros(tmp_path: Path, site: str, severity: str, cause: str) -> None:
    """They are told where most of the small elements are zeros, not where a third of them are."""
    x = activations()
    is_small = np.abs(x) < 1e-5
    is_third = np.arange(24) % 3 == 0
    zeros = np.where(is_small, 0.0, x)
    tiny = np.where(is_small, 1e-7, x)
    write_measured(tmp_path, "zeros", stats_of(zeros, site), 8)
    write_measured(tmp_path, "tiny", stats_of(tiny, site), 8)
    write_measured(tmp_path, "third", stats_of(np.where(is_third, zeros, tiny), site), 8)
    rows = found(tmp_path, "exact_zeros")
    of_recipes = columns(rows, "run_id", "recipe", "value")
    assert set(of_recipes) == {("zeros", "pooled", 1.0), ("zeros", "element", 1.0)}
    assert set(column(rows, "severity")) == {severity}
    assert cause in rows[0]["message"]


def show(root: Path, *args: str) -> str:
    """Return what ``avss show`` prints, in one line."""
    return " ".join(avss("show", "-w", root, *args).stdout.split())


INTERVAL_COLUMNS = ["avss_low", "avss_high", "lowest_set_probability"]


def test_a_run_of_too_few_shards_has_no_interval_and_says_why(tmp_path: Path) -> None:
    rows = of(tmp_path, activations(shards=7))
    assert column(rows, "kind") == ["no_interval"]
    scores = Warehouse(tmp_path).scores(threshold=1e-5)
    for name in INTERVAL_COLUMNS:
        assert scores[name].null_count == scores.num_rows
    shown = show(tmp_path)
    assert "No interval: 7 shards, 8 are needed" in shown
    assert "95% interval" not in shown


def test_a_run_of_enough_shards_has_an_interval(tmp_path: Path) -> None:
    assert of(tmp_path, activations(shards=8)) == []
    scores = Warehouse(tmp_path).scores(threshold=1e-5).select(INTERVAL_COLUMNS)
    assert scores.drop_null().num_rows == scores.num_rows
    shown = show(tmp_path)
    assert "No interval: 7 shards, 8 are needed" not in shown
    assert "95% interval" in shown


def test_a_ranking_that_resampling_changes(tmp_path: Path) -> None:
    scales_of_shards = np.random.default_rng(0).normal(0, 0.3, (8, 8, 1, 1, 1))
    x = activations(scales=np.ones(8)) * np.exp(scales_of_shards)
    rows = of(tmp_path, x, "unstable_ranking")
    assert set(column(rows, "recipe")) == set(RECIPES)
    scores = Warehouse(tmp_path).scores(recipe="element", threshold=1e-5).to_pylist()
    lowest, second, third, *_ = sorted(scores, key=lambda score: score["rank"])
    (row,) = where(rows, recipe="element")
    probability = (lowest["lowest_set_probability"] + second["lowest_set_probability"]) / 2
    assert row["value"] == pytest.approx(1 - probability)
    assert row["severity"] == ("warning" if row["value"] > 0.25 else "note")
    assert "may or may not be among them" in row["message"]
    assert second["avss_high"] > third["avss_low"]
    assert f"(the intervals of layers {second['layer']} and {third['layer']} overlap)" in row["message"]


def test_recipes_that_disagree(tmp_path: Path) -> None:
    order = np.array([3.0, 1.0, 2.0, 5.0, 4.0, 8.0, 6.0, 7.0])
    shared = {("block", "pooled", 1e-5): order, ("block", "element", 1e-5): 9 - order}
    write_profiles(tmp_path, "apart", shared)
    (row,) = found(tmp_path, "recipes_disagree")
    assert row["site"] == "block"
    assert row["recipe"] is None
    assert row["severity"] == "warning"
    assert row["value"] == pytest.approx(-1)
    assert "'element' and 'pooled' rank the layers differently (Spearman -1.00)" in row["message"]
    write_profiles(tmp_path, "alike", dict.fromkeys(shared, order))
    assert set(column(found(tmp_path, "recipes_disagree"), "run_id")) == {"apart"}


def test_a_healthy_run_has_no_finding(tmp_path: Path) -> None:
    x = activations()
    assert of(tmp_path, x, before=0.8 * x) == []


@pytest.mark.parametrize("largest", [0.0, 1e-5])
def test_layers_that_give_out_what_they_take_in(tmp_path: Path, largest: float) -> None:
    x = activations()
    before = 0.8 * x
    before[:, [2, 3]] = x[:, [2, 3]]
    before[:, 6] = x[:, 6] / (1 + largest)
    (row,) = of(tmp_path, x, "identity_layer", before)
    assert row["severity"] == "warning"
    assert row["site"] is None
    assert row["value"] == pytest.approx(largest, rel=1e-3)
    assert row["message"].startswith("Layers 2-3, 6 give out what they take in")


@pytest.fixture(scope="module")
def two_noisy_runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of which all layers have few elements below 1e-5. Not to be changed."""
    warehouse = tmp_path_factory.mktemp("noisy")
    stats = stats_of(with_few_small_elements(activations()))
    write_measured(warehouse, "a", stats, 8)
    write_measured(warehouse, "b", stats, 8)
    return warehouse


@pytest.mark.parametrize(
    ("chosen", "expected"), [({}, {"a", "b"}), ({"run_ids": ["b"]}, {"b"}), ({"run_ids": ["nobody"]}, set())]
)
def test_the_runs_are_chosen(two_noisy_runs: Path, chosen: dict[str, Any], expected: set[str]) -> None:
    rows = found(two_noisy_runs, **chosen)
    assert set(column(rows, "run_id")) == expected


def test_the_threshold_is_chosen(two_noisy_runs: Path) -> None:
    published = found(two_noisy_runs, "noisy_sparsity")
    assert set(column(published, "value")) == {1.0}
    coarse = found(two_noisy_runs, "noisy_sparsity", threshold=Threshold(value=1e-1, kind="absolute"))
    for row in coarse:
        assert row["value"] < 1
        assert row["threshold"] == 0.1


def place_in_list(row: dict[str, Any]) -> tuple[bool, bool]:
    """Return whether a finding is a note, and whether it is of another place than the default."""
    is_default = row["site"] == "block" and row["recipe"] == "pooled"
    return (row["severity"] == "note", not is_default)


def test_warnings_come_before_notes_and_the_defaults_before_the_rest(tmp_path: Path) -> None:
    x = with_dominant_unit(activations(scales=np.sort(SCALES)), [1, 4])
    x[np.abs(x) < 1e-5] = 0.0
    rows = of(tmp_path, x)
    assert rows == sorted(rows, key=place_in_list)
    assert rows[0]["kind"] == "exact_zeros"
    assert set(column(rows, "kind")) <= set(KINDS)


@pytest.mark.parametrize(("site", "recipe"), [("block", "element"), ("update", "pooled")])
def test_a_place_has_its_findings_and_those_of_all_places(tmp_path: Path, site: str, recipe: str) -> None:
    x = with_dominant_unit(activations(scales=np.sort(SCALES)), [1, 4])
    rows = of(tmp_path, x, before=x)
    assert set(column(rows, "site")) == {None, "block", "update"}
    of_site = [row for row in rows if row["site"] in (None, site)]
    of_place = [row for row in of_site if row["recipe"] in (None, recipe)]
    of_rankings = [row for row in of_place if OF_RANKINGS.get(row["kind"]) is not None]
    assert found(tmp_path, site=site) == of_site
    assert found(tmp_path, site=site, recipe=recipe) == of_place
    assert found(tmp_path, site=site, recipe=recipe, rankings_alone=True) == of_rankings


def test_the_same_finding_of_several_runs_is_told_once(tmp_path: Path) -> None:
    stats = stats_of(activations(scales=np.sort(SCALES)))
    for run_id in ("a", "b"):
        write_measured(tmp_path, run_id, stats, 8)
    text = in_words(tmp_path)
    assert text.count("tracks depth") == 1
    assert "pooled, element, unit" in text


@pytest.mark.parametrize(("number", "are_counted"), [(3, False), (5, True)])
def test_like_findings_of_several_runs_are_counted(tmp_path: Path, number: int, are_counted: bool) -> None:
    for i in range(1, number + 1):
        rising = list(range(8, 22))
        rising[:i] = reversed(rising[:i])  # and the correlation with depth is another one of each
        write_scores(tmp_path, f"run-{i}", rising)
    messages = column(found(tmp_path, "tracks_depth"), "message")
    assert len(set(messages)) == number
    text = in_words(tmp_path)
    assert text.count("tracks depth") == 1
    assert ("and 2 more" in text) == are_counted
    assert ("--format csv" in text) == are_counted


def in_words(root: Path) -> str:
    console = Console(width=140)
    with console.capture() as capture:
        console.print(findings_list(findings(Warehouse(root))))
    return capture.get()


@pytest.fixture(scope="module")
def no_numbers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of which layers 3 and 5 have activations that are no numbers. Not to be changed."""
    warehouse = tmp_path_factory.mktemp("no-numbers")
    x = activations()
    x[:, 3, :, 1:] = np.nan
    x[0, 5, 0, 0, 0] = np.inf
    write_measured(warehouse, "tiny-1", stats_of(x), 8)
    return warehouse


def test_activations_that_are_no_numbers(no_numbers: Path) -> None:
    """Every other statistic leaves them out: a layer of which little is left must not be ranked by that."""
    (row,) = found(no_numbers, "nonfinite")
    assert row["severity"] == "warning"
    assert row["site"] == "block"
    assert row["recipe"] is None
    assert row["value"] == pytest.approx(7 / 8)
    assert row["message"].startswith("Layers 3, 5 have NaN or infinite activations")


@pytest.mark.parametrize("recipe", RECIPES)
def test_layers_with_activations_that_are_no_numbers_have_no_rank(no_numbers: Path, recipe: str) -> None:
    scores = Warehouse(no_numbers).scores(recipe=recipe, threshold=1e-5)
    ranks = scores["rank"].drop_null().to_pylist()
    assert sorted(ranks) == [1, 2, 3, 4, 5, 6]
    unranked = where(scores.to_pylist(), rank=None)
    assert columns(unranked, "layer", "lowest_set_probability") == [(3, 0.0), (5, 0.0)]


def test_layers_with_activations_that_are_no_numbers_have_no_rank_in_sql(no_numbers: Path) -> None:
    rows = Warehouse(no_numbers).sql("SELECT layer, recipe, rank FROM scores_at(1e-5)").to_pylist()
    assert column(where(rows, rank=None), "layer") == [3, 5] * 3


def test_the_commands_say_which_layers_have_no_rank(no_numbers: Path, tmp_path: Path) -> None:
    assert "layers 3, 5: they have no rank" in show(no_numbers, "--recipe", "element")
    plan = ("--by", "avss", "--recipe", "element", "-o", tmp_path / "plan.yaml")
    assert "Layers 3, 5 have no score 'avss'" in mistake("plan", "-w", no_numbers, *plan)
