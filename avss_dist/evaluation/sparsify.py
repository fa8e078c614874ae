"""Sparsity plans of a run: measurement of the inputs of a method, allocation, correction, and storage."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from typing import Any

import numpy as np

from avss_dist.analysis.sparsity_plans import LinearMap, MeasuredMaps, make_plan, plan_uniform, require_target
from avss_dist.core.errors import ConfigError
from avss_dist.core.intervention import NO_INTERVENTION, THRESHOLD, TOP_K, Intervention
from avss_dist.core.names import REALIZED, SPARSITY_TASK
from avss_dist.core.registry import PARTITIONS
from avss_dist.core.text import RedactedURI
from avss_dist.corpus.shards import CorpusPlan, Shard
from avss_dist.evaluation.events import OnEvent
from avss_dist.evaluation.session import EvaluationSession, PlacedModel, evaluation_options
from avss_dist.evaluation.subjects import checkpoint_of_run
from avss_dist.evaluation.tasks import plan_text
from avss_dist.pruning.selection import PlanError
from avss_dist.sparsity.allocate import MAX_SPARSITY, heavy_tail_ratios, interpolate_path, knapsack, proportional
from avss_dist.sparsity.plan import SparsityPlan
from avss_dist.stats.layer_stats import Float64
from avss_dist.stats.value_counts import mode_of, size_of_share
from avss_dist.tasks.base import Measure, Task
from avss_dist.tasks.block_search import GREEDY, HILL, KS, GreedyBlock, Spectra
from avss_dist.tasks.map_damage import SECOND, MapDamage
from avss_dist.tasks.map_inputs import COUNTS, MapInputs
from avss_dist.warehouse.reader import Warehouse
from avss_dist.warehouse.schema import RunIdentity
from avss_dist.warehouse.store import Store

LEVELS = np.append(np.arange(1, 20) / 20, 0.98)  # sparsities at which `loss` asks for the damage
COUNTED = ("uniform", "wina", "topp")  # methods that need no more than the run has counted
CHOSEN_BY_TOKEN = ("acttail", "wina", "topp")  # methods without thresholds
READ_TEXT = ("loss", "teal", "scap", "cats")
NEED_WEIGHTS = ("loss", "teal", "acttail")  # whole, in one process
BASE = 0.05  # TEAL's step, of the largest map of a block


Rows = Mapping[tuple[int, str], Float64]
"""Samples by layer and metric, summed over the parts of a task."""


class Unreachable(PlanError):
    """Error of a method that cannot reach a sparsity."""


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

    @property
    def shards(self) -> Sequence[Shard]:
        """Shards of the text."""
        assert self.text is not None
        return self.text.shards

    def rows(
        self,
        session: EvaluationSession,
        name: str,
        parts: tuple[Measure, ...],
        intervention: Intervention = NO_INTERVENTION,
    ) -> tuple[Rows, str]:
        """Measure the parts of a task; return their samples, and the id of the evaluation."""
        read = f":{self.corpus}" if self.text else ""
        planned = self.model.plan(Task(name=f"{SPARSITY_TASK}{name}{read}", parts=parts))
        session.run(planned.cells([intervention]))
        run_id = planned.run_id(intervention)
        return _summed(session.rows(run_id)), run_id

    def counts(
        self, session: EvaluationSession, rule: str, intervention: Intervention = NO_INTERVENTION
    ) -> tuple[Rows, str]:
        """Measure the distribution of the inputs of linear maps; return it as `rows` does."""
        parts = tuple(MapInputs(shard=shard, rule=rule) for shard in self.shards)
        return self.rows(session, "inputs", parts, intervention)


def _summed(cells: Iterable[Mapping[str, Any]]) -> Rows:
    """Return the samples of each layer and metric, summed over parts in their order."""
    summed: dict[tuple[int, str], Float64] = {}
    for row in sorted(cells, key=lambda row: row["part"]):
        key = row["layer"], row["metric"]
        samples = np.asarray(row["samples"], np.float64)
        summed[key] = summed[key] + samples if key in summed else samples
    return summed


def sparsify(
    warehouse: str,
    run: Mapping[str, Any],
    target: float,
    *,
    method: str,
    corpus: str | None = None,
    skip_sequences: int = 0,
    reporter: OnEvent | None = None,
    rule: str = "all",
    pattern: str | None = None,
    corrections: int = 0,
    **options: Any,
) -> SparsityPlan:
    """Make a sparsity plan for the checkpoint of a run that measured ``--site inputs``; nothing is measured twice.

    Args:
        run: its row of ``runs``.
        target: the share of the weights of all linear maps that meet a zero.
        method: see `sparsity.plan.METHODS`.
        corpus: text that ``loss``, ``teal`` and corrections read; the run's own by default.
        skip_sequences: rows at its start that are not read.
        rule, pattern: see `SparsityPlan`.
        corrections: number of corrections of the thresholds, each by a pass with the plan applied.
        options: the fields of ``settings.Settings`` and ``settings.Execution``.

    Raises:
        AvssError: a mistake, or a cell that failed; what was measured is kept.
    """
    require_target(target)
    _require_correctable(corrections, method, rule, pattern)
    store, measured = Store(warehouse), MeasuredMaps.of_run(Warehouse(warehouse), run)
    if not corrections and (pattern is not None or method in COUNTED):
        return keep_plan(plan_uniform(measured, target, method, rule=rule, pattern=pattern), store, run)
    settings, execution = evaluation_options(dict(options))
    require_whole_weights(execution.partition, method)
    checkpoint = checkpoint_of_run(run, trust_remote_code=settings.trust_remote_code)
    named = RedactedURI(corpus or run["corpus"])
    with EvaluationSession.open(warehouse, settings, execution, reporter) as session:
        model, reads = session.place(checkpoint, settings), corrections or method in READ_TEXT
        text = plan_text(checkpoint, named.full, model.settings, skip_sequences=skip_sequences) if reads else None
        source = CalibrationText(model=model, corpus=named, text=text)
        made = allocate(session, source, measured, target, method, rule=rule, corrections=corrections)
    return keep_plan(made, store, run)


def keep_plan(plan: SparsityPlan, store: Store, run: Mapping[str, Any]) -> SparsityPlan:
    """Write a plan to the table ``sparsity``, and return it."""
    identity = RunIdentity(run_id=run["run_id"], model=run["model"], revision=run["revision"], family=run["family"])
    key = plan.intervention.key.sparsity
    assert key is not None
    common = {
        "sparsity_plan": key,
        "method": plan.why["by"],
        "target": plan.why["target"],
        "rule": plan.rule,
        "pattern": plan.pattern,
        "weighted": plan.weighted,
        "created_at": datetime.now(UTC),
    }
    store.write_sparsity(identity, key[:20], [common | asdict(one) for one in plan.projections])
    return plan


def _require_correctable(corrections: int, method: str, rule: str, pattern: str | None) -> None:
    """Refuse corrections of plans without thresholds, or with a rule that leaves prompts dense.

    Raises:
        ConfigError: the message says why.
    """
    if corrections and (pattern is not None or method in CHOSEN_BY_TOKEN):
        what = f"`pattern` {pattern}" if pattern else f"`method` {method}"
        raise ConfigError(f"{what} has no threshold that `corrections` could correct.", "Leave them out.")
    if corrections and rule == "dense-prefill":
        raise ConfigError("`corrections` read prompts, and `rule` dense-prefill makes nothing of a prompt sparse.")


def allocate(
    session: EvaluationSession,
    source: CalibrationText,
    measured: MeasuredMaps,
    target: float,
    method: str,
    *,
    rule: str,
    corrections: int = 0,
) -> SparsityPlan:
    """Return the plan of a method, with thresholds of the dense model that are corrected ``corrections`` times.

    Raises:
        AvssError: a mistake, or a cell that failed; what was measured is kept.
    """
    require_whole_weights(source.model.placement.partition, method)
    return _corrected(session, source, _allocated(session, source, measured, target, method, rule), corrections)


def _allocated(
    session: EvaluationSession, source: CalibrationText, measured: MeasuredMaps, target: float, method: str, rule: str
) -> SparsityPlan:
    if method in COUNTED:
        return plan_uniform(measured, target, method, rule=rule)
    if method in _BY_COUNTS:
        counts, evaluation = source.counts(session, "all" if rule == "dense-prefill" else rule)
        why = {"by": method, "target": target, "evaluation": evaluation}
        return _BY_COUNTS[method](measured, target, counts, why=why, rule=rule)
    rows, evaluation = source.rows(session, method, _PARTS[method](measured, source.text))
    sparsities, more = _ALLOCATIONS[method](measured, target, rows)
    why = {"by": method, "target": target, "evaluation": evaluation, **more}
    return make_plan(measured, sparsities, TOP_K if method == "acttail" else THRESHOLD, why, rule=rule)


def _centered(measured: MeasuredMaps, target: float, counts: Rows, **fields: Any) -> SparsityPlan:
    """Return a plan with the same sparsity for every map, of the inputs closest to their densest value."""
    made = make_plan(measured, np.full(len(measured.maps), target), THRESHOLD, **fields)
    maps = []
    for one in made.projections:
        of_map = counts[one.layer, f"{COUNTS}{one.map}"]
        center = mode_of(of_map)
        maps.append(replace(one, sparsity=target, value=size_of_share(of_map, target, center), center=center))
    return replace(made, sparsity=target, projections=tuple(maps))


def _gated(measured: MeasuredMaps, target: float, counts: Rows, **fields: Any) -> SparsityPlan:
    """Return a plan with the same sparsity for the gate of every MLP, which spares up and down; others stay dense.

    Raises:
        Unreachable: no MLP has a known gate, or the gated MLPs have too few weights.
    """
    made = make_plan(measured, np.zeros(len(measured.maps)), THRESHOLD, **fields)
    maps = {(one.layer, one.map): replace(one, value=0.0, sparsity=0.0) for one in made.projections}
    whole, known = made.weights, set(maps)
    for layer, metric in counts:
        if (key := (layer, metric.removeprefix(COUNTS))) not in known:
            up = [one for one in made.projections if (one.layer, one.site) == (layer, "up_input")][-1]
            down = next(one for one in made.projections if (one.layer, one.site) == (layer, "neuron"))
            del maps[layer, up.map], maps[layer, down.map]
            maps[key] = replace(down, map=key[1], outputs=up.inputs + down.outputs, sparsity=0.0, value=0.0)
    able = sum(one.outputs * one.inputs for key, one in maps.items() if key not in known) / whole
    if target > MAX_SPARSITY * able:
        said = f"`method` cats makes {able:.1%} of the weights sparse, at most" if able else "No MLP has a gate: cats"
        raise Unreachable(f"{said}, and {target:.0%} of all are wanted.", "Lower `target`, or take another method.")
    share = target / able
    for key in maps.keys() - known:
        size = size_of_share(counts[key[0], f"{COUNTS}{key[1]}"], share)
        maps[key] = replace(maps[key], sparsity=share, value=size)
    return replace(made, sparsity=target, projections=tuple(maps[key] for key in sorted(maps)))


_BY_COUNTS: Mapping[str, Callable[..., SparsityPlan]] = {"scap": _centered, "cats": _gated}


def _corrected(
    session: EvaluationSession, source: CalibrationText, plan: SparsityPlan, corrections: int
) -> SparsityPlan:
    """Return a plan with thresholds corrected by passes with the plan applied; one more pass measures the rest."""
    farthest = 0.0
    for number in range(corrections + 1 if corrections else 0):
        counts, _ = source.counts(session, plan.rule, plan.intervention)
        maps, off = [], []
        for one in plan.projections:
            of_map = counts[one.layer, f"{COUNTS}{one.map}"]
            realized = counts[one.layer, f"{REALIZED}{one.map}"][0] / of_map[-1]
            off.append(abs(realized - one.sparsity))
            maps.append(replace(one, value=size_of_share(of_map, one.sparsity, one.center)))
        farthest = max(off)
        if number < corrections:
            plan = replace(plan, projections=tuple(maps))
    if not corrections:
        return plan
    times = f"{corrections} correction{'s' * (corrections > 1)}"
    said = f"After {times}, on their own text, every map is within {farthest:.2%} of its sparsity."
    return replace(plan, why={**plan.why, "corrections": corrections}, findings=(*plan.findings, said))


def _damage_parts(measured: MeasuredMaps, text: CorpusPlan) -> tuple[Measure, ...]:
    thresholds = {(one.layer, one.path): tuple(one.thresholds(LEVELS).tolist()) for one in measured.maps}
    return tuple(MapDamage(shard=shard, thresholds=thresholds) for shard in text.shards)


def _greedy_parts(measured: MeasuredMaps, text: CorpusPlan) -> tuple[Measure, ...]:
    by_layer: dict[int, list[LinearMap]] = {}
    for one in measured.maps:
        by_layer.setdefault(one.layer, []).append(one)
    return tuple(_greedy_block(layer, maps, text) for layer, maps in by_layer.items())


def _greedy_block(layer: int, maps: list[LinearMap], text: CorpusPlan) -> GreedyBlock:
    largest = max(one.weights for one in maps)
    steps = {one.path: BASE * largest / one.weights for one in maps}
    thresholds = {
        one.path: tuple(one.thresholds(np.arange(steps[one.path], 1 - 1e-9, steps[one.path])).tolist()) for one in maps
    }
    sizes = {one.path: one.weights for one in maps}
    return GreedyBlock(layer=layer, shards=tuple(text.shards), thresholds=thresholds, steps=steps, sizes=sizes)


def _spectra_parts(measured: MeasuredMaps, _text: CorpusPlan | None) -> tuple[Measure, ...]:
    return tuple(Spectra(layer) for layer in sorted({one.layer for one in measured.maps}))


_PARTS: Mapping[str, Callable[..., tuple[Measure, ...]]] = {
    "loss": _damage_parts,
    "teal": _greedy_parts,
    "acttail": _spectra_parts,
}


def _by_damage(measured: MeasuredMaps, target: float, rows: Rows) -> tuple[Float64, dict[str, Any]]:
    damage = np.array([rows[one.layer, f"{SECOND}{one.path}"] for one in measured.maps])
    return knapsack(damage, LEVELS, measured.sizes, target), {}


def _by_paths(measured: MeasuredMaps, target: float, rows: Rows) -> tuple[Float64, dict[str, Any]]:
    """Return sparsities by which each block meets the target, interpolated between two steps of its path."""
    found = np.zeros(len(measured.maps))
    layers = np.array([one.layer for one in measured.maps])
    for layer in dict.fromkeys(layers.tolist()):
        mine = np.flatnonzero(layers == layer)
        path = np.stack([rows[layer, f"{GREEDY}{measured.maps[i].path}"] for i in mine], axis=1)
        found[mine] = interpolate_path(path, measured.sizes[mine], target)
    return found, {"base_step": BASE}


def _by_tails(measured: MeasuredMaps, target: float, rows: Rows) -> tuple[Float64, dict[str, Any]]:
    """Return sparsities in proportion to the ratios by the heavy tail of each weight."""
    exponents = np.array([rows[one.layer, f"{HILL}{one.path}"][0] for one in measured.maps])
    other = np.array([rows[one.layer, f"{KS}{one.path}"][0] for one in measured.maps])
    read = "the mapping of AlphaPruning, which is read as ActTail's: its paper's is not at hand"
    more = {"reading": read, "exponents": "Hill, upper half", "ks_median": round(float(np.median(other)), 4)}
    return proportional(heavy_tail_ratios(exponents), measured.sizes, target, MAX_SPARSITY), more


_ALLOCATIONS = {"loss": _by_damage, "teal": _by_paths, "acttail": _by_tails}


def require_whole_weights(partition: str, method: str) -> None:
    """Refuse a partition in which a process has no whole weight.

    Raises:
        ConfigError: the message names those in which one has.
    """
    if method in NEED_WEIGHTS and partition != "auto" and not PARTITIONS[partition].changes_weights:
        able = ", ".join(name for name, info in PARTITIONS.items() if info.changes_weights)
        raise ConfigError(
            f"`partition` {partition} has a part of each weight, and {method} needs it whole.", f"Use {able}."
        )
