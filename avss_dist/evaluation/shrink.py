"""Shrink a model: score its layers, choose, repair, evaluate on text that nothing else has seen, write the checkpoint.

Of each text, the first rows are scored on, the next are evaluated on, and a repair is fitted on the rest. All that is
measured is kept in a warehouse, so the same command goes on where it was.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from math import ceil
from pathlib import Path
from typing import Any, Protocol, Unpack

import pyarrow as pa

from avss_dist.analysis.plans import plan_layers
from avss_dist.errors import CorpusError
from avss_dist.evaluation.ablate import ablate
from avss_dist.evaluation.attempts import Attempt, Bench
from avss_dist.evaluation.engine import (
    CellReporter,
    PlannedTask,
    SilentCells,
    evaluation_options,
    pinned,
    placed,
    plan_text,
)
from avss_dist.evaluation.held_out import refuse_overlap, refuse_repair_text, refuse_text
from avss_dist.evaluation.make_tasks import make_task
from avss_dist.evaluation.repaired_search import repaired_losses, searched_plan
from avss_dist.evaluation.repairs import copies_of, plan_fits, repair_texts, require_changeable
from avss_dist.executors.base import Executor
from avss_dist.executors.open import open_executor
from avss_dist.models.auto import require_head
from avss_dist.models.checkpoints import Checkpoint, resolve
from avss_dist.models.loading import load_tokenizer, text_config
from avss_dist.names import PERPLEXITY
from avss_dist.options import PromptOptions, ShrinkingOptions, with_options
from avss_dist.partition.base import Placement
from avss_dist.pruning.checkpoint import prune, require_copyable, require_free, require_prunable
from avss_dist.pruning.plan import Plan
from avss_dist.pruning.repair.record import RepairRecord
from avss_dist.pruning.repair.registry import NO_REPAIR
from avss_dist.pruning.repair.repair import Repair
from avss_dist.pruning.repair.requirements import tokens_needed
from avss_dist.pruning.repair.splits import HELD_BACK, count_fitted, split_texts
from avss_dist.pruning.selection import PlanError
from avss_dist.pruning.shrinking import GREEDY, Shrinking
from avss_dist.registry import SCORES
from avss_dist.results import TabularResult
from avss_dist.runs.api import score
from avss_dist.runs.reporter import Reporter
from avss_dist.settings import LOWEST_SHARE, Execution, Settings
from avss_dist.text import RedactedURI
from avss_dist.warehouse.reader import Warehouse
from avss_dist.warehouse.store import Store

ROWS = 256  # of each text, where nothing is said
HELD_OUT = 8  # one row of so many is scored on, and one is evaluated on
SCORED = 16  # rows that are scored on, at most: more rank layers hardly better, and the damage takes 8 passes over them


class ShrinkReporter(Protocol):
    """Hears how it goes."""

    @property
    def scoring(self) -> Reporter:
        """Hears of the scores of layers."""

    @property
    def cells(self) -> CellReporter:
        """Hears of what is fitted and evaluated."""

    def writing(self, size: int) -> None:
        """So many bytes of weights were written, after others."""


class SilentShrink:
    """Says nothing."""

    scoring: Reporter = Reporter()
    cells: CellReporter = SilentCells()

    def writing(self, size: int) -> None: ...


@dataclass(frozen=True, kw_only=True, repr=False)
class Shrunk(TabularResult):
    """A model that was made smaller.

    Attributes:
        folder: of the checkpoint; ``bytes`` of its weights.
        best: the plan that was carried out.
        curve: every plan that was tried, by the number of layers that it drops.
        record: what was repaired, if anything was.
        difference: see `pruning.checkpoint.prune`.
        notes: what is to be known of the checkpoint.
    """

    folder: str
    bytes: int
    best: Attempt
    curve: Sequence[Attempt]
    record: RepairRecord | None
    difference: float | None
    notes: Sequence[str]

    _bars = ("kept",)

    def table(self) -> pa.Table:
        """A row for each plan that was tried: the layers that it drops, and what is kept."""
        return pa.Table.from_pylist([{"drop": [*one.plan.drop], "kept": one.kept} for one in self.curve])

    def summary(self) -> str:
        """Where it is, and what it keeps."""
        plan = self.best.plan
        return f"{self.folder}, {len(plan.keep)} of {plan.num_layers} layers, {self.best.kept:z.1%} kept"


@dataclass(frozen=True)
class Parts:
    """Rows of each text: those that are scored on, then those that are evaluated on, then those that are repaired on.

    Attributes:
        scored, evaluated: rows of the first two.
        rows: of all three, at most.
    """

    scored: int
    evaluated: int
    rows: int

    @property
    def held_out(self) -> int:
        """Rows that are not repaired on."""
        return self.scored + self.evaluated


@with_options(ShrinkingOptions, Shrinking)
def shrink(
    model: str | Path,
    *,
    corpus: str,
    output: str | Path,
    warehouse: str | Path | None = None,
    reporter: ShrinkReporter | None = None,
    **options: Unpack[ShrinkingOptions],
) -> Shrunk:
    """Write a smaller checkpoint of a causal language model, and say what it keeps; what is done is not repeated.

    Args:
        model: hub id or folder.
        corpus: see `Shrinking`.
        output: folder of the checkpoint, which does not exist, or is empty; it appears when it is whole.
        warehouse: where all that is measured is kept; ``output`` with ``-warehouse`` after it by default.
        options: the fields of `Shrinking`, ``settings.Settings`` and ``settings.Execution``; ``max_sequences`` is for
            each text, over all of its parts.

    Raises:
        AvssError: a mistake, or something that failed; what was measured is kept.
    """
    given: dict[str, Any] = dict(options)
    request = Shrinking(corpus=corpus, **{n: given.pop(n) for n in options if n in Shrinking.__dataclass_fields__})
    settings, execution = evaluation_options(given)
    require_free(Path(output))
    if request.repair != NO_REPAIR:
        require_changeable(execution.partition)
    reporter = reporter or SilentShrink()
    checkpoint = resolve(str(model), trust_remote_code=settings.trust_remote_code)
    require_head(checkpoint.name, text_config(checkpoint, trust_remote_code=settings.trust_remote_code))
    require_copyable(checkpoint)
    needed = 0 if request.repair == NO_REPAIR else tokens_needed(checkpoint, request.repair, settings)
    parts = cut(checkpoint, request.texts, settings)
    require_tokens(checkpoint, request, parts, settings, needed)
    store = Store(warehouse or f"{output}-warehouse")
    store.create()
    with closing(open_executor(execution, settings)) as executor:
        executor.connect()  # scores are measured by executors of their own
        made = partial(
            _scored_plan(str(model), request, store, parts, given, reporter), first=request.first, last=request.last
        )
        example = made(count=1)
        require_prunable(checkpoint, example, settings)
        bench = _bench(checkpoint, request, parts, example, settings, execution, store, executor)
        bench.reporter = reporter.cells
        if request.by == GREEDY:
            made = partial(searched_plan, made, request, repaired_losses(bench, request, parts.scored))
        if request.keep is None:
            best = bench.attempt(made(share=request.share or LOWEST_SHARE))
            curve = [best]
        else:
            most = min(example.num_layers - 1, example.num_layers - request.first - request.last)
            best, curve = _most(bench, made, most, request.keep)
    plan = replace(best.plan, evaluated=tuple(task.describe() for task in best.tasks))
    done = prune(
        str(model),
        plan,
        output,
        repair=best.patch.repaired() if best.patch else None,
        trust_remote_code=settings.trust_remote_code,
        copied=reporter.writing,
    )
    return Shrunk(
        folder=done["folder"],
        bytes=done["bytes"],
        best=replace(best, plan=plan),
        curve=curve,
        record=done["repair"],
        difference=done["difference"],
        notes=done["notes"],
    )


def cut(checkpoint: Checkpoint, texts: Sequence[str], settings: Settings) -> Parts:
    """The parts of texts; the shortest says how many rows are held out.

    Raises:
        CorpusError: a text cannot be read, is paired, or has too few rows.
    """
    rows = settings.max_sequences or ROWS
    read = replace(settings, max_sequences=rows)
    plans = {text: plan_text(checkpoint, text, read) for text in texts}
    if paired := [text for text, made in plans.items() if made.shards[0].pairing]:
        raise CorpusError(
            f"{paired[0]} is paired text, whose rows belong together: it has no part to repair on.",
            "Name its answers as plain text, such as FILE.jsonl:FIELD.",
        )
    found = {text: made.num_sequences for text, made in plans.items()}
    shortest = min(found, key=lambda text: found[text])
    if found[shortest] < HELD_OUT:
        raise CorpusError(
            f"{shortest} has {found[shortest]} rows; a part to score on, one to evaluate on and one to repair on take "
            f"{HELD_OUT} at least.",
            "Name a longer text, lower `sequence_length`, or raise `max_sequences`.",
        )
    part = found[shortest] // HELD_OUT
    return Parts(min(part, SCORED), part, rows)


def require_tokens(checkpoint: Checkpoint, request: Shrinking, parts: Parts, settings: Settings, needed: int) -> None:
    """Refuse texts whose rows for the repair hold too few tokens to fit it to.

    Args:
        needed: tokens that the repair is fitted to at least.

    Raises:
        CorpusError: the hint says how many rows suffice, where there are so many.
    """
    if not needed:
        return
    given, rows = _fitted_tokens(checkpoint, request, parts, settings)
    if given >= needed:
        return
    enough = next(
        n
        for n in itertools.count(parts.rows + 1)
        if _fitted_rows(n) * len(request.repair_texts) * given >= needed * rows
    )
    more = cut(checkpoint, request.texts, replace(settings, max_sequences=enough))
    suffices = _fitted_tokens(checkpoint, request, more, settings)[0] >= needed
    longer = f"Set `max_sequences` to {enough} or more" if suffices else "Give longer texts"
    raise CorpusError(
        f"The repair {request.repair} of this model needs {needed:,} tokens to fit to at least; {given:,} are given.",
        f"{longer}, or choose a `repair` of fewer unknowns (channel, scale).",
    )


def _fitted_tokens(checkpoint: Checkpoint, request: Shrinking, parts: Parts, settings: Settings) -> tuple[int, int]:
    """Return how many tokens, and of how many rows, the repair is fitted to."""
    read = replace(settings, max_sequences=parts.rows - parts.held_out)
    texts = [plan_text(checkpoint, text, read, skip_sequences=parts.held_out) for text in request.repair_texts]
    tokens = sum(count_fitted(split_texts(texts, settings.batch_size), len(texts)))
    return tokens, sum(text.num_sequences - ceil(text.num_sequences / HELD_BACK) for text in texts)


def _fitted_rows(rows: int) -> int:
    """Return how many rows of a text the repair is fitted to, of so many in all."""
    part = rows // HELD_OUT
    repaired = rows - min(part, SCORED) - part
    return repaired - ceil(repaired / HELD_BACK)


def _scored_plan(
    model: str, request: Shrinking, store: Store, parts: Parts, options: dict[str, Any], reporter: ShrinkReporter
) -> Callable[..., Plan]:
    """Measure what layers are chosen by; returns what makes plans of it."""
    warehouse, options = store.root.full, options | {"max_sequences": parts.scored}
    run = score(
        model, corpus=request.corpus, warehouse=warehouse, reporter=reporter.scoring, sites=("block",), **options
    )
    if SCORES[request.ranked_by].task:
        how = {**SCORES[request.ranked_by].ablate, **options}
        ablate(model, corpus=request.corpus, warehouse=warehouse, reporter=reporter.cells, **how)
    opened = Warehouse(warehouse)
    row = opened.run(run.run_id)
    assert row is not None
    return partial(plan_layers, opened, row, by=request.ranked_by)


def _bench(
    checkpoint: Checkpoint,
    request: Shrinking,
    parts: Parts,
    example: Plan,
    settings: Settings,
    execution: Execution,
    store: Store,
    executor: Executor,
) -> Bench:
    """What plans like the example are tried with; texts of two uses that overlap are refused."""
    fixed = pinned(settings, checkpoint, executor.device)
    placement = placed(checkpoint, fixed, execution, executor)
    names = request.tasks or [f"{PERPLEXITY}{text.full}" for text in request.texts]
    tasks = {str(n): _task(checkpoint, n, request, parts, fixed, placement) for n in map(RedactedURI, names)}
    fit = None
    if request.repair != NO_REPAIR:
        skip, corpora = parts.held_out, request.repair_corpora or (request.corpus,)
        read = replace(fixed, max_sequences=parts.rows - skip)
        repair = Repair(by=request.repair, corpora=corpora, skip_sequences=skip, settings=read)
        copies = copies_of(placement, fixed, executor)
        fit = plan_fits(checkpoint, example.layers, [repair], placement, copies)[request.repair]
    if not request.allow_overlap:
        _refuse_overlaps(checkpoint, request, tasks, fit, str(example.run_id), store, parts)
    return Bench(tasks=tasks, fit=fit, store=store, executor=executor, fresh=execution.fresh)


def _task(
    checkpoint: Checkpoint, name: str, request: Shrinking, parts: Parts, settings: Settings, placement: Placement
) -> PlannedTask:
    read = replace(settings, max_sequences=parts.evaluated)
    task = make_task(
        checkpoint,
        name,
        read,
        skip_sequences=parts.scored,
        limit=request.limit,
        prompting=PromptOptions(num_fewshot=request.num_fewshot),
    )
    return PlannedTask(checkpoint=checkpoint, settings=read, task=task, placement=placement)


def _refuse_overlaps(
    checkpoint: Checkpoint,
    request: Shrinking,
    tasks: dict[str, PlannedTask],
    fit: PlannedTask | None,
    run_id: str,
    store: Store,
    parts: Parts,
) -> None:
    """Refuse tasks on text that was scored on or is repaired on, and to repair on text that was scored on."""
    texts = list(repair_texts(fit)) if fit else []
    opened, tokenizer = Warehouse(store.root.full), load_tokenizer(checkpoint)
    for planned in tasks.values():
        refuse_repair_text(planned.task, checkpoint)
        refuse_overlap(planned.task, run_id, opened, checkpoint, corpus=request.corpus)
        for text in texts:
            refuse_text(planned.task, text, "the repair", parts.held_out, tokenizer)
    for text in texts:
        refuse_overlap(text, run_id, opened, checkpoint, corpus=request.corpus)


def _most(bench: Bench, made: Callable[..., Plan], most: int, keep: float) -> tuple[Attempt, list[Attempt]]:
    """The plan of the most layers that keeps so much, by bisection; and all plans that were tried, by their layers.

    Args:
        most: layers that may go.

    Raises:
        PlanError: not even one layer can go.
    """
    tried: dict[int, Attempt] = {}
    low, high = 0, most + 1
    while high - low > 1:
        count = (low + high) // 2
        tried[count] = bench.attempt(made(count=count))
        low, high = (count, high) if tried[count].kept >= keep else (low, count)
    curve = [tried[count] for count in sorted(tried)]
    if not low:
        raise PlanError(
            f"Without layer {curve[0].plan.drop[0]}, the first to go, {curve[0].kept:z.1%} is kept, under {keep:.1%}.",
            "Ask for less with `keep`, choose by another score, or repair on more text.",
        )
    return tried[low], curve
