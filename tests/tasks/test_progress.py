"""Progress of long measurements: each names what it does, and its share grows from batch to batch and within one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.causal_lm import SMALL, opened, random_shard

from avss_dist.core.settings import Settings
from avss_dist.core.streams import portion, progress_to, report
from avss_dist.models.causal_lm import LanguageModel
from avss_dist.models.change.replay import PROBING
from avss_dist.models.checkpoint.locate import resolve
from avss_dist.partition.placement import Placement
from avss_dist.partition.replica import open_replica
from avss_dist.tasks.backward import Gradients
from avss_dist.tasks.map_damage import RoundedLosses, RoundingDamage
from avss_dist.tasks.shapley import Shapley
from avss_dist.tasks.task import Measure
from avss_dist.tasks.text_loss import LeaveOneOut

SHARD = random_shard()
BATCHES = 3
MEASURES = {
    "Predicting the effect of rounding": RoundingDamage(shard=SHARD, formats=("int4",)),
    "Rounding layers to int4": RoundedLosses(SHARD, "int4"),
    "Leaving out layers": LeaveOneOut(SHARD),
    "Leaving out sublayers": LeaveOneOut(SHARD, sublayers=True),
    "Removing layers in random orders": Shapley(shards=(SHARD,), seeds=(0, 1), truncation=False),
    "Computing gradients": Gradients(SHARD),
}


def progress_of(model: LanguageModel, measure: Measure) -> list[tuple[str, float]]:
    """The activities and shares that a measure reports, without the trial that precedes the first one."""
    reports: list[tuple[str, float]] = []

    def hear(activity: str, share: float) -> None:
        if activity != PROBING:
            reports.append((activity, share))

    with progress_to(hear):
        measure(model)
    return reports


@pytest.fixture
def streamed(tiny_llama: Path) -> Iterator[LanguageModel]:
    settings = Settings(**SMALL | {"batch_size": 2, "dtype": "float32"})
    replica: Any = open_replica(resolve(str(tiny_llama)), settings, Placement(partition="streaming"), head=True)
    yield replica.language_model
    replica.close()


@pytest.mark.parametrize("activity", MEASURES)
def test_a_measure_has_one_name(activity: str, tiny_llama: Path) -> None:
    reports = progress_of(opened(tiny_llama, dtype="float32"), MEASURES[activity])
    assert {name for name, _ in reports} == {activity}


@pytest.mark.parametrize("activity", MEASURES)
def test_its_share_grows_within_a_batch(activity: str, tiny_llama: Path) -> None:
    reports = progress_of(opened(tiny_llama, dtype="float32"), MEASURES[activity])
    shares = [share for _, share in reports]
    assert shares == sorted(shares)
    assert len(set(shares)) >= 2 * BATCHES
    assert 0.6 < shares[-1] < 1


@pytest.mark.parametrize("activity", ["Predicting the effect of rounding", "Rounding layers to int4"])
def test_streaming_has_the_share_of_the_layers_that_it_has_read(activity: str, streamed: LanguageModel) -> None:
    reports = progress_of(streamed, MEASURES[activity])
    shares = [share for _, share in reports]
    assert {name for name, _ in reports} == {activity}
    assert shares == sorted(shares)
    assert len(set(shares)) >= len(streamed.layers)


def test_a_part_of_an_activity_has_its_part_of_the_share() -> None:
    shares: list[float] = []
    with progress_to(lambda _, share: shares.append(share)), portion(0.5, 0.5), portion(0.5, 0.25):
        report("reading", 0.0)
        report("reading", 1.0)
    assert shares == [0.75, 0.875]


def test_nobody_need_hear_the_parts() -> None:
    with portion(0.5, 0.5):
        report("reading", 0.0)
