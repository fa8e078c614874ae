"""Experiments of one run in a warehouse: the newest is read alone, older ones are counted, and each has its id."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from math import log
from pathlib import Path
from typing import Any

import pytest
from support.rows import column, columns
from support.warehouses import identity_of, rewrite_as_schema_3, run_row, write_scores

from avss_dist.analysis.experiments import NewestExperiment, newest_experiments
from avss_dist.analysis.section import Section
from avss_dist.analysis.verdict import experiment_sections
from avss_dist.planning.layers import plan_layers
from avss_dist.plans.choice import Choice
from avss_dist.plans.criteria import PUBLISHED
from avss_dist.reports.page.page import report_page
from avss_dist.warehouse.reader import Warehouse
from avss_dist.warehouse.store import Store

OLD = "1" * 20
NEW = "2" * 20
TIME = datetime(2026, 1, 2, 3, 4, tzinfo=UTC)
LATER = TIME + timedelta(days=1)
Rows = list[dict[str, Any]]


NOT_SET = ("control", "repair", "patch", "factor", "site", "recipe", "threshold", "threshold_kind")


def row(score: str | None, loss: float, **more: Any) -> dict[str, Any]:
    """A row of ``experiments`` on the loss of a text, without its experiment."""
    columns: dict[str, Any] = dict.fromkeys(NOT_SET)
    columns |= {"task": "perplexity:text.txt", "metric": "loss", "value": loss}
    columns |= {"score": score, "drop_parts": [], "created_at": TIME}
    if score is None:
        columns |= {"method": "whole model", "share": 0.0, "drop": [], "retention": 1.0}
    else:
        columns |= {"method": score, "share": 0.25, "drop": [0, 1]}
        columns |= {"retention": 0.5, "retention_low": 0.4, "retention_high": 0.6}
    columns |= more
    return columns


def experiment(whole: float, pruned: float, randoms: int, **more: Any) -> Rows:
    """The whole model, the lowest AVSS, and random choices. The losses are logarithms of these perplexities."""
    rows = [row(None, log(whole), **more), row("avss", log(pruned), **more)]
    for seed in range(randoms):
        rows.append(row("random", log(pruned), method=f"random {seed}", **more))
    return rows


OLDER = [*experiment(20, 40, 2), row("avss", log(80), share=0.5)]
NEWER = experiment(30, 50, 3, created_at=LATER)


def of_experiment(rows: Rows, experiment_id: str, run_id: str = "a") -> Rows:
    """Return rows as those of an experiment with a run."""
    identity = {"experiment_id": experiment_id, "run_id": run_id, "model": "org/a"}
    return [row | identity for row in rows]


def older_and_newer() -> Rows:
    """Two experiments with a run, of which the older one also dropped another share."""
    return of_experiment(OLDER, OLD) + of_experiment(NEWER, NEW)


def write_experiment(root: Path, rows: Rows, file_name: str) -> None:
    """Write an experiment with the run ``a`` into a file."""
    Store(root).write_rows("experiments", identity_of(run_row("a")), rows, file_name)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A warehouse with a run and two experiments, written by a version that stored no ids of experiments."""
    write_scores(tmp_path, "a", [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0])
    write_experiment(tmp_path, OLDER, OLD)
    write_experiment(tmp_path, NEWER, NEW)
    rewrite_as_schema_3(tmp_path / "experiments" / "run_id=a")
    return tmp_path


def newest_of(rows: Rows) -> NewestExperiment:
    """Return the newest experiment with the run ``a``."""
    return newest_experiments(rows)["a"]


@pytest.fixture
def section() -> Section:
    """The section of a report on two experiments with a run."""
    (section,) = experiment_sections(older_and_newer())
    return section


def test_the_newest_experiment_is_read_alone() -> None:
    newest = newest_of(older_and_newer())
    assert set(column(newest.rows, "experiment_id")) == {NEW}


