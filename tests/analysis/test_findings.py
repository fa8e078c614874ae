"""Every finding: a synthetic case that has it, and one that has not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from support.command_line import avss
from support.oracle import Float64, oracle_stats
from support.warehouses import GRID, SCALES, activations, stats_of, write_measured, write_profiles, write_scores

from avss_dist.analysis.findings import KINDS, OF_RANKINGS, SCHEMA, findings
from avss_dist.reports.terminal.scores import findings_list
from avss_dist.stats.scores import Threshold
from avss_dist.warehouse.reader import Warehouse


def found(root: Path, kind: str | None = None, **options: Any) -> list[dict[str, Any]]:
    table = findings(Warehouse(root), **options)
    assert table.schema.equals(SCHEMA)
    return [row for row in table.to_pylist() if kind in (None, row["kind"])]


def of(tmp_path: Path, x: Float64, kind: str | None = None, before: Float64 | None = None) -> list[dict[str, Any]]:
    """Findings of a run with these activations."""
    write_measured(tmp_path, "tiny-1", stats_of(x, before=before), x.shape[1])
    return found(tmp_path, kind)


@pytest.mark.parametrize(
    ("order", "words"), [(1, "rises with depth (Spearman 1.000 over 8 layers)"), (-1, "falls with")]
)
def test_a_score_that_follows_depth(tmp_path: Path, order: int, words: str) -> None:
    rows = of(tmp_path, activations(scales=np.sort(SCALES)[::order].copy()))
    assert {(r["kind"], r["severity"], r["site"]) for r in rows} == {("tracks_depth", "warning", "block")}
    assert {r["recipe"]: r["value"] for r in rows} == pytest.approx(dict.fromkeys(("pooled", "element", "unit"), order))
    assert f"AVSS {words}" in rows[0]["message"]


def test_one_unit_that_carries_the_variance(tmp_path: Path) -> None:
    """Of few layers it is a note, of most a warning."""
    x = activations()
    x[:, [1, 4], ..., 5] += 60.0
    rows = of(tmp_path / "two", x, "dominant_unit")
    assert {(r["recipe"], r["severity"]) for r in rows} == {(name, "note") for name in ("pooled", "element", "unit")}
    units = x.swapaxes(0, 1).reshape(8, -1, 24)
    deviations = ((units - units.mean((1, 2), keepdims=True)) ** 2).sum(1)
    share = (deviations / deviations.sum(1, keepdims=True)).max()
    assert next(r["value"] for r in rows if r["recipe"] == "element") == pytest.approx(share)
    assert "in 2 of 8 layers (unit 5 carries 9" in rows[0]["message"]
    x[:, [0, 2, 3], ..., 5] += 60.0
    assert {r["severity"] for r in of(tmp_path / "five", x, "dominant_unit")} == {"warning"}
    x = activations()
    x[:, 1, ..., ::2, 5], x[:, 1, ..., 1::2, 5] = 60.0, -60.0  # its mean is that of others
    assert {r["recipe"] for r in of(tmp_path / "without a mean", x, "dominant_unit")} == {"element"}


@pytest.mark.parametrize("size", [1.0, 50.0])
def test_the_first_token_that_carries_the_variance(tmp_path: Path, size: float) -> None:
    x = activations()
    x[..., 0, :] *= size
    options: dict[str, Any] = {"units": True, "first_tokens": True}
    mask = np.ones(x.shape[2:4], bool)
    by_shard = [
        {(i, "block"): oracle_stats(values, mask, GRID, **options) for i, values in enumerate(shard)} for shard in x
    ]
    write_measured(tmp_path, "tiny-1", by_shard, 8)
    rows = found(tmp_path, "first_token")
    if size == 1:
        assert rows == []
        return
    (row,) = rows
    assert (row["severity"], row["recipe"]) == ("warning", "element")
    shares = []
    for layer in range(8):
        squares = (x[:, layer] - x[:, layer].mean()) ** 2
        shares.append(squares[:, :, 0].sum() / squares.sum())
    assert row["value"] == pytest.approx(max(shares))
    assert "in 8 of 8 layers" in row["message"]
    assert row["message"].endswith("leave it out: --skip-first-tokens 1.")


def test_runs_that_are_read_one_by_one_have_the_same_findings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    x = activations()
    x[:, [1, 4], ..., 5] += 60.0
    write_measured(tmp_path, "one", stats_of(x), 8)
    write_measured(tmp_path, "other", stats_of(activations(scales=np.sort(SCALES))), 8)
    together = found(tmp_path)
    assert {"dominant_unit", "tracks_depth"} <= {row["kind"] for row in together}
    rankings = found(tmp_path, rankings_alone=True)
    assert rankings
    monkeypatch.setattr("avss_dist.analysis.findings.RUNS_AT_ONCE", 1)
    assert found(tmp_path) == together
    assert found(tmp_path, rankings_alone=True) == rankings


def test_sparsity_that_is_noise(tmp_path: Path) -> None:
    """Of one layer it is a note, of most a warning."""
    x = activations()
    x[np.abs(x) < 1e-5] = 0.5
    x[:, 2:, 0, 0, 0] = 1e-7
    rows = of(tmp_path / "all", x, "noisy_sparsity")
    assert {(r["recipe"], r["severity"], r["value"]) for r in rows} == {
        (r, "warning", 1.0) for r in ("pooled", "element")
    }
    assert "8 of 8 layers have fewer than 100 elements with |x| < 1e-05 (0 to 8 in a layer)" in rows[0]["message"]
    x = activations()
    x[:, 3][np.abs(x[:, 3]) < 1e-5] = 0.5
    assert {(r["severity"], r["value"]) for r in of(tmp_path / "one", x, "noisy_sparsity")} == {("note", 1 / 8)}


@pytest.mark.parametrize("site", ["block", "neuron"])
def test_exact_zeros(tmp_path: Path, site: str) -> None:
    x = activations()
    small = np.abs(x) < 1e-5
    for tiny in (0.0, 1e-7):
        x[small] = tiny
        write_measured(tmp_path, f"tiny-{tiny}", stats_of(x, site), 8)
    x[small & (np.arange(24) % 3 == 0)] = 0.0
    write_measured(tmp_path, "third", stats_of(x, site), 8)
    rows = found(tmp_path, "exact_zeros")
    assert {(r["run_id"], r["recipe"], r["value"]) for r in rows} == {
        ("tiny-0.0", recipe, 1.0) for recipe in ("pooled", "element")
    }
    assert {r["severity"] for r in rows} == {"warning" if site == "block" else "note"}
    assert ("rounding" if site == "block" else "activation function") in rows[0]["message"]


@pytest.mark.parametrize("shards", [7, 8])
def test_a_run_of_too_few_shards_has_no_interval_and_says_why(tmp_path: Path, shards: int) -> None:
    found = of(tmp_path, activations(shards=shards))
    assert [row["kind"] for row in found] == ["no_interval"] * (shards < 8)
    scores = Warehouse(tmp_path).scores(threshold=1e-5)
    for name in ("avss_low", "avss_high", "lowest_set_probability"):
        assert scores[name].null_count == (scores.num_rows if shards < 8 else 0)
    shown = " ".join(avss("show", "-w", tmp_path).stdout.split())
    assert ("No interval: 7 shards, 8 are needed" in shown) == (shards < 8)
    assert ("95% interval" in shown) == (shards == 8)


def test_a_ranking_that_resampling_changes(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    x = activations(scales=np.ones(8)) * np.exp(rng.normal(0, 0.3, (8, 8, 1, 1, 1)))
    rows = of(tmp_path, x, "unstable_ranking")
    assert {r["recipe"] for r in rows} == {"pooled", "element", "unit"}
    scores = Warehouse(tmp_path).scores(recipe="element", threshold=1e-5).to_pylist()
    chosen = [s["lowest_set_probability"] for s in scores if s["rank"] <= 2]
    (row,) = (r for r in rows if r["recipe"] == "element")
    assert row["value"] == pytest.approx(1 - np.mean(chosen))
    assert row["severity"] == ("warning" if row["value"] > 0.25 else "note")
    assert "may or may not be among them" in row["message"]
    last, first = (next(s for s in scores if s["rank"] == rank) for rank in (2, 3))
    assert last["avss_high"] > first["avss_low"]
    assert f"(the intervals of layers {last['layer']} and {first['layer']} overlap)" in row["message"]


def test_recipes_that_disagree(tmp_path: Path) -> None:
    order = np.array([3.0, 1.0, 2.0, 5.0, 4.0, 8.0, 6.0, 7.0])
    shared = {("block", "pooled", 1e-5): order, ("block", "element", 1e-5): 9 - order}
    write_profiles(tmp_path, "apart", shared)
    (row,) = found(tmp_path, "recipes_disagree")
    assert (row["site"], row["recipe"], row["severity"]) == ("block", None, "warning")
    assert row["value"] == pytest.approx(-1)
    assert "'element' and 'pooled' rank the layers differently (Spearman -1.00)" in row["message"]
    write_profiles(tmp_path, "alike", dict.fromkeys(shared, order))
    assert {r["run_id"] for r in found(tmp_path, "recipes_disagree")} == {"apart"}


def test_layers_that_give_out_what_they_take_in(tmp_path: Path) -> None:
    x = activations()
    before = 0.8 * x
    assert of(tmp_path, x, before=before) == [], "a healthy run has no finding"
    before[:, [2, 3, 6]] = x[:, [2, 3, 6]]
    for largest in (0.0, 1e-5):
        before[:, 6] = x[:, 6] / (1 + largest)
        (row,) = of(tmp_path, x, "identity_layer", before)
        assert (row["severity"], row["site"]) == ("warning", None)
        assert row["value"] == pytest.approx(largest, rel=1e-3)
        assert row["message"].startswith("Layers 2-3, 6 give out what they take in")


def test_the_threshold_and_the_runs_are_chosen(tmp_path: Path) -> None:
    x = activations()
    x[np.abs(x) < 1e-5] = 0.5
    write_measured(tmp_path, "a", stats_of(x), 8)
    write_measured(tmp_path, "b", stats_of(x), 8)
    assert {r["run_id"] for r in found(tmp_path)} == {"a", "b"}
    assert {r["run_id"] for r in found(tmp_path, run_ids=["b"])} == {"b"}
    assert found(tmp_path, run_ids=["nobody"]) == []
    assert {r["value"] for r in found(tmp_path, "noisy_sparsity")} == {1.0}
    coarse = found(tmp_path, "noisy_sparsity", threshold=Threshold(value=1e-1, kind="absolute"))
    assert all(r["value"] < 1 and r["threshold"] == 0.1 for r in coarse)


def test_warnings_come_before_notes_and_the_defaults_before_the_rest(tmp_path: Path) -> None:
    x = activations(scales=np.sort(SCALES))
    x[:, [1, 4], ..., 5] += 60.0
    x[np.abs(x) < 1e-5] = 0.0
    rows = of(tmp_path, x)
    order = [(r["severity"] == "note", (r["site"], r["recipe"]) != ("block", "pooled")) for r in rows]
    assert order == sorted(order)
    assert rows[0]["kind"] == "exact_zeros"
    assert {r["kind"] for r in rows} <= set(KINDS)


def test_a_place_has_its_findings_and_those_of_all_places(tmp_path: Path) -> None:
    x = activations(scales=np.sort(SCALES))
    x[:, [1, 4], ..., 5] += 60.0
    rows = of(tmp_path, x, before=x)
    assert {row["site"] for row in rows} == {None, "block", "update"}
    for site, recipe in (("block", "element"), ("update", "pooled")):
        expected = [row for row in rows if row["site"] in (None, site) and row["recipe"] in (None, recipe)]
        assert found(tmp_path, site=site, recipe=recipe) == expected
        assert found(tmp_path, site=site) == [row for row in rows if row["site"] in (None, site)]
        of_rankings = [row for row in expected if OF_RANKINGS.get(row["kind"]) is not None]
        assert found(tmp_path, site=site, recipe=recipe, rankings_alone=True) == of_rankings


def test_the_same_finding_of_several_runs_is_told_once_and_others_are_counted(tmp_path: Path) -> None:
    for run_id in ("a", "b"):
        write_measured(tmp_path / "same", run_id, stats_of(activations(scales=np.sort(SCALES))), 8)
    text = in_words(tmp_path / "same")
    assert text.count("tracks depth") == 1
    assert "pooled, element, unit" in text
    for i in range(1, 6):
        rising = list(range(8, 22))
        rising[:i] = reversed(rising[:i])  # and the correlation with depth is another one of each
        write_scores(tmp_path / "other", f"run-{i}", rising)
        if i not in (3, 5):
            continue
        text = in_words(tmp_path / "other")
        assert len({row["message"] for row in found(tmp_path / "other", "tracks_depth")}) == i
        assert text.count("tracks depth") == 1
        assert ("and 2 more" in text) == ("--format csv" in text) == (i == 5)


def in_words(root: Path) -> str:
    console = Console(width=140)
    with console.capture() as capture:
        console.print(findings_list(findings(Warehouse(root))))
    return capture.get()


def test_activations_that_are_no_numbers(tmp_path: Path) -> None:
    """Every other statistic leaves them out: a layer of which little is left must not be ranked by that."""
    x = activations()
    x[:, 3, :, 1:] = np.nan
    x[0, 5, 0, 0, 0] = np.inf
    (row,) = of(tmp_path, x, "nonfinite")
    assert (row["severity"], row["site"], row["recipe"]) == ("warning", "block", None)
    assert row["value"] == pytest.approx(7 / 8)
    assert row["message"].startswith("Layers 3, 5 have NaN or infinite activations")
    store = Warehouse(tmp_path)
    for recipe in ("pooled", "element", "unit"):
        scores = store.scores(recipe=recipe, threshold=1e-5).to_pylist()
        assert sorted(s["rank"] for s in scores if s["rank"]) == [1, 2, 3, 4, 5, 6]
        assert [s["layer"] for s in scores if s["rank"] is None] == [3, 5]
        assert [s["lowest_set_probability"] for s in scores if s["rank"] is None] == [0.0, 0.0]
    sql = store.sql("SELECT layer, recipe, rank FROM scores_at(1e-5)").to_pylist()
    assert [s["layer"] for s in sql if s["rank"] is None] == [3, 5] * 3
    assert "layers 3, 5: they have no rank" in avss("show", "-w", tmp_path, "--recipe", "element").stdout
    refused = avss("plan", "-w", tmp_path, "--by", "avss", "--recipe", "element", "-o", tmp_path / "plan.yaml")
    assert refused.exit_code == 2
    assert "Layers 3, 5 have no score 'avss'" in refused.stderr
