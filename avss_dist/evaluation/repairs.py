"""Repairs as cells: each is fitted once for a set of layers, stored in the warehouse, and evaluated in place.

A fit is a task like others. Its cell returns the remaining error and a patch, which is stored as a file of its own.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import numpy as np

from avss_dist.core.errors import ModelError
from avss_dist.core.intervention import NO_INTERVENTION, EncodedPatch, Intervention, Removals, stored_removals
from avss_dist.core.settings import Settings
from avss_dist.core.text import RedactedURI
from avss_dist.core.values import NewObject
from avss_dist.corpus.seen import SELF
from avss_dist.corpus.shards import CorpusPlan
from avss_dist.evaluation.limits import require_partition
from avss_dist.evaluation.own_text import OwnTextWriter, keeping_in_cache, require_writable, rows_of_own_text
from avss_dist.evaluation.placed import PlacedModel, PlannedTask
from avss_dist.evaluation.planned_tasks import plan_text
from avss_dist.evaluation.session import EvaluationSession
from avss_dist.models.causal_lm import LanguageModel
from avss_dist.models.change.patches import decode_patch, encode_patch
from avss_dist.models.checkpoint.loading import without_head
from avss_dist.models.checkpoint.locate import resolve
from avss_dist.models.checkpoint.size import load_skeleton
from avss_dist.models.structure.layers import layer_lists
from avss_dist.partition.placement import Placement, with_copies
from avss_dist.plans.choice import PlanError
from avss_dist.plans.plan import Plan
from avss_dist.pruning.checkpoint import require_free, require_prunable
from avss_dist.pruning.repair.cuts import find_cuts
from avss_dist.pruning.repair.registry import REPAIRS, RepairRecord, split_weight
from avss_dist.pruning.repair.repair import Repair, Repaired, fit_repair
from avss_dist.pruning.weights import StoredWeights
from avss_dist.requests import PruneRequest
from avss_dist.tasks.task import Measure, MetricRow, Task
from avss_dist.warehouse.names import REPAIR
from avss_dist.warehouse.storage import Storage

REMAINING_ERROR = "missing"
"""Metric of a fit: remaining error of the hidden states after each cut, on held-back text."""


def read_repaired(patch: EncodedPatch) -> Repaired:
    """Return a fitted repair: its weights, record and notes."""
    tensors, about = decode_patch(patch.read())
    values = json.loads(about)
    return Repaired(tensors, RepairRecord(**values["record"]), values["notes"])


@dataclass(frozen=True, eq=False, kw_only=True)
class FitRepair(Measure):
    """Measure that fits the repair of a model whose layers or experts are removed.

    See `pruning.repair.repair`.

    Attributes:
        repair: with pinned settings.
        layers: module path of the layer list.
        texts: texts to fit it on, tokenized.
    """

    repair: Repair
    layers: str
    texts: tuple[CorpusPlan, ...] = field(repr=False)

    def identity(self) -> NewObject:
        """Return the values that the key is made of."""
        texts = []
        for text in self.texts:
            texts.append([shard.content_hash for shard in text.shards])
        values: NewObject = {"measure": "repair 3", "by": self.repair.by, "texts": texts}
        has_equal_weights = len(set(self.repair.weights)) <= 1
        if not has_equal_weights:
            values["weights"] = self.repair.weights
        return values

    def __call__(self, model: LanguageModel, intervention: Intervention = NO_INTERVENTION) -> list[MetricRow]:
        """Return a row with the errors and the patch of the repair of the model without what is removed.

        The whole model is read.
        """
        settings = replace(self.repair.settings, batch_size=model.settings.batch_size)
        checkpoint = model.checkpoint
        plan = Plan(
            model=checkpoint.name,
            revision=checkpoint.revision,
            num_layers=len(model.layers),
            layers=self.layers,
            drop=intervention.removed,
        )
        stored = StoredWeights.of_checkpoint(checkpoint, plan, settings)
        repaired = fit_repair(checkpoint, plan, replace(self.repair, settings=settings), self.texts, stored, model)
        about = json.dumps({"record": asdict(repaired.record), "notes": list(repaired.notes)})
        errors = np.array([cut.error_after for cut in repaired.record.cuts])
        patch = encode_patch(repaired.tensors, about)
        return [MetricRow(metric=REMAINING_ERROR, samples=errors, weights=np.ones(len(errors)), patch=patch)]


def require_changeable(partition: str) -> None:
    """Refuse a partition in which no repair can be fitted or evaluated.

    Raises:
        ConfigError: the hint names other partitions.
    """
    require_partition(
        partition,
        lambda info: not info.splits_matrices,
        "keeps weights where they cannot be changed, so that nothing is repaired in it.",
        "Use {}, or leave the repairs out.",
    )


def copies_of(placement: Placement, settings: Settings, session: EvaluationSession) -> int:
    """Return the number of model copies that can share a fit: one for each worker that has room beside the others.

    Their number changes the last digits of the fit. On CPUs it is 1 unless replicas were requested.
    """
    if not placement.gpus and session.execution.replicas is None:
        return 1
    devices = session.executor.devices
    if placement.gpus:
        room = devices.count // placement.gpus
    else:
        room = devices.cpus // settings.threads
    return max(1, min(session.executor.replicas(placement), room))


def plan_fits(
    model: PlacedModel,
    layers: str,
    repairs: Iterable[str],
    corpora: Sequence[str],
    copies: int = 1,
    own_text: OwnTextWriter | None = None,
    **reading: Any,
) -> dict[str, PlannedTask]:
    """Return the task of fitting each of several repairs of a checkpoint, by the name of the repair.

    Args:
        layers: module path of the layer list.
        corpora: texts to fit them on, with their weights; see `pruning.repair.repair.Repair`.
        copies: number of model copies that share the text of one fit, for a single fit with several workers.
        own_text: writes the text of the model itself, if it is among them: as many rows as the longest other one has.
        reading: `TextOptions` in place of the model's.

    Raises:
        PlanError: the checkpoint cannot be repaired.
        ConfigError: no repair can be fitted in the partition.
        CorpusError: a text cannot be read, or is too short.
    """
    checkpoint = model.checkpoint
    settings = model.reading(**reading).settings
    if checkpoint.gguf:
        raise PlanError(
            f"'{checkpoint.name}' is a .gguf file.", "Repair the safetensors checkpoint that it was made from."
        )
    require_changeable(model.placement.partition)
    texts = _read_texts(model, corpora, own_text, settings)
    batches = sum(text.num_batches(settings.batch_size) for text in texts)
    placement = with_copies(model.placement, min(copies, batches))
    model = replace(model, settings=settings, placement=placement)
    names = ",".join(RedactedURI(corpus) for corpus in corpora)
    fits = {}
    for by in repairs:
        repair = Repair(by=by, corpora=tuple(corpora), settings=settings)
        fit = FitRepair(repair=repair, layers=layers, texts=texts)
        fits[by] = model.plan(Task(name=f"{REPAIR}{by}:{names}", parts=(fit,)))
    return fits


def _read_texts(
    model: PlacedModel, corpora: Sequence[str], own_text: OwnTextWriter | None, settings: Settings
) -> tuple[CorpusPlan, ...]:
    """Return the rows of texts that repairs are fitted on, in order."""
    names = [split_weight(weighted)[0] for weighted in corpora]
    texts = [plan_text(model.checkpoint, name, settings) for name in names if name != SELF]
    if SELF in names:
        assert own_text is not None
        own_rows = own_text.read_rows(rows_of_own_text(texts, settings.max_sequences), settings)
        for place, name in enumerate(names):
            if name == SELF:
                texts.insert(place, own_rows)
    return tuple(texts)


def fit_of(planned: PlannedTask) -> FitRepair:
    """Return the only part of the task of fitting a repair."""
    return cast(FitRepair, planned.task.parts[0])


Patches = Mapping[tuple[PlannedTask, Removals], EncodedPatch]
"""Patches by the task of their fit and the removals that they are fitted for."""


def repaired_removal(removed: Removals, fit: PlannedTask | None, patches: Patches) -> Intervention:
    """Return the intervention that removes layers and experts, with the patch that was fitted for it.

    Args:
        fit: task of fitting the repair. Without one, or where it has fitted no patch, nothing is repaired.
    """
    patch = None
    if fit is not None:
        patch = patches.get((fit, removed))
    return Intervention(removed=removed, patch=patch)


def fit_repairs(session: EvaluationSession, requested: Sequence[tuple[PlannedTask, Iterable[Removals]]]) -> Patches:
    """Fit each repair to the model without each of its sets of layers and experts.

    A patch that is in the warehouse is not fitted again. Repairs with the most unknowns, which need the most text, are
    fitted first. Fitting stops at the first mistake, so that too little text is reported before other fits take an
    hour. A set of layers that no layer precedes is skipped, unless the repair also changes later layers.

    Args:
        requested: fits, each with sets of layers and experts.

    Returns:
        The patches, earlier fits included.

    Raises:
        AvssError: a mistake, or a fit that failed. Other patches remain in the warehouse.
    """
    fits = [fit for fit, _ in requested]
    fitted = _stored_patches(session, fits)
    missing = []
    most_unknowns_first = sorted(requested, key=lambda request: _unknowns_rank(request[0]), reverse=True)
    for fit, drops in most_unknowns_first:
        every_layer = REPAIRS[fit_of(fit).repair.by].every_layer
        for drop in drops:
            no_layer_before = drop == tuple(range(len(drop)))
            if not drop or (no_layer_before and not every_layer):
                continue
            for cell in fit.cells([Intervention(removed=drop)]):
                if session.fresh:
                    is_stored = session.is_known(cell)
                else:
                    is_stored = (fit, drop) in fitted
                if not is_stored:
                    missing.append(cell)
    session.run(missing, dict.fromkeys(fits, (NO_INTERVENTION,)), fits=True)
    return _stored_patches(session, fits)


def _unknowns_rank(fit: PlannedTask) -> int:
    """Return the place of the repair of a fit among all repairs, in ascending order of unknowns."""
    return list(REPAIRS).index(fit_of(fit).repair.by)


def _stored_patches(session: EvaluationSession, fits: Iterable[PlannedTask]) -> Patches:
    """Return the stored patches that cells of these tasks have fitted."""
    storage = session.store.storage
    stored = storage.patch_keys()
    patches: dict[tuple[PlannedTask, Removals], EncodedPatch] = {}
    if not stored:
        return patches
    for fit in fits:
        for row in session.store.cells.read(fit.run_id()).to_pylist():
            key = row["patch"]
            if key in stored:
                removed = stored_removals(row)
                patches[fit, removed] = EncodedPatch(key, partial(_read_patch, storage, key))
    return patches


_read_patch = lru_cache(maxsize=1)(Storage.read_patch)  # of several cells in a row


def fit_plan(request: PruneRequest, plan: Plan, repair: Repair) -> Repaired:
    """Return the repair of a plan, fitted on workers, or read from the warehouse after an earlier fit.

    Without a warehouse, the fit is not kept.

    Raises:
        AvssError: a mistake, including everything that `pruning.checkpoint.prune` refuses, before the fit begins; or
            the fit failed.
    """
    execution = request.execution
    settings = repair.settings
    require_free(Path(request.output))
    require_changeable(execution.partition)
    find_cuts(plan, every_layer=REPAIRS[repair.by].every_layer)
    checkpoint = resolve(str(request.model), trust_remote_code=settings.trust_remote_code)
    require_prunable(checkpoint, plan, settings)
    layers: str | None = plan.layers
    with suppress(ModelError):
        module, _ = load_skeleton(checkpoint, settings)
        lists = layer_lists(without_head(module), plan.num_layers)
        if list(lists) == [plan.layers]:
            layers = None  # The list is found without a path, as in runs.
    settings = replace(settings, layers=layers)
    with (
        TemporaryDirectory() if request.warehouse is None else nullcontext(request.warehouse) as warehouse,
        EvaluationSession.open(warehouse, settings, execution, request.on_event) as session,
    ):
        model = session.place(checkpoint, settings)
        require_writable(model, repair.corpora)
        own_text = OwnTextWriter(session if request.warehouse else keeping_in_cache(session), model)
        fit = plan_fits(model, plan.layers, [repair.by], repair.corpora, own_text=own_text)[repair.by]
        copies = copies_of(model.placement, model.settings, session)
        (cell,) = fit.cells([plan.intervention])
        # A fit by one copy that is stored is read: another number of copies has other last digits.
        if copies > 1 and not session.is_known(cell):
            fit = plan_fits(model, plan.layers, [repair.by], repair.corpora, copies, own_text)[repair.by]
        patches = fit_repairs(session, [(fit, [plan.drop])])
        return read_repaired(patches[fit, plan.drop])
