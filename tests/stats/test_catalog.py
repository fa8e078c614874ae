"""Every score of the catalog is measured, stored, drawn and explained wherever scores are."""

from __future__ import annotations

import inspect
import re

import pytest

from avss_dist import ablate
from avss_dist.reports.page.charts import page_charts
from avss_dist.stats.catalog import BASELINES, FROM_ACTIVATIONS, GROUND_TRUTH, MEASURED, SCORES, metrics_of
from avss_dist.stats.layer_stats import LayerStats
from avss_dist.stats.scores import layer_baselines
from avss_dist.tasks.damage import LOOKAHEAD
from avss_dist.warehouse.schema import TABLES


def test_every_score_from_activations_is_computed_stored_and_drawn() -> None:
    assert ("avss", *BASELINES) == FROM_ACTIVATIONS
    assert tuple(layer_baselines({(0, "block"): LayerStats.zero((0.5,))}, 0)) == BASELINES
    columns = {column.name: column for column in TABLES["scores"].columns}
    for name in FROM_ACTIVATIONS:
        info = SCORES[name]
        assert columns[info.column].meaning == info.definition
        assert columns[info.column].unit == info.unit
        assert info.caption.endswith(".")
        assert f"{name}:layer:log" in page_charts()


@pytest.mark.parametrize("name", MEASURED)
def test_every_measured_score_has_options_of_ablate(name: str) -> None:
    options = inspect.signature(ablate).parameters
    assert set(SCORES[name].ablate) <= set(options)
    assert SCORES[name].task.endswith(":")


def test_damage_is_the_mean_of_two_ranks_that_its_task_measures() -> None:
    assert metrics_of("damage") == (*metrics_of("propagated"), *metrics_of("predicted"))
    measured = [int(metric.rpartition("_")[2]) for metric in metrics_of("damage")]
    assert max(measured) == LOOKAHEAD
    assert min(measured) >= 0
    assert set(GROUND_TRUTH) < set(MEASURED)


@pytest.mark.parametrize("name", SCORES)
def test_every_score_has_a_title_and_a_meaning(name: str) -> None:
    assert SCORES[name].title
    assert SCORES[name].meaning
    assert not re.search(r"\.$", SCORES[name].meaning)
