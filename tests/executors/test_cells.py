"""Cells: each gives its rows or its own error; those that do not fit are measured with half the rows."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from support.causal_lm import SMALL, opened, random_shard

from avss_dist.core.errors import AvssError, BatchTooLarge, ModelError
from avss_dist.core.intervention import NO_INTERVENTION, Intervention
from avss_dist.core.settings import Settings
from avss_dist.executors.interface import Executor
from avss_dist.executors.local import LocalExecutor
from avss_dist.models.causal_lm import LanguageModel
from avss_dist.models.checkpoints import Checkpoint, resolve
from avss_dist.tasks.cells import Cell, measure_cell
from avss_dist.tasks.task import Measure, Row
from avss_dist.tasks.text_loss import TextLoss

PARTS = 6
SETTINGS = Settings(**SMALL)


class Loss(TextLoss):
    """The loss of random text, of which `disturb` may prevent the computation."""

    @property
    def key(self) -> str:
        return type(self).__name__

    def __call__(self, model: LanguageModel, intervention: Intervention = NO_INTERVENTION) -> list[Row]:
        self.disturb(model)
        return super().__call__(model, intervention)

    def disturb(self, model: LanguageModel) -> None: ...


class FitsWithOneRow(Loss):
    def disturb(self, model: LanguageModel) -> None:
        if model.settings.batch_size > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")


class FitsNever(Loss):
    def disturb(self, model: LanguageModel) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")


def cells(folder: Path, measures: Sequence[Measure], drop: tuple[int, ...] = ()) -> list[Cell]:
    checkpoint = resolve(str(folder))
    shared: dict[str, Any] = {"run_id": "e", "checkpoint": checkpoint, "settings": SETTINGS, "task": "loss"}
    return [
        Cell(**shared, part=part, measure=measure, intervention=Intervention(removed=drop))
        for part, measure in enumerate(measures)
    ]


def losses(number: int = PARTS) -> list[Loss]:
    return [Loss(random_shard(rows=1 + part % 5)) for part in range(number)]


def outcomes(executor: Executor, asked: Sequence[Cell]) -> dict[int, Any]:
    """What each part gave: its samples as bytes, or an error; no part comes twice."""
    found: dict[int, Any] = {}
    with closing(executor):
        for cell, result in executor.run_cells(iter([asked])):
            assert cell in asked and cell.part not in found
            found[cell.part] = result if isinstance(result, AvssError) else result.rows[0].samples.tobytes()
    return found


def test_a_cell_that_does_not_fit_is_measured_with_half_the_rows(tiny_llama: Path) -> None:
    """Four rows, two, one; where one does not fit either, that cell fails. The next has four again."""
    shard = random_shard()
    found = outcomes(LocalExecutor(SETTINGS), cells(tiny_llama, [FitsWithOneRow(shard), FitsNever(shard), Loss(shard)]))
    model = opened(tiny_llama, batch_size=1)
    (alone,) = Loss(shard)(model)
    assert found[0] == alone.samples.tobytes()
    assert isinstance(found[1], BatchTooLarge) and "1 x 32 tokens do not fit in memory" in str(found[1])
    assert isinstance(found[2], bytes)


def test_an_error_is_of_its_cell_or_of_its_model(tiny_llama: Path, tmp_path: Path) -> None:
    (bad,) = cells(tiny_llama, losses(1), drop=(99,))
    absent = Checkpoint(name="gone", source="folder", path=str(tmp_path / "gone"), revision="0")
    gone = [
        Cell(run_id="e", checkpoint=absent, settings=SETTINGS, task="loss", part=i, measure=bad.measure) for i in (1, 2)
    ]
    (good,) = (cell for cell in cells(tiny_llama, losses(4)) if cell.part == 3)
    found = outcomes(LocalExecutor(SETTINGS), [bad, *gone, good])
    assert isinstance(found[0], ModelError) and "There is no layer 99" in str(found[0])
    assert all(isinstance(found[part], ModelError) and "gone" in str(found[part]) for part in (1, 2))
    assert isinstance(found[3], bytes)


def test_a_cell_beats_whenever_a_layer_begins_and_leaves_no_trace(tiny_llama: Path) -> None:
    model = opened(tiny_llama)
    (cell,) = cells(tiny_llama, [Loss(random_shard(rows=5))])
    beats: list[None] = []
    with_beat = measure_cell(model, cell, heartbeat=lambda: beats.append(None))
    without = measure_cell(model, cell)
    assert len(beats) == 3 * len(model.layers)  # five rows, two in a batch
    assert with_beat.rows[0].samples.tobytes() == without.rows[0].samples.tobytes()
    assert not any(layer.module._forward_pre_hooks for layer in model.layers)
    assert model.settings.batch_size == 2
