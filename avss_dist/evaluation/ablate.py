"""Measure the ground truth about a model's layers, by the cells of `evaluate`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Unpack

import numpy as np

from avss_dist.analysis.reliability import reliability
from avss_dist.corpus.shards import CorpusPlan
from avss_dist.errors import ConfigError
from avss_dist.evaluation.engine import (
    CellReporter,
    PlannedTask,
    commit,
    evaluation_options,
    failure,
    measure,
    pinned,
    placed,
    plan_text,
    require_intended,
    require_listable,
)
from avss_dist.evaluation.outcomes import Ablation, LayerAblation
from avss_dist.executors.open import open_executor
from avss_dist.intervention import PARTS, Removals, Sublayer, layer_of
from avss_dist.models.checkpoints import Checkpoint, resolve
from avss_dist.models.loading import text_config
from avss_dist.names import LOSS, SUBLAYER_LOSS
from avss_dist.options import EvaluationOptions, with_options
from avss_dist.pruning.ground_truth import mean_ranks
from avss_dist.registry import DAMAGE_TASK, PARTITIONS, SCORES
from avss_dist.settings import DEFAULT_WAREHOUSE, DRAWS, MOST_PASSES, Execution, Settings
from avss_dist.tasks.base import Result, Task
from avss_dist.tasks.damage import Damage
from avss_dist.tasks.gradients import Gradients
from avss_dist.tasks.layer_removal import SHAPLEY, SHARED, LeaveOneOut, Shapley
from avss_dist.text import RedactedURI
from avss_dist.warehouse.store import Store

CHUNK = 4  # permutations in a cell


@with_options(EvaluationOptions)
def ablate(
    model: str | Path,
    *,
    corpus: str,
    warehouse: str | Path = DEFAULT_WAREHOUSE,
    leave_one_out: bool = True,
    sublayers: bool = False,
    shapley: int = 0,
    truncation: bool = True,
    seed: int = 0,
    gradients: bool = False,
    damage: bool = False,
    draws: int = DRAWS,
    skip_sequences: int = 0,
    allow_many: bool = False,
    reporter: CellReporter | None = None,
    **options: Unpack[EvaluationOptions],
) -> Ablation:
    """Measure what each layer of a model does to its loss, and keep it in a warehouse; nothing is measured twice.

    Args:
        model: hub id, folder, or ``.gguf`` file of a causal language model.
        leave_one_out: the loss without each layer (`layer_removal.LeaveOneOut`).
        sublayers: the loss without the attention and without the MLP of each layer.
        shapley: permutations to sample for layer Shapley values (`layer_removal.Shapley`); 0 for none.
        truncation, seed: of the permutations.
        gradients: a backward pass too (`gradients.Gradients`).
        damage: what leaving layers out does, estimated by a few passes (`damage.Damage`).
        draws: of labels, for that.
        skip_sequences: rows at the start of the corpus that are not read.
        allow_many: go on with more than ``settings.MOST_PASSES``.
        options: the fields of ``settings.Settings`` and ``settings.Execution``.

    Raises:
        AvssError: a mistake, or a cell that failed (`RunFailed`); what was measured is kept.
    """
    settings, execution = evaluation_options(dict(options))
    _require_sensible(execution, leave_one_out or sublayers, shapley, seed, gradients, draws if damage else None)
    require_listable(shapley, "permutations", "Lower `shapley`.")
    corpus = RedactedURI(corpus)
    store = Store(warehouse)
    store.create()
    checkpoint = resolve(str(model), trust_remote_code=settings.trust_remote_code)
    with closing(open_executor(execution, settings)) as executor:
        fixed = pinned(settings, checkpoint, executor.device)
        placement = placed(checkpoint, fixed, execution, executor)
        text = plan_text(checkpoint, corpus, fixed, skip_sequences=skip_sequences)
        removals = leave_one_out + len(PARTS) * sublayers + shapley
        _require_intended(checkpoint, text, fixed, removals, allow_many=allow_many)
        seeds = np.random.SeedSequence(seed).generate_state(shapley).tolist()
        tasks = list(_tasks(corpus, text, leave_one_out, gradients, seeds, truncation))
        if sublayers:
            tasks.append(sublayers_task(corpus, text))
        if damage:
            tasks.append(damage_task(corpus, text, draws))
        planned = [PlannedTask(checkpoint=checkpoint, settings=fixed, task=task, placement=placement) for task in tasks]
        cells = [cell for one in planned for cell in one.cells()]
        failed = measure(cells, store, executor, reporter, fresh=execution.fresh)
    found = [result for one in planned for result in commit(one, store)]
    if failed:
        raise failure(failed)
    return _ablation(str(model), corpus, found)


def _require_sensible(
    execution: Execution, losses: bool, shapley: int, seed: int, gradients: bool, draws: int | None
) -> None:
    if min(shapley, seed) < 0:
        raise ConfigError(f"`shapley` and `seed` cannot be negative: {min(shapley, seed)}.")
    if gradients or draws is not None:
        require_gradients(execution)
    if draws is not None and draws < 1:
        raise ConfigError(f"`draws` must be at least 1: {draws}.")
    if not (losses or shapley or gradients or draws):
        raise ConfigError(
            "Nothing would be measured.", "Choose `leave_one_out`, `sublayers`, `shapley`, `gradients` or `damage`."
        )


def require_gradients(execution: Execution) -> None:
    """Refuse a partition that has no backward pass.

    Raises:
        ConfigError: the message names those that have one.
    """
    partition = execution.partition
    if partition != "auto" and not PARTITIONS[partition].backward:
        able = [name for name, info in PARTITIONS.items() if info.backward]
        raise ConfigError(f"`partition` {partition} has no gradients.", f"Use {', '.join(able)}.")


def _require_intended(
    checkpoint: Checkpoint, text: CorpusPlan, settings: Settings, removals: int, *, allow_many: bool
) -> None:
    """Refuse more forward passes than are made unasked.

    Args:
        removals: how often every layer is left out.
    """
    config = text_config(checkpoint, trust_remote_code=settings.trust_remote_code).get_text_config()
    layers = getattr(config, "num_hidden_layers", None) or 1
    batches = text.num_batches(settings.batch_size)
    require_intended(
        removals * layers * batches,
        MOST_PASSES,
        f"Up to {{}} forward passes would be made (batches: {batches:,}, layers: {layers:,}, times that each is left "
        f"out: {removals:,})",
        "Lower `shapley` or `max_sequences`.",
        allow_many=allow_many,
    )


def _tasks(
    corpus: str, text: CorpusPlan, leave_one_out: bool, gradients: bool, seeds: Sequence[int], truncation: bool
) -> Iterator[Task]:
    if gradients:
        yield Task(name=f"{SCORES['taylor'].task}{corpus}", parts=tuple(Gradients(shard) for shard in text.shards))
    if leave_one_out:
        yield Task(name=f"{SCORES['loss'].task}{corpus}", parts=tuple(LeaveOneOut(shard) for shard in text.shards))
    if seeds:
        chunks = [tuple(seeds[start : start + CHUNK]) for start in range(0, len(seeds), CHUNK)]
        parts = tuple(Shapley(shards=text.shards, seeds=chunk, truncation=truncation) for chunk in chunks)
        yield Task(name=f"{SCORES['shapley'].task}{corpus}", parts=parts)


def sublayers_task(corpus: str, text: CorpusPlan) -> Task:
    """The loss on a text without each sublayer."""
    return Task(
        name=f"{SUBLAYER_LOSS}{corpus}", parts=tuple(LeaveOneOut(shard, sublayers=True) for shard in text.shards)
    )


def damage_task(corpus: str, text: CorpusPlan, draws: int = DRAWS) -> Task:
    """The damage of every layer, estimated on a text."""
    parts = tuple(Damage(shard=shard, draws=draws) for shard in text.shards)
    return Task(name=f"{DAMAGE_TASK}{corpus}", parts=parts)


def _ablation(model: str, corpus: str, found: Sequence[Result]) -> Ablation:
    losses = {result.removed: result for result in found if result.metric == LOSS}
    whole = losses.get(())
    of: dict[int, dict[str, Result]] = {layer_of(removed[0]): {} for removed in losses if removed}
    for result in found:
        if result.layer is not None and not result.removed:
            of.setdefault(result.layer, {})[result.metric] = result
    measured = [(name, layer, result.value) for layer, by_metric in of.items() for name, result in by_metric.items()]
    ranks = mean_ranks("damage", measured)
    layers = [
        LayerAblation(
            layer=layer,
            loss=losses.get((layer,)),
            increase=_increase(whole, losses[layer,]) if whole and (layer,) in losses else None,
            sublayers=_of_sublayers(layer, losses),
            shapley=of[layer].pop(SHAPLEY, None),
            shapley_shared=of[layer].pop(SHARED, None),
            estimates=of[layer],
            damage=ranks.get(layer),
        )
        for layer in sorted(of)
    ]
    return Ablation(model=model, corpus=corpus, whole=whole, layers=layers, reliability=_reliability(layers))


def _of_sublayers(layer: int, losses: Mapping[Removals, Result]) -> dict[str, Result]:
    without = {part: losses.get((Sublayer(layer, part),)) for part in PARTS} if () in losses else {}
    return {part: _increase(losses[()], result) for part, result in without.items() if result is not None}


def _reliability(layers: Sequence[LayerAblation]) -> float:
    increases = [layer.increase.samples for layer in layers if layer.increase is not None]
    return reliability(np.stack(increases, axis=1)) if increases else float("nan")


def _increase(whole: Result, without: Result) -> Result:
    samples = without.samples - whole.samples
    return replace(without, samples=samples)
