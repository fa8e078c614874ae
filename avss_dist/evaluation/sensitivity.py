"""Sensitivity to rounding: predicted and measured change of the loss by number format, layer and linear map."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa

from avss_dist.analysis.scorecard import reliability
from avss_dist.core.intervention import RoundedPlace, parse_rounded
from avss_dist.core.names import BITS_PER_WEIGHT, LOSS, NUM_WEIGHTS, ROUNDED_LOSS, ROUNDING_TASK
from avss_dist.core.registry import ROUNDING_ESTIMATES
from avss_dist.core.results import TabularResult
from avss_dist.core.settings import fingerprint
from avss_dist.core.text import RedactedURI
from avss_dist.corpus.shards import CorpusPlan
from avss_dist.requests import AblateRequest
from avss_dist.tasks.map_damage import RoundedLosses, RoundingDamage
from avss_dist.tasks.task import Result, Task


@dataclass(frozen=True, kw_only=True)
class PlaceSensitivity:
    """Effect of rounding the weights of a layer or of a linear map.

    Attributes:
        place: what is rounded, and to which format.
        estimates: results of `map_damage.RoundingDamage` by metric.
        loss: measured loss, in nats per token; None if it was not measured.
        increase: its increase over that of the whole model, paired by sequence.
    """

    place: RoundedPlace
    estimates: Mapping[str, Result]
    loss: Result | None
    increase: Result | None


@dataclass(frozen=True, kw_only=True, repr=False)
class Sensitivity(TabularResult):
    """Effect of rounded weights on the loss of a model.

    Attributes:
        places: layers, each followed by its linear maps, of each format.
        reliability: agreement of the measured order of layers with that on other text of the same size, by format
            (`scorecard.reliability`); NaN if it was not measured.
    """

    model: str
    corpus: str
    places: Sequence[PlaceSensitivity]
    reliability: Mapping[str, float]

    _bars = ("increase", "predicted")

    def table(self) -> pa.Table:
        """Return a table with a row for each format, layer and map. ``map`` is null for whole layers."""
        return pa.Table.from_pylist([_row(measured) for measured in self.places])

    def summary(self) -> str:
        """Return the formats, the model and the text, in a line."""
        return f"{', '.join(self.reliability)}: {self.model} on {self.corpus}"


def _row(measured: PlaceSensitivity) -> dict[str, Any]:
    place, estimates = measured.place, measured.estimates
    values = {
        NUM_WEIGHTS: estimates.get(NUM_WEIGHTS),
        BITS_PER_WEIGHT: estimates.get(BITS_PER_WEIGHT),
        LOSS: measured.loss,
    }
    return {
        "format": place.format,
        "layer": place.layer,
        "map": place.path,
        **{name: None if result is None else result.value for name, result in values.items()},
        **_with_error("increase", measured.increase),
        **{
            name: value
            for metric in ROUNDING_ESTIMATES
            for name, value in _with_error(metric, estimates.get(metric)).items()
        },
    }


def _with_error(name: str, result: Result | None) -> dict[str, float | None]:
    """Return the value of a result and its standard error, which is null for a single sample."""
    stderr = None if result is None or np.isnan(result.stderr) else result.stderr
    return {name: None if result is None else result.value, f"{name}_stderr": stderr}


_TASKS = (ROUNDING_TASK, ROUNDED_LOSS)


def is_of_rounding(task: Task) -> bool:
    """Whether a task predicts or measures the effect of rounded weights."""
    return task.name.startswith(_TASKS)


def rounding_tasks(request: AblateRequest, corpus: RedactedURI, text: CorpusPlan) -> Iterator[Task]:
    """Yield the tasks that predict the effect of all formats, and those that measure each of them."""
    if not request.formats:
        return
    read = {"text": fingerprint(shards=[shard.content_hash for shard in text.shards])}
    damage = tuple(RoundingDamage(shard=s, formats=request.formats) for s in text.shards)
    yield Task(name=f"{ROUNDING_TASK}{corpus}", parts=damage, options=read)
    for name in request.formats if request.rounded_layers else ():
        layers = tuple(RoundedLosses(shard, name) for shard in text.shards)
        yield Task(name=f"{ROUNDED_LOSS}{name}:{corpus}", parts=layers, options=read)


def sensitivity(
    request: AblateRequest, corpus: str, results: Iterable[tuple[Task, Sequence[Result]]]
) -> Sensitivity | None:
    """Return the effect of rounded weights from the results of all tasks of an ablation, or None without formats."""
    if not request.formats:
        return None
    by_place: dict[RoundedPlace, dict[str, Result]] = {}
    whole: Result | None = None
    for task, task_results in results:
        for result in task_results if is_of_rounding(task) else ():
            if (place := parse_rounded(result.intervention.rounding or "")) is None:
                whole = result
            else:
                by_place.setdefault(place, {})[result.metric] = result
    places = []
    for place in sorted(by_place, key=lambda at: (request.formats.index(at.format), at.layer, at.path or "")):
        loss, estimates = by_place[place].pop(LOSS, None), by_place[place]
        increase = increase_over(whole, loss)
        places.append(PlaceSensitivity(place=place, estimates=estimates, loss=loss, increase=increase))
    agreement = {
        name: agreement_of(p.increase for p in places if (p.place.format, p.place.path) == (name, None))
        for name in request.formats
    }
    return Sensitivity(model=str(request.model), corpus=corpus, places=places, reliability=agreement)


def increase_over(whole: Result | None, loss: Result | None) -> Result | None:
    """Return the increase of a loss over that of the whole model, paired by sample, or None if one is missing."""
    return None if whole is None or loss is None else replace(loss, samples=loss.samples - whole.samples)


def agreement_of(increases: Iterable[Result | None]) -> float:
    """Return the agreement of layers' increases with those on other text of the same size. NaN without any."""
    measured = [increase.samples for increase in increases if increase is not None]
    return reliability(np.stack(measured, axis=1)) if measured else float("nan")