def test_the_order_of_rows_does_not_decide_which_experiment_is_newest() -> None:
    newest = newest_of(older_and_newer()[::-1])
    assert set(column(newest.rows, "experiment_id")) == {NEW}


def test_every_run_has_its_own_newest_experiment() -> None:
    newest = newest_experiments([*older_and_newer(), *of_experiment(OLDER, OLD, "b")])
    assert newest.keys() == {"a", "b"}
    assert newest["a"].older == 1
    assert newest["b"].older == 0


def test_an_experiment_that_dropped_no_layer_is_left_out() -> None:
    """Versions before 0.3 also wrote experiments on residual scales and sparsities."""
    later = TIME + timedelta(days=9)
    scaled = row("avss", 2.0, factor=0.5, created_at=later)
    sparsified = row("avss", 2.0, share=0.0, created_at=later)
    newest = newest_of([*older_and_newer(), *of_experiment([scaled, sparsified], "3" * 20)])
    assert set(column(newest.rows, "experiment_id")) == {NEW}


def test_an_experiment_is_named_with_its_time_and_the_number_of_all() -> None:
    newest = newest_of(older_and_newer())
    assert newest.describe() == f"Experiment {NEW} of 2026-01-03 03:04 UTC, the newest of 2 with this run."


def test_an_experiment_without_others_is_named_alone() -> None:
    newest = newest_of(of_experiment(NEWER, NEW))
    assert newest.describe() == f"Experiment {NEW} of 2026-01-03 03:04 UTC."


def test_a_section_compares_within_the_newest_experiment(section: Section) -> None:
    (text,) = section.sentences
    assert "(perplexity 30, then 50)" in text


def test_a_section_counts_the_random_choices_of_the_newest_experiment(section: Section) -> None:
    assert "Of 3 random choices" in section.sentences[0]


def test_a_section_has_the_shares_of_the_newest_experiment(section: Section) -> None:
    (table,) = section.tables
    rows = [row.values for row in table.rows]
    assert set(column(rows, "share")) == {0.0, 0.25}


def test_rows_of_earlier_versions_are_told_apart_by_their_files(root: Path) -> None:
    rows = Warehouse(root).table("experiments").to_pylist()
    experiments = columns(rows, "experiment_id", "created_at")
    assert set(experiments) == {(OLD, TIME), (NEW, LATER)}


def test_a_query_has_the_same_ids_of_experiments(root: Path) -> None:
    ids = Warehouse(root).sql("SELECT DISTINCT experiment_id FROM experiments ORDER BY 1")
    assert ids["experiment_id"].to_pylist() == [OLD, NEW]


def test_a_stored_id_of_an_experiment_is_kept(root: Path) -> None:
    write_experiment(root, experiment(1, 2, 0, experiment_id="4" * 20), "5" * 20)
    ids = Warehouse(root).table("experiments")["experiment_id"].to_pylist()
    assert set(ids) == {OLD, NEW, "4" * 20}


@pytest.mark.nightly
def test_the_page_says_which_experiment_it_shows(root: Path) -> None:
    assert f"Experiment {NEW} of 2026-01-03 03:04 UTC, the newest of 2 with this run." in report_page(Warehouse(root))


@pytest.mark.nightly
def test_the_page_compares_within_the_newest_experiment(root: Path) -> None:
    assert "(perplexity 30, then 50)" in report_page(Warehouse(root))


def test_a_plan_has_the_verdict_of_the_newest_experiment_alone(root: Path) -> None:
    warehouse = Warehouse(root)
    (run,) = warehouse.runs().to_pylist()
    findings = plan_layers(warehouse, run, Choice(by="avss", reading=PUBLISHED)).findings
    (verdict,) = [line for line in findings if line.startswith("perplexity:")]
    assert "(perplexity 30, then 50)" in verdict
    assert verdict.endswith(f"Experiment {NEW} of 2026-01-03 03:04 UTC, the newest of 2 with this run.")
