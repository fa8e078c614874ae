"""Who hangs: ranks that make no progress, and ranks that never began."""

from __future__ import annotations

import pytest

from avss_dist.executors.ray.watch import START_SECONDS, late


@pytest.mark.parametrize(
    ("silence", "heard", "elapsed", "names"),
    [
        ({"g.0": 1.0, "g.1": 11.0}, ["g.0", "g.1"], 20.0, ["g.1"]),
        ({"g.0": 1.0, "g.1": 11.0}, ["g.0", "g.1"], 9.0, []),  # before this round it may have had nothing to do
        ({"g.0": 1.0, "g.1": 11.0}, ["g.0"], 20.0, []),  # it may still be starting
        ({"g.0": 1.0, "g.1": START_SECONDS + 1}, ["g.0"], 100.0, ["g.1"]),
        ({"g.0": START_SECONDS + 1}, [], 100.0, ["g.0"]),  # nothing was ever heard of this gang
        ({}, ["h.0"], 1000.0, []),  # the gang has no place yet
    ],
)
def test_a_rank_that_never_reported_hangs_too(
    silence: dict[str, float], heard: list[str], elapsed: float, names: list[str]
) -> None:
    assert late(silence, heard, elapsed, hang_seconds=10.0) == names
