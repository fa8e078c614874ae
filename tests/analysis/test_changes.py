"""Changes of the layers of a training: what the shards of its runs tell, and when nothing is claimed."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import vl_convert
from support.command_line import avss
from support.tiers import nightly
from support.trainings import CHANGED, LAYERS, SCALES, shards_of
from support.warehouses import PUBLISHED, Stats, stats_of, write_measured

import avss_dist
from avss_dist.analysis import curves
from avss_dist.analysis.changes import Reading, SeriesChanges, ShardScores, series_changes
from avss_dist.analysis.comparison import runs_with_conditions
from avss_dist.analysis.curves import Curve, RankingCurves, curve_section
from avss_dist.analysis.rank_map import RANK
from avss_dist.analysis.section import Chart
from avss_dist.core.errors import QueryError
from avss_dist.reports.page.charts import section_chart
from avss_dist.stats.layer_stats import merge_stats
from avss_dist.warehouse.reader import Warehouse

AVSS = Reading(site="block", recipe="pooled", threshold=PUBLISHED, score="avss")
SERIES: dict[str, Any] = {"series": "org/a@step*", "model": "org/a", "tokens_fingerprint": "tokens"}


def write_step(root: Path, step: int, shards: Sequence[Stats], **columns: Any) -> None:
    """Write a checkpoint of the training `SERIES`. Shards of 16 have 8 tokens each, fewer ones as many together."""
    described = {**SERIES, "training_step": step, "revision": f"r{step}", **columns}
    write_measured(root, f"a-{step}", shards, LAYERS, 128 // len(shards), **described)


@pytest.fixture(scope="module")
def training(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training of three checkpoints. Layer 1 changes before the last one."""
    root = tmp_path_factory.mktemp("training")
    for step, scales in ((100, SCALES), (200, SCALES), (300, CHANGED)):
        write_step(root, step, shards_of(step, scales))
    return root


def changes_of(root: Path, reading: Reading = AVSS) -> SeriesChanges:
    warehouse = Warehouse(root)
    runs = runs_with_conditions(warehouse, warehouse.runs()["run_id"].to_pylist())
    runs.sort(key=lambda run: run["training_step"])
    return series_changes(ShardScores(warehouse, reading), runs)


def curve_of(root: Path, **options: Any) -> Curve:
    result = avss_dist.compare(warehouse=root, along="step", **options)
    assert isinstance(result, RankingCurves)
    (curve,) = result.curves
    return curve


@pytest.fixture(scope="module")
def changes(training: Path) -> SeriesChanges:
    return changes_of(training)


@pytest.fixture(scope="module")
def curve(training: Path) -> Curve:
    return curve_of(training)


def test_the_change_is_found_where_it_is(changes: SeriesChanges) -> None:
    assert changes.units == 16
    assert not changes.is_changed[0].any()
    assert changes.is_changed[1, 1]
    assert changes.rank_moved[1, 1]


def test_a_change_is_that_of_the_logarithm_of_the_stored_score(training: Path, changes: SeriesChanges) -> None:
    scores = avss_dist.compare(warehouse=training, along="step").table()["score"].to_numpy().reshape(3, LAYERS)
    centered = np.log(scores) - np.log(scores).mean(axis=1, keepdims=True)
    np.testing.assert_allclose(changes.change, np.diff(centered, axis=0), rtol=1e-9)


@pytest.mark.nightly
def test_shards_that_are_cut_otherwise_are_merged_to_common_ones(training: Path, tmp_path: Path) -> None:
    """The runs of the second warehouse have 16, 16 and 8 shards of the same rows, those of the third 8 each."""
    mixed = tmp_path / "mixed"
    alike = tmp_path / "alike"
    for step, scales in ((100, SCALES), (200, SCALES), (300, CHANGED)):
        shards = shards_of(step, scales)
        pairs = [merge_stats(shards[start : start + 2]) for start in range(0, 16, 2)]
        write_step(alike, step, pairs)
        write_step(mixed, step, pairs if step == 300 else shards, tokens_fingerprint=f"cut {step == 300}")
    merged = changes_of(mixed)
    expected = changes_of(alike)
    assert merged.units == 8
    assert merged.notes[0] == "The runs divide the text differently: shards were merged to 8 parts."
    np.testing.assert_allclose(merged.change, expected.change, rtol=1e-9)
    np.testing.assert_array_equal(merged.p, expected.p)


def test_runs_of_other_tokens_are_refused(tmp_path: Path) -> None:
    shards = shards_of(100, SCALES, 8)
    write_step(tmp_path, 100, shards, tokens_fingerprint="these")
    write_measured(
        tmp_path, "a-200", shards, LAYERS, 15, **SERIES | {"training_step": 200, "tokens_fingerprint": "those"}
    )
    with pytest.raises(QueryError, match="did not read the same tokens"):
        changes_of(tmp_path)


