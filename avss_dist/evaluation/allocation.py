"""How each method makes a sparsity plan: what it asks of the model, the allocation, and corrections of thresholds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow.compute as pc

from avss_dist.analysis.sparsity_plans import Map, Measured, make_plan, plan_uniform
from avss_dist.corpus.shards import CorpusPlan, Shard
from avss_dist.errors import ConfigError
from avss_dist.evaluation.engine import CellReporter, PlannedTask, failure, measure
from avss_dist.executors.base import Executor
from avss_dist.intervention import NO_INTERVENTION, Intervention
from avss_dist.models.checkpoints import Checkpoint
from avss_dist.names import REALIZED, SPARSITY_TASK
from avss_dist.partition.base import Placement
from avss_dist.pruning.selection import PlanError
from avss_dist.registry import PARTITIONS
from avss_dist.settings import THRESHOLD, TOP_K, Settings
from avss_dist.sparsity.allocate import MAX_SPARSITY, heavy_tail_ratios, interpolate_path, knapsack, proportional
from avss_dist.sparsity.plan import SparsityPlan
from avss_dist.stats.layer_stats import Float64
from avss_dist.stats.value_counts import mode_of, size_of_share
from avss_dist.tasks.base import Measure, Task
from avss_dist.tasks.block_search import GREEDY, HILL, KS, GreedyBlock, Spectra
from avss_dist.tasks.map_damage import SECOND, MapDamage
from avss_dist.tasks.map_inputs import COUNTS, MapInputs
from avss_dist.text import RedactedURI
from avss_dist.warehouse.store import Store

LEVELS = np.append(np.arange(1, 20) / 20, 0.98)  # sparsities at which `loss` asks for the damage
COUNTED = ("uniform", "wina", "topp")  # methods that need no more than the run has counted
CHOSEN_BY_TOKEN = ("acttail", "wina", "topp")  # methods without thresholds
READ_TEXT = ("loss", "teal", "scap", "cats")
NEED_WEIGHTS = ("loss", "teal", "acttail")  # whole, in one process
BASE = 0.05  # TEAL's step, of the largest map of a block


Rows = Mapping[tuple[int, str], Float64]
"""The samples of each layer and metric, summed over the parts that have it."""


class Unreachable(PlanError):
    """A method cannot make so many weights sparse."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Asker:
    """Has a model measured, with a sparsity plan on or not."""

    checkpoint: Checkpoint
    settings: Settings
    placement: Placement
    store: Store
    executor: Executor
    reporter: CellReporter | None
    fresh: bool
    corpus: RedactedURI
    text: CorpusPlan | None

    def rows(
        self, name: str, parts: tuple[Measure, ...], intervention: Intervention = NO_INTERVENTION
    ) -> tuple[Rows, str]:
        """Return what the parts of a task give, and the evaluation's id."""
        read = f":{self.corpus}" if self.text else ""
        task = Task(name=f"{SPARSITY_TASK}{name}{read}", parts=parts)
        planned = PlannedTask(checkpoint=self.checkpoint, settings=self.settings, task=task, placement=self.placement)
        if failed := measure(planned.cells([intervention]), self.store, self.executor, self.reporter, fresh=self.fresh):
            raise failure(failed)
        run_id = planned.run_id(intervention)
        return _rows(self.store, run_id), run_id

    def counts(self, rule: str, intervention: Intervention = NO_INTERVENTION) -> tuple[Rows, str]:
        """Return how the values that linear maps read are distributed."""
        return self.rows("inputs", tuple(MapInputs(shard=shard, rule=rule) for shard in self.shards), intervention)

    @property
    def shards(self) -> Sequence[Shard]:
        """Of the text."""
        assert self.text is not None
        return self.text.shards


def allocate(
    ask: Asker, measured: Measured, target: float, method: str, *, rule: str, corrections: int = 0
) -> SparsityPlan:
    """The plan of a method; thresholds are those of the dense model, corrected so many times.

    Raises:
        AvssError: a mistake, or a cell that failed; what was measured is kept.
    """
    require_whole_weights(ask.placement.partition, method)
    return _corrected(ask, _allocated(ask, measured, target, method, rule), corrections)


def _allocated(ask: Asker, measured: Measured, target: float, method: str, rule: str) -> SparsityPlan:
    if method in COUNTED:
        return plan_uniform(measured, target, method, rule=rule)
    if method in _BY_COUNTS:
        counts, evaluation = ask.counts("all" if rule == "dense-prefill" else rule)
        why = {"by": method, "target": target, "evaluation": evaluation}
        return _BY_COUNTS[method](measured, target, counts, why=why, rule=rule)
    rows, evaluation = ask.rows(method, _PARTS[method](measured, ask.text))
    sparsities, more = _ALLOCATIONS[method](measured, target, rows)
    why = {"by": method, "target": target, "evaluation": evaluation, **more}
    return make_plan(measured, sparsities, TOP_K if method == "acttail" else THRESHOLD, why, rule=rule)


