"""Retention: which metrics are better when lower, and the loss."""

from __future__ import annotations

import numpy as np
import pytest

from avss_dist.core.names import LOSS
from avss_dist.stats.metrics import LOWER_IS_BETTER, retention_of

BEFORE, AFTER = np.array([2.0, 0.5, 0.0]), np.array([4.0, 0.25, 1.0])


def test_of_a_loss_the_perplexities_are_compared() -> None:
    assert retention_of(LOSS, BEFORE, AFTER) == pytest.approx(np.exp(BEFORE) / np.exp(AFTER), rel=1e-12)


@pytest.mark.parametrize("form", ["{}", "{},none", "group/{}", "group/{},none", "a/b/{},strict-match"])
def test_less_is_better_for_some_metrics_of_the_harness_and_more_for_the_others(form: str) -> None:
    for name in LOWER_IS_BETTER:
        assert retention_of(form.format(name), BEFORE, AFTER).tolist() == [0.5, 2.0, 0.0]
    for name in ("acc", "exact_match", "perplexity_gain"):
        assert retention_of(form.format(name), BEFORE, AFTER).tolist() == [2.0, 0.5, np.inf]


def test_nothing_of_nothing_is_not_a_number_and_no_warning(recwarn: pytest.WarningsRecorder) -> None:
    nothing = np.zeros(1)
    assert (
        np.isnan(retention_of("acc", nothing, nothing)).all() and np.isnan(retention_of("ter", nothing, nothing)).all()
    )
    assert retention_of(LOSS, np.array([1e4]), nothing) == np.inf
    assert not recwarn.list