def test_shards_with_few_common_boundaries_are_refused(tmp_path: Path) -> None:
    for step, number in ((100, 15), (200, 10)):
        columns = {"training_step": step, "tokens_fingerprint": str(step)}
        write_measured(
            tmp_path, f"a-{step}", shards_of(100, SCALES)[:number], LAYERS, 120 // number, **SERIES | columns
        )
    with pytest.raises(QueryError, match="5 common parts of about equal size, and 8 are needed"):
        changes_of(tmp_path)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"series": "org/b@step*"}, r"of 2 trainings: org/a@step\*, org/b@step\*"),
        ({"training_step": 100}, "Step 100 is there twice: runs a-100 and a-200"),
        ({"hidden_size": 64}, r"different shapes: hidden_size \(32, 64\)"),
        ({"corpus": "other.txt"}, r"same rows in the same way: corpus \(other.txt, text.txt\)"),
        *nightly(
            ({"corpus_fingerprint": "x"}, r"corpus \(text.txt, another of this name\)"),
            ({"num_sequences": 32}, r"num_sequences \(16, 32\)"),
            ({"dtype": "bfloat16"}, r"dtype \(bfloat16, float32\)"),
        ),
    ],
)
def test_runs_that_are_no_series_are_refused(columns: dict[str, Any], message: str, tmp_path: Path) -> None:
    shards = shards_of(100, SCALES, 8)
    write_step(tmp_path, 100, shards, hidden_size=32)
    write_step(tmp_path, 200, shards, **{"hidden_size": 32, **columns})
    with pytest.raises(QueryError, match=message):
        changes_of(tmp_path)


def test_a_text_that_is_too_short_is_said_and_not_guessed(tmp_path: Path) -> None:
    for step in (100, 200):
        write_step(tmp_path, step, shards_of(step, SCALES, 4))
    curve = curve_of(tmp_path)
    assert curve.changes is None
    assert curve.no_claim.startswith("No interval: 4 shards, 8 are needed")
    assert any(curve.no_claim in sentence for sentence in curve_section(curve, "curve").sentences)


def test_a_damaged_shard_is_a_reason_to_claim_nothing(tmp_path: Path) -> None:
    for step in (100, 200):
        write_step(tmp_path, step, shards_of(step, SCALES, 8))
    next(tmp_path.glob("shard_stats/run_id=a-200/*")).unlink()
    assert curve_of(tmp_path).no_claim.startswith("Shards of run a-200 are missing or damaged")


def test_damaged_statistics_are_a_reason_to_claim_nothing(tmp_path: Path) -> None:
    for step in (100, 200):
        write_step(tmp_path, step, shards_of(100, SCALES, 8))
    next(tmp_path.glob("layer_stats/run_id=a-200/*")).unlink()
    assert "has no layer statistics of run 'a-200'" in curve_of(tmp_path).no_claim


def test_a_threshold_that_some_runs_counted_is_refused(tmp_path: Path) -> None:
    for step, thresholds in ((100, [PUBLISHED.value]), (200, [1e-3])):
        write_step(tmp_path, step, shards_of(100, SCALES, 8), thresholds=thresholds)
    with pytest.raises(QueryError, match="Some of the runs counted the elements below 1e-05, and others did not"):
        changes_of(tmp_path)


def test_runs_of_other_devices_have_a_note(tmp_path: Path) -> None:
    for step, device in ((100, "cpu"), (200, "NVIDIA H100")):
        write_step(tmp_path, step, shards_of(100, SCALES, 8), device=device)
    assert changes_of(tmp_path).notes[0].startswith("The runs differ in device (NVIDIA H100, cpu)")


def test_a_score_of_ones_own_has_no_noise(training: Path) -> None:
    curve = curve_of(training, score={layer: float(layer) for layer in range(LAYERS)})
    assert curve.no_claim.startswith("A score of your own has no shards")


def test_equal_checkpoints_have_no_change(tmp_path: Path) -> None:
    shards = shards_of(100, SCALES, 8)
    for step in (100, 200):
        write_step(tmp_path, step, shards)
    assert (changes_of(tmp_path).p == 1).all()


