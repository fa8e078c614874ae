"""Trainings that differ in the seed alone: mean and spread over seeds, and differences that the shards of all tell."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.command_line import avss
from support.trainings import CHANGED, LAYERS, SCALES, shards_of
from support.warehouses import write_measured

import avss_dist
from avss_dist.analysis import curves
from avss_dist.analysis.curves import RankingCurves, curves_chart, seed_section
from avss_dist.analysis.seeds import SeedCurves
from avss_dist.core.values import TableRow
from avss_dist.warehouse.reader import Warehouse

OTHER = (1.0, 2.0, 9.0, 8.0, 16.0)  # layer 2 differs


def write_seed(root: Path, number: int, scales_of_step: Mapping[int, tuple[float, ...]], **columns: Any) -> None:
    """Write a training of one seed. The noise of its shards is its own."""
    for step, scales in scales_of_step.items():
        described: dict[str, Any] = {
            "series": f"org/a-seed{number}@step*",
            "seed": number,
            "seed_group": "org/a-seed*@step*",
            "model": f"org/a-seed{number}",
            "tokens_fingerprint": "tokens",
            "training_step": step,
            "revision": f"r{number}-{step}",
            **columns,
        }
        shards = shards_of(100 * (step + number), scales, columns.get("num_shards", 16))
        described.pop("num_shards", None)
        write_measured(root, f"a{number}-{step}", shards, LAYERS, 128 // len(shards), **described)


def compared(root: Path, **options: Any) -> RankingCurves:
    result = avss_dist.compare(warehouse=root, along="step", **options)
    assert isinstance(result, RankingCurves)
    return result


def seeds_of(root: Path, **options: Any) -> SeedCurves:
    (seeds,) = compared(root, **options).seeds
    return seeds


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three seeds, in which layer 1 changes before the second point. The third differs in layer 2 at the first one."""
    root = tmp_path_factory.mktemp("three")
    for seed, first in ((1, SCALES), (2, SCALES), (3, OTHER)):
        write_seed(root, seed, {100: first, 200: CHANGED})
    return root


@pytest.fixture(scope="module")
def compared_three(three: Path) -> RankingCurves:
    return compared(three)


@pytest.fixture(scope="module")
def seeds(compared_three: RankingCurves) -> SeedCurves:
    (seeds,) = compared_three.seeds
    return seeds


def test_there_is_a_curve_for_each_seed(seeds: SeedCurves) -> None:
    assert [curve.seed for curve in seeds.curves] == [1, 2, 3]


def test_the_mean_and_the_spread_are_those_of_the_ranks_of_the_curves(seeds: SeedCurves) -> None:
    ranks = np.array([curve.ranks for curve in seeds.curves])
    np.testing.assert_allclose(seeds.mean_rank, ranks.mean(axis=0))
    np.testing.assert_allclose(seeds.rank_spread, ranks.std(axis=0, ddof=1))


def test_the_seed_that_differs_is_found_where_it_does(seeds: SeedCurves) -> None:
    """At the first point, layer 2 of the third seed differs from both others."""
    differences = seeds.differences
    assert differences is not None
    np.testing.assert_array_equal(differences.differing_seeds[:, 0, 2], [1, 1, 2])


def test_seeds_do_not_differ_where_they_are_alike(seeds: SeedCurves) -> None:
    """At the second point, their shards are of one distribution, and their noise is their own."""
    differences = seeds.differences
    assert differences is not None
    assert not differences.differs[:, 1].any()


def test_a_difference_is_that_of_the_logarithms_of_the_stored_scores(seeds: SeedCurves) -> None:
    assert seeds.differences is not None
    z = np.log(seeds.values)
    z -= z.mean(axis=-1, keepdims=True)
    expected = np.stack([z[1] - z[0], z[2] - z[0], z[2] - z[1]])
    np.testing.assert_allclose(seeds.differences.difference, expected, rtol=1e-9)


def test_the_change_that_all_seeds_share_is_told(seeds: SeedCurves) -> None:
    (sentence,) = [text for text in seeds.sentences() if text.startswith("Changed in all seeds")]
    assert "100 to 200: up 1" in sentence


def test_the_lowest_layers_of_all_seeds_are_told(seeds: SeedCurves) -> None:
    sentences = seeds.sentences()
    assert sentences[0] == (
        "Among the lowest 25% of all 3 seeds at 200: 0; in 95% of the joint resamples of the text: 0."
    )


def test_the_sentences_tell_where_seeds_differ(seeds: SeedCurves) -> None:
    (line,) = [sentence for sentence in seeds.sentences() if sentence.startswith("100: layers ")]
    assert "in layer 2 (" in line


def test_the_table_has_mean_spread_and_differences(seeds: SeedCurves, compared_three: RankingCurves) -> None:
    rows = compared_three.table().to_pylist()
    (row,) = [row for row in rows if row["run_id"] == "a3-100" and row["layer"] == 2]
    assert row["mean_rank"] == seeds.mean_rank[0, 2]
    assert row["rank_spread"] == seeds.rank_spread[0, 2]
    assert row["differing_seeds"] == 2


def test_the_picture_begins_with_the_mean_over_seeds(compared_three: RankingCurves) -> None:
    charts = curves_chart(compared_three).to_dict()["vconcat"]
    assert charts[0]["title"]["text"] == "org/a-seed*@step* along training step, seeds 1, 2, 3"


def test_two_seeds_have_a_mean_and_no_claim(tmp_path: Path) -> None:
    for seed in (1, 2):
        write_seed(tmp_path, seed, {100: SCALES, 200: SCALES}, num_shards=8)
    seeds = seeds_of(tmp_path)
    assert seeds.no_claim == "There are 2 seeds, and 3 are needed to tell what seeds share from chance."
    assert seeds.mean_rank.shape == (2, LAYERS)


