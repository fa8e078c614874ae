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


@dataclass(frozen=True, kw_only=True, repr=False)
class Sensitivity(TabularResult):
    """Effect of rounded weights on the loss of a model.

    Attributes:
        rows: rows of the table: layers, each followed by its linear maps, of each format.
        reliability: agreement of the measured order of layers with that on other text of the same size, by format
            (`scorecard.reliability`); NaN if it was not measured.
    """

    model: str
    corpus: str
    rows: Sequence[Mapping[str, Any]]
    reliability: Mapping[str, float]

    _bars = ("increase", "predicted")

    def table(self) -> pa.Table:
        """Return a table with a row for each format, layer and map. ``map`` is null for whole layers.

        Its columns are the loss, its increase over that of the whole model, paired by sequence, and the results of
        `map_damage.RoundingDamage`, with standard errors that are null for a single sample.
        """
        return pa.Table.from_pylist(list(self.rows))

    def summary(self) -> str:
        """Return the formats, the model and the text, in a line."""
        return f"{', '.join(self.reliability)}: {self.model} on {self.corpus}"


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
    places = sorted(by_place, key=lambda at: (request.formats.index(at.format), at.layer, at.path or ""))
    increases = {place: increase_over(whole, by_place[place].get(LOSS)) for place in places}
    rows = []
    for place in places:
        measured = by_place[place]
        row: dict[str, Any] = {"format": place.format, "layer": place.layer, "map": place.path}
        row |= {name: getattr(measured.get(name), "value", None) for name in (NUM_WEIGHTS, BITS_PER_WEIGHT, LOSS)}
        with_errors = {"increase": increases[place], **{name: measured.get(name) for name in ROUNDING_ESTIMATES}}
        for name, effect in with_errors.items():
            stderr = None if effect is None or np.isnan(effect.stderr) else effect.stderr
            row |= {name: getattr(effect, "value", None), f"{name}_stderr": stderr}
        rows.append(row)
    agreement = {
        name: agreement_of(increases[place] for place in places if (place.format, place.path) == (name, None))
        for name in request.formats
    }
    return Sensitivity(model=str(request.model), corpus=corpus, rows=rows, reliability=agreement)


def increase_over(whole: Result | None, loss: Result | None) -> Result | None:
    """Return the increase of a loss over that of the whole model, paired by sample, or None if one is missing."""
    return None if whole is None or loss is None else replace(loss, samples=loss.samples - whole.samples)


def agreement_of(increases: Iterable[Result | None]) -> float:
    """Return the agreement of layers' increases with those on other text of the same size. NaN without any."""
    measured = [increase.samples for increase in increases if increase is not None]
    return reliability(np.stack(measured, axis=1)) if measured else float("nan")