@pytest.mark.parametrize("score", ["block_influence", "update_variance_ratio", *nightly("angular_distance")])
def test_the_changes_of_other_scores_are_those_of_the_stored_ones(score: str, tmp_path: Path) -> None:
    for step in (100, 200):
        random = np.random.default_rng(step)
        before = random.normal(size=(8, LAYERS, 1, 2, 8))
        after = before + np.array(SCALES)[:, None, None, None] * random.normal(size=before.shape)
        write_step(tmp_path, step, stats_of(after, before=before))
    reading = Reading(site="block", recipe="pooled", threshold=PUBLISHED, score=score)
    table = avss_dist.compare(warehouse=tmp_path, along="step", score=score).table()
    scores = table["score"].to_numpy().reshape(2, LAYERS)
    centered = scores - scores.mean(axis=1, keepdims=True)
    np.testing.assert_allclose(changes_of(tmp_path, reading).change, np.diff(centered, axis=0), rtol=1e-9, atol=1e-12)


def test_the_table_compares_each_point_with_the_one_before(curve: Curve) -> None:
    assert curve.changes is not None
    rows = list(curve.rows())
    assert "change" not in rows[0]
    assert rows[LAYERS * 2 + 1]["is_changed"] is True
    assert rows[LAYERS * 2 + 1]["change_p"] == curve.changes.p[1, 1]
    assert [row["lowest_as_last"] for row in rows[-LAYERS:]] == [1.0] * LAYERS


def test_the_sentences_tell_which_layers_changed_between_which_points(curve: Curve) -> None:
    sentences = curve_section(curve, "curve").sentences
    (line,) = [sentence for sentence in sentences if sentence.startswith("200 to 300: ")]
    assert re.search(r"most layer 1 \(\+1\.\d+, p 0\.00024\); in rank 1", line)


def map_of(curve: Curve) -> Chart:
    (chart,) = curve_section(curve, "curve").charts
    return chart


def test_the_map_marks_what_changed_and_nothing_else(changes: SeriesChanges, curve: Curve) -> None:
    marks = {(row["point"], row["layer"]): row["changed"] for row in map_of(curve).rows if row["changed"]}
    changed = {("300", layer) for layer in np.flatnonzero(changes.is_changed[1]).tolist()}
    assert marks.keys() == changed
    assert marks["300", 1] == RANK


def test_the_map_has_the_size_and_the_p_value_of_a_change(changes: SeriesChanges, curve: Curve) -> None:
    row = map_of(curve).rows[LAYERS * 2 + 1]
    assert row["change"] == changes.change[1, 1]
    assert row["p"] == changes.p[1, 1]


@pytest.mark.nightly
def test_the_map_is_drawn_with_its_marks(curve: Curve) -> None:
    chart = map_of(curve)
    rows = list(chart.rows)
    spec = section_chart(chart) | {"datasets": {"rows": rows}, "width": 400}
    svg = vl_convert.vegalite_to_svg(spec)
    num_changed = sum(bool(row["changed"]) for row in rows)
    assert svg.count('aria-label="training step: ') == len(rows) + num_changed


def test_a_map_without_a_claim_has_no_marks(tmp_path: Path) -> None:
    for step in (100, 200):
        write_step(tmp_path, step, shards_of(step, SCALES, 4))
    assert "changed" not in map_of(curve_of(tmp_path)).rows[0]


def test_few_shards_have_a_note_about_the_smallest_p(tmp_path: Path) -> None:
    for step in (100, 200):
        write_step(tmp_path, step, shards_of(100, SCALES, 8))
    assert "8 parts of the text give no p below 1/128." in changes_of(tmp_path).notes


@pytest.mark.parametrize(
    ("limit", "series"),
    [("MAX_MEASUREMENTS", ["org/a@step*"]), *nightly(("MAX_MEASUREMENTS_OF_SEVERAL", ["org/a@step*", "org/b@step*"]))],
    ids=["one-training", "several-trainings"],
)
def test_nothing_is_claimed_where_there_is_too_much_to_read(
    limit: str, series: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number, name in enumerate(series):
        for step in (100, 200):
            columns = {**SERIES, "series": name, "training_step": step, "revision": f"r{step}"}
            write_measured(tmp_path, f"{number}-{step}", shards_of(step, SCALES), LAYERS, 8, **columns)
    monkeypatch.setattr(curves, limit, 32 * LAYERS - 1)
    compared = avss_dist.compare(warehouse=tmp_path, along="step", threshold=1e-5)
    reasons = {curve.no_claim.partition(" are read")[0] for curve in compared.curves}
    assert reasons == {f"Its shards hold {32 * LAYERS} measurements of layers, and {32 * LAYERS - 1}"}


@pytest.mark.nightly
def test_the_command_prints_what_changed(training: Path) -> None:
    result = avss("compare", "-w", training, "--along", "step")
    assert result.exit_code == 0, result.stderr
    assert "Changed beyond the choice of text (16 parts of the text" in result.stdout
