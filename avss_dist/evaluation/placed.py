"""Models whose replicas have a place, and tasks of them that are ready to be measured."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from avss_dist.core.fingerprint import NUMBERS_VERSION, fingerprint
from avss_dist.core.intervention import NO_INTERVENTION, Intervention
from avss_dist.core.settings import Settings
from avss_dist.corpus.seen import SeenText
from avss_dist.models.checkpoint.locate import Checkpoint
from avss_dist.partition.placement import Placement, fingerprint_part
from avss_dist.tasks.task import Cell, Measure, Task


@dataclass(frozen=True, eq=False, kw_only=True)
class PlacedModel:
    """A checkpoint with every setting decided, and the placement of its replicas."""

    checkpoint: Checkpoint
    settings: Settings
    placement: Placement

    def plan(self, task: Task) -> PlannedTask:
        """Return a task of the model, ready to be measured."""
        return PlannedTask(checkpoint=self.checkpoint, settings=self.settings, task=task, placement=self.placement)

    def reading(self, **options: Any) -> PlacedModel:
        """Return the model with other `TextOptions`."""
        return replace(self, settings=replace(self.settings, **options))


@dataclass(frozen=True, eq=False, kw_only=True)
class PlannedTask(PlacedModel):
    """A task of one checkpoint, ready to be measured under any intervention."""

    task: Task

    @cached_property
    def _run_ids(self) -> dict[str | None, str]:
        """Ids of evaluations by sparsity, each hashed once."""
        return {}

    def run_id(self, intervention: Intervention = NO_INTERVENTION) -> str:
        """Return the id of the evaluation that results under an intervention belong to.

        Sparsity makes another evaluation. Removals, a patch and a rounding make other cells of the same one.
        """
        sparsity = intervention.key.sparsity
        if sparsity not in self._run_ids:
            hashed: dict[str, object] = {**fingerprint_part(self.placement)}
            if sparsity:
                hashed["sparsity"] = sparsity
            digest = fingerprint(
                schema=NUMBERS_VERSION,
                checkpoint=self.checkpoint.revision,
                task=self.task.key,
                settings=self.settings.numbers(statistics=False),
                **hashed,
            )
            self._run_ids[sparsity] = f"{self.checkpoint.slug}-{digest[:10]}"
        return self._run_ids[sparsity]

    @property
    def seen(self) -> tuple[SeenText, ...]:
        """Texts that it reads to measure something by which models are changed."""
        run_id = self.run_id()
        return tuple(replace(text, by=run_id) for text in self.task.read)

    def cells(self, interventions: Iterable[Intervention] = (NO_INTERVENTION,)) -> list[Cell]:
        """Return a cell for each part of the task under each distinct intervention."""
        cells = []
        for intervention in dict.fromkeys(interventions):
            for part, measure in enumerate(self.task.parts):
                cells.append(self.cell(part, measure, intervention))
        return cells

    def cell(self, part: int, measure: Measure, intervention: Intervention = NO_INTERVENTION) -> Cell:
        """Return the cell of one part of the task under an intervention."""
        return Cell(
            run_id=self.run_id(intervention),
            checkpoint=self.checkpoint,
            settings=self.settings,
            task=self.task.name,
            part=part,
            measure=measure,
            placement=self.placement,
            intervention=intervention,
        )
