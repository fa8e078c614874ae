"""The memory of an ablation is estimated before it begins."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.activations import peak_of_saved_bytes
from support.causal_lm import SMALL, opened, packed_or_padded, random_shard
from support.checkpoints import checkpoint_at, llama
from support.devices import devices_of
from support.planning import llama_like

import avss_dist
from avss_dist.core.settings import Settings
from avss_dist.evaluation.events import CellsStarted, MemoryNeeded
from avss_dist.evaluation.memory import activations_of, estimate_memory, measure_bytes
from avss_dist.evaluation.placed import PlacedModel
from avss_dist.models.causal_lm import LanguageModel
from avss_dist.models.checkpoint.size import footprint
from avss_dist.partition.placement import Placement
from avss_dist.tasks.backward import Gradients
from avss_dist.tasks.map_damage import MAX_KEPT_BYTES, RoundingDamage
from avss_dist.tasks.task import Measure
from avss_dist.tasks.text_loss import LeaveOneOut

SIZE = llama_like(7)
SETTINGS = Settings(batch_size=8, sequence_length=256)


def needed(measure: Measure) -> int:
    return measure_bytes(measure, SIZE, activations_of(SIZE, SETTINGS))


def rounding(*formats: str) -> RoundingDamage:
    return RoundingDamage(shard=random_shard(), formats=formats)


def test_each_number_format_takes_more() -> None:
    assert needed(rounding("int4", "int8")) > needed(rounding("int4"))


def test_number_formats_take_no_more_than_what_is_kept_at_once() -> None:
    assert needed(rounding(*["int4"] * 1000)) - needed(rounding("int4")) < MAX_KEPT_BYTES


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, save_checkpoint: Callable[[Any, Path], Path]) -> LanguageModel:
    module = llama(hidden_size=64, intermediate_size=160, num_hidden_layers=6)
    folder = save_checkpoint(module, tmp_path_factory.mktemp("memory") / "llama")
    return opened(folder, dtype="float32", batch_size=4, sequence_length=64)


@pytest.mark.parametrize(("kind", "layers"), [("rounding", 1), ("gradients", 6)])
def test_activations_are_about_as_large_as_estimated(kind: str, layers: int, model: LanguageModel) -> None:
    """Predictions of rounding have those of one layer, gradients those of all."""
    shard = packed_or_padded(rows=4, tokens=64)
    measure = Gradients(shard) if kind == "gradients" else RoundingDamage(shard=shard, formats=("int4",))
    measure(model)  # it is also found on a few tokens that the layers can run again
    held = peak_of_saved_bytes(model.module, lambda: measure(model))
    estimate = layers * activations_of(footprint(model.checkpoint, model.settings), model.settings).graph
    assert estimate / 2 < held < 2 * estimate


def test_nothing_is_estimated_where_a_model_is_divided(tiny_llama: Path) -> None:
    placement = Placement(partition="streaming")
    placed = PlacedModel(checkpoint=checkpoint_at(tiny_llama), settings=Settings(**SMALL), placement=placement)
    assert estimate_memory(placed, [LeaveOneOut(random_shard())], devices_of("cpu", 1 << 30)) is None


def test_the_largest_measure_counts(tiny_llama: Path) -> None:
    placed = PlacedModel(checkpoint=checkpoint_at(tiny_llama), settings=Settings(**SMALL), placement=Placement())
    measures = [Gradients(random_shard()), LeaveOneOut(random_shard())]
    alone = estimate_memory(placed, measures[:1], devices_of("cpu", 1 << 30))
    assert alone == estimate_memory(placed, measures, devices_of("cpu", 1 << 30))


def test_an_ablation_says_what_it_needs_before_it_measures(tiny_llama: Path, tmp_path: Path) -> None:
    kinds = kinds_of_events(tiny_llama, tmp_path)
    assert kinds.index(MemoryNeeded) < kinds.index(CellsStarted)
    assert MemoryNeeded not in kinds_of_events(tiny_llama, tmp_path)  # all is in the warehouse


def kinds_of_events(model: Path, warehouse: Path) -> list[type]:
    events: list[Any] = []
    avss_dist.ablate(model, corpus="builtin:pydoc", warehouse=warehouse, on_event=events.append, **SMALL)
    return [type(event) for event in events]


def test_too_little_memory_comes_with_advice() -> None:
    message = MemoryNeeded(parts={"weights": 10**9, "measuring": 2 * 10**9}, free=10**9).describe()
    assert message == (
        "Needs about 3 GB of memory (weights 1 GB, measuring 2 GB); 1 GB are free. "
        "Lower `batch_size` or `sequence_length`, or set `partition` streaming."
    )
