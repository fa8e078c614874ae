"""Repairs as work for an executor: each is fitted once for a set of layers, kept in the warehouse, evaluated in place.

A fit is a task like others: its cell gives what is still missing in the stream, and a patch, a file of its own.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache

import numpy as np

from avss_dist.corpus.shards import CorpusPlan
from avss_dist.errors import ConfigError
from avss_dist.evaluation.engine import (
    CellReporter,
    PlannedTask,
    commit,
    failure,
    measure,
    plan_text,
)
from avss_dist.executors.base import Executor
from avss_dist.intervention import NO_INTERVENTION, Intervention, Removals, decode_removals, whole_layers
from avss_dist.models.causal_lm import LanguageModel
from avss_dist.models.checkpoints import Checkpoint
from avss_dist.models.patching import decode_patch, encode_patch
from avss_dist.names import REPAIR
from avss_dist.partition.base import Placement
from avss_dist.partition.copies import with_copies
from avss_dist.pruning.plan import Plan
from avss_dist.pruning.repair.fitter import DataParallel
from avss_dist.pruning.repair.hidden_states import hidden_states_of
from avss_dist.pruning.repair.record import parse_record
from avss_dist.pruning.repair.registry import REPAIRS
from avss_dist.pruning.repair.repair import Repair, Repaired, fit_repair
from avss_dist.pruning.selection import PlanError
from avss_dist.pruning.weights import StoredWeights
from avss_dist.registry import PARTITIONS
from avss_dist.settings import Settings, fingerprint
from avss_dist.tasks.base import Measure, Row, Task, TextLoss
from avss_dist.text import RedactedURI
from avss_dist.warehouse.patches import Patches
from avss_dist.warehouse.store import Store

MISSING = "missing"  # metric of a fit: what is missing in the stream after each cut, on held-back text


@dataclass(frozen=True)
class StoredPatch:
    """A patch in a warehouse; see `intervention.EncodedPatch`."""

    key: str
    patches: Patches = field(compare=False, repr=False)

    def read(self) -> bytes:
        """See `intervention.EncodedPatch`; cells of one patch follow each other."""
        return _read(self.patches, self.key)

    def repaired(self) -> Repaired:
        """What was fitted."""
        tensors, about = decode_patch(self.read())
        said = json.loads(about)
        return Repaired(tensors, parse_record(said["record"]), said["notes"])


@lru_cache(maxsize=1)
def _read(patches: Patches, key: str) -> bytes:
    return patches.read(key)


@dataclass(frozen=True, eq=False, kw_only=True)
class FitRepair:
    """Fits the repair of a model without some layers; see `pruning.repair.repair`.

    Attributes:
        repair: with pinned settings.
        layers: module path of the layer list.
        texts: what it is fitted on, read.
    """

    repair: Repair
    layers: str
    texts: tuple[CorpusPlan, ...] = field(repr=False)

    @property
    def key(self) -> str:
        """See `tasks.base.Measure`."""
        texts = [[shard.content_hash for shard in text.shards] for text in self.texts]
        weights = {"weights": self.repair.weights} if len(set(self.repair.weights)) > 1 else {}
        return fingerprint(measure="repair 3", by=self.repair.by, texts=texts, **weights)

    def __call__(self, model: LanguageModel, intervention: Intervention = NO_INTERVENTION) -> list[Row]:
        """See `tasks.base.Measure`: the model is whole, and the repair is for it without the removed layers."""
        settings = replace(self.repair.settings, batch_size=model.settings.batch_size)
        of = model.checkpoint
        made = Plan(
            model=of.name,
            revision=of.revision,
            num_layers=len(model.layers),
            layers=self.layers,
            drop=whole_layers(intervention.removed),
        )
        stored = StoredWeights.of(of, made, settings).read
        repair = replace(self.repair, settings=settings)
        parallel = DataParallel(model.local_indices, model.all_reduce)
        found = fit_repair(of, hidden_states_of(model), made, repair, self.texts, stored, parallel)
        about = json.dumps({"record": asdict(found.record), "notes": list(found.notes)})
        errors = np.array([cut.error_after for cut in found.record.cuts])
        patch = encode_patch(found.tensors, about)
        return [Row(metric=MISSING, samples=errors, weights=np.ones(len(errors)), patch=patch)]


def require_changeable(partition: str) -> None:
    """Refuse a partition in which no repair can be fitted or evaluated.

    Raises:
        ConfigError: the message names those in which one can.
    """
    if partition != "auto" and not PARTITIONS[partition].changes_weights:
        able = [name for name, info in PARTITIONS.items() if info.changes_weights]
        raise ConfigError(
            f"`partition` {partition} keeps weights where they cannot be changed, so that nothing is repaired in it.",
            f"Use {', '.join(able)}, or leave the repairs out.",
        )


def _repairable(planned: PlannedTask, drops: Iterable[Removals]) -> list[Removals]:
    """The sets of layers of which something can be given back: by a layer before a removed one, or by later ones."""
    fits = [part.repair.by for part in planned.task.parts if isinstance(part, FitRepair)]
    by_later = all(REPAIRS[by].every_layer for by in fits)
    return [drop for drop in drops if drop and (by_later or drop != tuple(range(len(drop))))]


def copies_of(placement: Placement, settings: Settings, executor: Executor) -> int:
    """Copies of the model that can share a fit: as many as there are workers, if there is room for all at once."""
    has = executor.devices
    room = has.count // placement.gpus if placement.gpus else has.cpus // settings.threads
    return max(1, min(executor.replicas(placement), room))


def plan_fits(
    checkpoint: Checkpoint, layers: str, repairs: Iterable[Repair], placement: Placement, copies: int = 1
) -> dict[str, PlannedTask]:
    """The task of fitting each of several repairs of a checkpoint, by what they fit.

    Args:
        layers: module path of the layer list.
        repairs: that differ in what they fit alone; their settings are pinned.
        copies: of the model, which share the text of one fit: for a single fit, where there are several workers.

    Raises:
        PlanError: the checkpoint cannot be repaired.
        ConfigError: the partition keeps weights where they cannot be changed.
        CorpusError: a text cannot be read, or is too short.
    """
    if checkpoint.gguf:
        raise PlanError(f"'{checkpoint.name}' is a .gguf file.", "Repair the checkpoint in safetensors that it is of.")
    require_changeable(placement.partition)
    planned: dict[str, PlannedTask] = {}
    texts: tuple[CorpusPlan, ...] = ()
    for repair in repairs:
        texts = texts or tuple(
            plan_text(checkpoint, corpus, repair.settings, skip_sequences=repair.skip_sequences)
            for corpus in repair.texts
        )
        name = f"{REPAIR}{repair.by}:{','.join(RedactedURI(corpus) for corpus in repair.corpora)}"
        task = Task(name=name, parts=(FitRepair(repair=repair, layers=layers, texts=texts),))
        rows = repair.settings.batch_size
        batches = sum(-(-shard.num_sequences // rows) for text in texts for shard in text.shards)
        planned[repair.by] = PlannedTask(
            checkpoint=checkpoint,
            settings=repair.settings,
            task=task,
            placement=with_copies(placement, min(copies, batches)),
        )
    return planned


def repair_texts(planned: PlannedTask) -> Iterator[Task]:
    """The texts of a fit, each as a task, which `held_out` compares with others."""
    for part in planned.task.parts:
        assert isinstance(part, FitRepair)
        for text in part.texts:
            yield Task(name=text.source, parts=tuple(TextLoss(shard) for shard in text.shards))


def fit_repairs(
    wanted: Sequence[tuple[PlannedTask, Iterable[Removals]]],
    store: Store,
    executor: Executor,
    reporter: CellReporter | None = None,
    *,
    fresh: bool = False,
) -> dict[tuple[str, Removals], StoredPatch]:
    """The patch of each fit without each of its sets of layers, by the fit's id; what was fitted before is found.

    Sets of layers that no layer stands before have none, but of repairs of later layers. Repairs that need the most
    text come first, and a mistake ends the rest: too little text is reported before other fits have taken an hour.

    Raises:
        AvssError: a mistake, or a fit that failed; the others are kept.
    """
    demanding = sorted(wanted, key=lambda fit: -max(map(_text_needed, fit[0].task.parts)))
    cells = [
        cell
        for one, drops in demanding
        for cell in one.cells(Intervention(removed=drop) for drop in _repairable(one, drops))
    ]
    patches, run_ids = Patches(store.storage), [one.run_id() for one, _ in wanted]
    known = {} if fresh else _fitted(store, run_ids, patches.keys())
    missing = [cell for cell in cells if (cell.run_id, cell.intervention.removed) not in known]
    failed = measure(missing, store, executor, reporter, fresh=True, to_first_mistake=True)
    for one, _ in wanted:
        commit(one, store)
    if failed:
        raise failure(failed)
    return {key: StoredPatch(patch, patches) for key, patch in _fitted(store, run_ids, patches.keys()).items()}


def _text_needed(part: Measure) -> int:
    """Orders fits by how much text they need: as wide as the MLP is inside, as the stream is, or hardly any."""
    assert isinstance(part, FitRepair)
    return REPAIRS[part.repair.by].text_rank


def _fitted(store: Store, run_ids: Sequence[str], there: set[str]) -> Mapping[tuple[str, Removals], str]:
    """The keys of patches that cells of these fits gave, and that are there."""
    if not there:
        return {}
    return {
        (run_id, decode_removals(row["drop"])): row["patch"]
        for run_id in dict.fromkeys(run_ids)
        for row in store.cells(run_id).select(["drop", "metric", "patch"]).to_pylist()
        if row["metric"] == MISSING and row["patch"] in there
    }
