"""Sparsity plans of a run: measurements for a method, allocation, and storage."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np

from avss_dist.analysis.sparsity_plans import LinearMap, MeasuredMaps, make_plan, plan_uniform
from avss_dist.core.intervention import NO_INTERVENTION, THRESHOLD, TOP_K
from avss_dist.core.names import SPARSITY_TASK
from avss_dist.core.text import RedactedURI
from avss_dist.corpus.shards import CorpusPlan
from avss_dist.evaluation.events import OnEvent
from avss_dist.evaluation.session import EvaluationSession, PlacedModel, checkpoint_of_run, require_partition
from avss_dist.evaluation.tasks import plan_text
from avss_dist.map_plans.budget import MAX_SPARSITY, heavy_tail_ratios, interpolate_path, knapsack, proportional
from avss_dist.map_plans.plans import SparsityPlan
from avss_dist.requests import SparsifyRequest
from avss_dist.stats.layer_stats import Float64
from avss_dist.tasks.base import Measure, Task
from avss_dist.tasks.block_search import GREEDY, HILL, GreedyBlock, Spectra
from avss_dist.tasks.map_damage import SECOND, MapDamage
from avss_dist.warehouse.reader import Warehouse
from avss_dist.warehouse.schema import RunIdentity
from avss_dist.warehouse.store import Store

LEVELS = np.append(np.arange(1, 20) / 20, 0.98)  # sparsities at which `loss` measures the damage
COUNTED = ("uniform", "wina")  # methods that need only the counts of the run
READ_TEXT = ("loss", "teal")
NEED_WEIGHTS = ("loss", "teal", "acttail")  # methods that need whole weights in one process
BASE = 0.05  # TEAL's step for the largest map of a block

Rows = Mapping[tuple[int, str], Float64]
"""Samples by layer and metric, summed over the parts of a task."""


@dataclass(frozen=True, kw_only=True)
class CalibrationText:
    """A model, and the text on which its sparsity plans are calibrated.

    Attributes:
        corpus: name of the text.
        text: the text; None if no method reads it.
    """

    model: PlacedModel
    corpus: RedactedURI
    text: CorpusPlan | None

    def rows(self, session: EvaluationSession, name: str, parts: tuple[Measure, ...]) -> tuple[Rows, str]:
        """Measure the parts of a task, and return their samples and the id of the evaluation."""
        suffix = f":{self.corpus}" if self.text else ""
        planned = self.model.plan(Task(name=f"{SPARSITY_TASK}{name}{suffix}", parts=parts))
        session.run(planned.cells([NO_INTERVENTION]))
        run_id = planned.run_id(NO_INTERVENTION)
        return _summed(session.rows(run_id)), run_id


def _summed(cells: Iterable[Mapping[str, Any]]) -> Rows:
    """Return the samples of each layer and metric, summed over the parts of a task in their order."""
    summed: dict[tuple[int, str], Float64] = {}
    for row in sorted(cells, key=lambda row: row["part"]):
        key = row["layer"], row["metric"]
        samples = np.asarray(row["samples"], np.float64)
        summed[key] = summed[key] + samples if key in summed else samples
    return summed


def sparsify(request: SparsifyRequest, run: Mapping[str, Any], on_event: OnEvent | None = None) -> SparsityPlan:
    """Make a sparsity plan for the checkpoint of a run. Cells that the warehouse has are not measured again.

    Args:
        run: row of ``runs`` of a run that measured the inputs of linear maps (``--site inputs``).

    Raises:
        AvssError: a mistake, or a cell that failed. Measured cells remain in the warehouse.
    """
    target, method, rule = request.target, request.method, request.rule
    store, measured = Store(request.warehouse), MeasuredMaps.of_run(Warehouse(request.warehouse), run)
    if method in COUNTED:
        return store_plan(plan_uniform(measured, target, method, rule=rule), store, run)
    settings = request.settings
    require_whole_weights(request.execution.partition, method)
    checkpoint = checkpoint_of_run(run, trust_remote_code=settings.trust_remote_code)
    corpus = RedactedURI(request.corpus or run["corpus"])
    with EvaluationSession.open(request.warehouse, settings, request.execution, on_event) as session:
        model, text = session.place(checkpoint, settings), None
        if method in READ_TEXT:
            text = plan_text(checkpoint, corpus.full, model.settings)
        source = CalibrationText(model=model, corpus=corpus, text=text)
        plan = allocate(session, source, measured, target, method, rule=rule)
    return store_plan(plan, store, run)


def store_plan(plan: SparsityPlan, store: Store, run: Mapping[str, Any]) -> SparsityPlan:
    """Write a plan to the table ``sparsity``, and return it."""
    identity = RunIdentity(run_id=run["run_id"], model=run["model"], revision=run["revision"], family=run["family"])
    key = plan.intervention.key.sparsity
    assert key is not None
    common = {
        "sparsity_plan": key,
        "method": plan.why["by"],
        "target": plan.why["target"],
        "rule": plan.rule,
        "weighted": plan.weighted,
        "created_at": datetime.now(UTC),
    }
    store.write_rows("sparsity", identity, key[:20], [common | asdict(projection) for projection in plan.projections])
    return plan


def allocate(
    session: EvaluationSession,
    source: CalibrationText,
    measured: MeasuredMaps,
    target: float,
    method: str,
    *,
    rule: str,
) -> SparsityPlan:
    """Return the plan of a method.

    Raises:
        AvssError: a mistake, or a cell that failed. Measured cells remain in the warehouse.
    """
    require_whole_weights(source.model.placement.partition, method)
    if method in COUNTED:
        return plan_uniform(measured, target, method, rule=rule)
    rows, evaluation = source.rows(session, method, _PARTS[method](measured, source.text))
    sparsities, reasons = _ALLOCATIONS[method](measured, target, rows)
    why = {"by": method, "target": target, "evaluation": evaluation, **reasons}
    return make_plan(measured, sparsities, TOP_K if method == "acttail" else THRESHOLD, why, rule=rule)


def _damage_parts(measured: MeasuredMaps, text: CorpusPlan) -> tuple[Measure, ...]:
    thresholds = {(map_.layer, map_.path): tuple(map_.thresholds(LEVELS).tolist()) for map_ in measured.maps}
    return tuple(MapDamage(shard=shard, thresholds=thresholds) for shard in text.shards)


def _greedy_parts(measured: MeasuredMaps, text: CorpusPlan) -> tuple[Measure, ...]:
    by_layer: dict[int, list[LinearMap]] = {}
    for map_ in measured.maps:
        by_layer.setdefault(map_.layer, []).append(map_)
    return tuple(_greedy_block(layer, maps, text) for layer, maps in by_layer.items())


def _greedy_block(layer: int, maps: list[LinearMap], text: CorpusPlan) -> GreedyBlock:
    sizes = {map_.path: map_.weights for map_ in maps}
    steps = {path: BASE * max(sizes.values()) / weights for path, weights in sizes.items()}
    levels = {path: np.arange(step, 1 - 1e-9, step) for path, step in steps.items()}
    thresholds = {map_.path: tuple(map_.thresholds(levels[map_.path]).tolist()) for map_ in maps}
    return GreedyBlock(layer=layer, shards=tuple(text.shards), thresholds=thresholds, steps=steps, sizes=sizes)


def _spectra_parts(measured: MeasuredMaps, _text: CorpusPlan | None) -> tuple[Measure, ...]:
    return tuple(Spectra(layer) for layer in sorted({map_.layer for map_ in measured.maps}))


_PARTS: Mapping[str, Callable[..., tuple[Measure, ...]]] = {
    "loss": _damage_parts,
    "teal": _greedy_parts,
    "acttail": _spectra_parts,
}


def _by_damage(measured: MeasuredMaps, target: float, rows: Rows) -> tuple[Float64, dict[str, Any]]:
    damage = np.array([rows[map_.layer, f"{SECOND}{map_.path}"] for map_ in measured.maps])
    return knapsack(damage, LEVELS, measured.sizes, target), {}


def _by_paths(measured: MeasuredMaps, target: float, rows: Rows) -> tuple[Float64, dict[str, Any]]:
    """Return sparsities with which each block meets the target, interpolated between two steps of its path."""
    sparsities = np.zeros(len(measured.maps))
    layers = np.array([map_.layer for map_ in measured.maps])
    for layer in dict.fromkeys(layers.tolist()):
        block = np.flatnonzero(layers == layer)
        path = np.stack([rows[layer, f"{GREEDY}{measured.maps[i].path}"] for i in block], axis=1)
        sparsities[block] = interpolate_path(path, measured.sizes[block], target)
    return sparsities, {"base_step": BASE}


def _by_tails(measured: MeasuredMaps, target: float, rows: Rows) -> tuple[Float64, dict[str, Any]]:
    """Return sparsities in proportion to ratios that depend on the heavy tail of each weight's spectrum."""
    exponents = np.array([rows[map_.layer, f"{HILL}{map_.path}"][0] for map_ in measured.maps])
    reading = "the mapping of AlphaPruning, which is read as ActTail's: its paper's is not at hand"
    reasons = {"reading": reading, "exponents": "Hill, upper half"}
    return proportional(heavy_tail_ratios(exponents), measured.sizes, target, MAX_SPARSITY), reasons


_ALLOCATIONS = {"loss": _by_damage, "teal": _by_paths, "acttail": _by_tails}


def require_whole_weights(partition: str, method: str) -> None:
    """Refuse a partition in which no process has a whole weight, for a method that needs whole weights.

    Raises:
        ConfigError: the hint names other partitions.
    """
    if method in NEED_WEIGHTS:
        problem = f"has a part of each weight, and {method} needs it whole."
        require_partition(partition, lambda info: not info.gang, problem)