def _centered(measured: Measured, target: float, counts: Rows, **fields: Any) -> SparsityPlan:
    """The same sparsity everywhere, of what is near to where inputs are densest."""
    made = make_plan(measured, np.full(len(measured.maps), target), THRESHOLD, **fields)
    maps = []
    for one in made.projections:
        of_map = counts[one.layer, f"{COUNTS}{one.map}"]
        center = mode_of(of_map)
        maps.append(replace(one, sparsity=target, value=size_of_share(of_map, target, center), center=center))
    return replace(made, sparsity=target, projections=tuple(maps))


def _gated(measured: Measured, target: float, counts: Rows, **fields: Any) -> SparsityPlan:
    """The same sparsity of what gates every MLP, which spares up and down; everything else stays dense.

    Raises:
        Unreachable: no MLP has a gate that is seen, or those that have are too few weights.
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


def _corrected(ask: Asker, plan: SparsityPlan, corrections: int) -> SparsityPlan:
    """A plan whose thresholds leave the sparsity that they say while it is on; the pass after the last one tells."""
    farthest = 0.0
    for number in range(corrections + 1 if corrections else 0):
        counts, _ = ask.counts(plan.rule, plan.intervention)
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


def _damage_parts(measured: Measured, text: CorpusPlan) -> tuple[Measure, ...]:
    thresholds = {(one.layer, one.path): tuple(one.thresholds(LEVELS).tolist()) for one in measured.maps}
    return tuple(MapDamage(shard=shard, thresholds=thresholds) for shard in text.shards)


def _greedy_parts(measured: Measured, text: CorpusPlan) -> tuple[Measure, ...]:
    by_layer: dict[int, list[Map]] = {}
    for one in measured.maps:
        by_layer.setdefault(one.layer, []).append(one)
    return tuple(_greedy_block(layer, maps, text) for layer, maps in by_layer.items())


def _greedy_block(layer: int, maps: list[Map], text: CorpusPlan) -> GreedyBlock:
    largest = max(one.weights for one in maps)
    steps = {one.path: BASE * largest / one.weights for one in maps}
    thresholds = {
        one.path: tuple(one.thresholds(np.arange(steps[one.path], 1 - 1e-9, steps[one.path])).tolist()) for one in maps
    }
    sizes = {one.path: one.weights for one in maps}
    return GreedyBlock(layer=layer, shards=tuple(text.shards), thresholds=thresholds, steps=steps, sizes=sizes)


def _spectra_parts(measured: Measured, _text: CorpusPlan | None) -> tuple[Measure, ...]:
    return tuple(Spectra(layer) for layer in sorted({one.layer for one in measured.maps}))


_PARTS: Mapping[str, Callable[..., tuple[Measure, ...]]] = {
    "loss": _damage_parts,
    "teal": _greedy_parts,
    "acttail": _spectra_parts,
}


def _rows(store: Store, run_id: str) -> Rows:
    found: dict[tuple[int, str], Float64] = {}
    cells = store.table("cells", where=pc.field("run_id") == run_id).to_pylist()
    for row in sorted(cells, key=lambda row: row["part"]):
        key = row["layer"], row["metric"]
        samples = np.asarray(row["samples"], np.float64)
        found[key] = found[key] + samples if key in found else samples
    return found


def _by_damage(measured: Measured, target: float, rows: Rows) -> tuple[Float64, dict[str, Any]]:
    damage = np.array([rows[one.layer, f"{SECOND}{one.path}"] for one in measured.maps])
    return knapsack(damage, LEVELS, measured.sizes, target), {}


def _by_paths(measured: Measured, target: float, rows: Rows) -> tuple[Float64, dict[str, Any]]:
    """Each block at the target, between two steps of its path."""
    found = np.zeros(len(measured.maps))
    layers = np.array([one.layer for one in measured.maps])
    for layer in dict.fromkeys(layers.tolist()):
        mine = np.flatnonzero(layers == layer)
        path = np.stack([rows[layer, f"{GREEDY}{measured.maps[i].path}"] for i in mine], axis=1)
        found[mine] = interpolate_path(path, measured.sizes[mine], target)
    return found, {"base_step": BASE}


def _by_tails(measured: Measured, target: float, rows: Rows) -> tuple[Float64, dict[str, Any]]:
    """In proportion to what the heavy tail of each weight lets it bear."""
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
