"""Search the set of layers to drop by the loss that is left after the repair: each set is repaired, and then measured.

What a repair gives back depends on the set, so the best set with it is another one than without it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import ceil
from typing import Any

from avss_dist.corpus.shards import CorpusPlan
from avss_dist.evaluation.attempts import Bench
from avss_dist.evaluation.engine import PlannedTask, commit, failure, measure
from avss_dist.evaluation.make_tasks import text_task
from avss_dist.evaluation.repairs import FitRepair, fit_repairs, plan_fits
from avss_dist.evaluation.search import CHOSEN_HERE, conduct
from avss_dist.intervention import Intervention, Removals, whole_layers
from avss_dist.models.loading import text_config
from avss_dist.names import LOSS, SEARCH
from avss_dist.pruning.plan import Plan, reasons
from avss_dist.pruning.repair.registry import REPAIRS
from avss_dist.pruning.repair.splits import HELD_BACK, SINK_TOKENS
from avss_dist.pruning.search import Effort, Expansion, search_for
from avss_dist.pruning.selection import Choice
from avss_dist.pruning.shrinking import GREEDY, POOL, Shrinking
from avss_dist.tasks.base import Result
from avss_dist.text import RedactedURI, describe_layers


@dataclass(frozen=True, eq=False)
class RepairedLosses:
    """See `search.Measures`; repairs and losses are kept in the warehouse, and found there.

    Attributes:
        bench: where they are measured.
        text: the task of the loss.
        fit: the task of fitting a repair; None for no repair.
    """

    bench: Bench
    text: PlannedTask
    fit: PlannedTask | None

    def measure(self, expansions: Sequence[Expansion]) -> dict[Removals, Result]:
        """See `search.Measures`."""
        bench, drops = self.bench, [drop for one in expansions for drop in one.sets]
        fits = [] if self.fit is None else [(self.fit, drops)]
        found = fit_repairs(fits, bench.store, bench.executor, bench.reporter, fresh=bench.fresh)
        patches = {drop: patch for (_, drop), patch in found.items()}
        repaired = {drop: Intervention(removed=drop, patch=patches.get(drop)) for drop in drops}
        cells = self.text.cells(repaired.values())
        failed = measure(cells, bench.store, bench.executor, bench.reporter, fresh=bench.fresh)
        results = {one.intervention: one for one in commit(self.text, bench.store) if one.metric == LOSS}
        if failed:
            raise failure(failed)
        return {drop: results[intervention.key] for drop, intervention in repaired.items()}


def repaired_losses(bench: Bench, request: Shrinking, rows: int) -> RepairedLosses:
    """The losses on the first rows of the text, of sets that are repaired on as many rows of each repair text, or more.

    Raises:
        CorpusError: a text cannot be read, or has too few rows.
    """
    of, *_ = bench.tasks.values()
    settings = replace(of.settings, max_sequences=rows)
    task = replace(text_task(of.checkpoint, request.corpus, settings), name=f"{SEARCH}{RedactedURI(request.corpus)}")
    text, fit = replace(of, task=task, settings=settings), None
    if bench.fit is not None:
        (whole,) = bench.fit.task.parts
        assert isinstance(whole, FitRepair)
        width = text_config(of.checkpoint, trust_remote_code=settings.trust_remote_code).get_text_config().hidden_size
        enough = max(rows, _rows_for(whole.texts, request.searched_repair, width))
        repair = replace(whole.repair, by=request.searched_repair, settings=replace(settings, max_sequences=enough))
        fit = plan_fits(of.checkpoint, whole.layers, [repair], of.placement)[repair.by]
    return RepairedLosses(bench, text, fit)


def _rows_for(texts: Sequence[CorpusPlan], by: str, width: int) -> int:
    """Rows of each text that suffice to fit a repair of a stream so wide."""
    if REPAIRS[by].text_rank == 0:
        return 1
    tokens = sum(text.num_tokens for text in texts) / sum(text.num_sequences for text in texts) - SINK_TOKENS
    fitted = REPAIRS[by].tokens_needed(width, width) / max(1.0, tokens) / len(texts)
    return ceil(fitted * HELD_BACK / (HELD_BACK - 1)) + 2  # what is held back is rounded up


def searched_plan(made: Callable[..., Plan], request: Shrinking, losses: RepairedLosses, **how: Any) -> Plan:
    """The plan that a greedy search finds among the layers of the least damage.

    Args:
        made: a plan by damage, of a ``count`` of layers.
        how: ``count`` or ``share``.

    Raises:
        AvssError: a mistake, or a cell that failed; what was measured is kept.
    """
    choice = Choice(by=GREEDY, first=request.first, last=request.last, **how)
    layers = made(count=1).num_layers
    pool = made(count=min(POOL * choice.number(layers), len(choice.unprotected(layers)), layers - 1))
    drop, steps = conduct(search_for(choice, Effort(), layers, pool=pool.drop), losses)
    outcome = {
        "among": describe_layers(pool.drop),
        "repair": request.searched_repair,
        "sets": steps[-1].sets,
        "loss": round(steps[-1].best.value, 6),
        "text": request.corpus,
        "sequences": losses.text.settings.max_sequences,
        "evaluation": losses.text.run_id(),
        "task": losses.text.task.name,
    }
    return replace(pool, drop=whole_layers(drop), why=reasons(choice) | outcome, findings=(CHOSEN_HERE,), evaluated=())
