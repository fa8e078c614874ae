"""Who hangs: ranks that make no progress, and ranks that never began."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from avss_dist.executors.ray.pool import START_SECONDS, late

GANG: Any = SimpleNamespace(names=["g.0", "g.1"])


@pytest.mark.parametrize(
    ("ages", "elapsed", "names"),
    [
        ({"g.0": 1.0, "g.1": 11.0}, 20.0, ["g.1"]),
        ({"g.0": 1.0, "g.1": 11.0}, 9.0, []),  # before this round it may have had nothing to do
        ({"g.0": 1.0}, 11.0, []),  # it may still be starting
        ({"g.0": 1.0}, 11.0 + START_SECONDS, ["g.1"]),
        ({"h.0": 1.0}, 1000.0, []),  # the gang has no place yet
    ],
)
def test_a_rank_that_never_reported_hangs_too(ages: dict[str, float], elapsed: float, names: list[str]) -> None:
    assert late(GANG, ages, elapsed, hang_seconds=10.0) == names