def test_one_seed_is_no_group(tmp_path: Path) -> None:
    write_seed(tmp_path, 1, {100: SCALES, 200: SCALES}, num_shards=8)
    assert compared(tmp_path).seeds == []


@pytest.mark.nightly
def test_a_seed_that_lacks_points_is_compared_at_the_others(tmp_path: Path) -> None:
    for seed in (1, 2, 3):
        steps = (100, 200) if seed == 3 else (100, 150, 200)
        write_seed(tmp_path, seed, dict.fromkeys(steps, SCALES), num_shards=8)
    seeds = seeds_of(tmp_path)
    assert seeds.points == ["100", "200"]
    assert seeds.notes == ("Seed 3 lacks 150.", "Seeds are compared at the 2 points that all of them have.")


@pytest.mark.nightly
def test_seeds_without_a_point_in_common_are_a_note(tmp_path: Path) -> None:
    for seed in (1, 2):
        write_seed(tmp_path, seed, dict.fromkeys((100 + seed, 200 + seed), SCALES), num_shards=8)
    assert compared(tmp_path).notes == ["org/a-seed*@step*: the seeds have no point in common."]


@pytest.mark.nightly
def test_a_seed_that_is_there_twice_is_a_note(tmp_path: Path) -> None:
    write_seed(tmp_path, 1, {100: SCALES, 200: SCALES}, num_shards=8)
    write_seed(tmp_path, 2, {100: SCALES, 200: SCALES}, num_shards=8, seed=1)
    (note,) = compared(tmp_path).notes
    assert note.startswith("org/a-seed*@step*: seed 1 is there twice, org/a-seed1@step* and org/a-seed2@step*.")


@pytest.mark.nightly
def test_seeds_of_other_widths_have_no_claim(tmp_path: Path) -> None:
    for seed in (1, 2, 3):
        write_seed(tmp_path, seed, {100: SCALES, 200: SCALES}, num_shards=8, hidden_size=32 * seed)
    assert "different shapes: hidden_size (32, 64, 96)" in seeds_of(tmp_path).no_claim


def test_seeds_in_one_series_are_refused(tmp_path: Path) -> None:
    write_seed(tmp_path, 1, {100: SCALES}, num_shards=8, series="org/a@*")
    write_seed(tmp_path, 2, {200: SCALES}, num_shards=8, series="org/a@*")
    (curve,) = compared(tmp_path).curves
    assert curve.no_claim.startswith("The runs are of 2 seeds, and in one series: 1, 2.")


@pytest.mark.nightly
def test_the_shards_of_seeds_are_read_once(three: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They count once against the limit, too. Where shards are cut alike, their boundaries are read apart."""
    monkeypatch.setattr(curves, "MAX_MEASUREMENTS_OF_SEVERAL", 96 * LAYERS)
    read: list[str] = []
    read_partials = Warehouse.read_partials

    def noted(warehouse: Warehouse, run: TableRow, sites: Sequence[str]) -> Any:
        if sites:
            read.append(run["run_id"])
        return read_partials(warehouse, run, sites)

    monkeypatch.setattr(Warehouse, "read_partials", noted)
    assert seeds_of(three).differences is not None
    assert len(read) == 6


def test_nothing_is_claimed_about_seeds_with_too_many_shards(three: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(curves, "MAX_MEASUREMENTS_OF_SEVERAL", 96 * LAYERS - 1)
    assert seeds_of(three).no_claim.startswith(
        f"The shards of its seeds hold {96 * LAYERS} measurements of layers, and"
    )


@pytest.mark.nightly
def test_seeds_under_other_conditions_are_no_group(tmp_path: Path) -> None:
    write_seed(tmp_path, 1, {100: SCALES, 200: SCALES}, num_shards=8)
    write_seed(tmp_path, 2, {100: SCALES, 200: SCALES}, num_shards=8, dtype="bfloat16")
    assert compared(tmp_path).seeds == []


def test_runs_of_earlier_versions_have_the_seed_of_their_series(tmp_path: Path) -> None:
    for seed in (1, 2):
        write_seed(tmp_path, seed, {100: SCALES}, num_shards=8, seed=None, seed_group=None)
        write_seed(tmp_path, seed, {200: SCALES}, num_shards=8)
    assert seeds_of(tmp_path).seeds == [1, 2]


def test_the_section_has_a_row_for_each_point_and_layer(seeds: SeedCurves) -> None:
    points, layers = seed_section(seeds, "seeds").tables
    assert [row.values["point"] for row in points.rows] == ["100", "200"]
    assert len(layers.rows) == LAYERS


def test_the_section_names_the_layers_that_differ(seeds: SeedCurves) -> None:
    points, _ = seed_section(seeds, "seeds").tables
    first, second = [row.values["differ"] for row in points.rows]
    assert first.endswith("2")
    assert second == ""


@pytest.mark.nightly
def test_the_command_prints_what_seeds_share(three: Path) -> None:
    result = avss("compare", "-w", three, "--along", "step")
    assert result.exit_code == 0, result.stderr
    assert "Among the lowest 25% of all 3 seeds at 200" in result.stdout


def test_a_checkpoint_of_an_epoch_is_on_no_curve_for_that_reason(tmp_path: Path) -> None:
    write_seed(tmp_path, 1, {100: SCALES, 200: SCALES}, num_shards=8)
    write_seed(tmp_path, 2, {300: SCALES}, num_shards=8, training_step=None, revision_name="epoch_3")
    reason = compared(tmp_path).left_out["a2-300"]
    assert reason == "its step is not known: 'epoch_3' names an epoch, which is not a step"
