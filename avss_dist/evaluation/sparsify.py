"""Make a sparsity plan of a run, and keep what it was made of."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any, Unpack

from avss_dist.analysis.sparsity_plans import Measured, plan_uniform, require_target
from avss_dist.errors import ConfigError
from avss_dist.evaluation.allocation import (
    CHOSEN_BY_TOKEN,
    COUNTED,
    READ_TEXT,
    Asker,
    allocate,
    require_whole_weights,
)
from avss_dist.evaluation.engine import CellReporter, evaluation_options, pinned, placed, plan_text
from avss_dist.executors.open import open_executor
from avss_dist.models.checkpoints import resolve
from avss_dist.options import EvaluationOptions, with_options
from avss_dist.pruning.selection import PlanError
from avss_dist.sparsity.plan import SparsityPlan
from avss_dist.text import RedactedURI
from avss_dist.warehouse.reader import Warehouse
from avss_dist.warehouse.schema import RunIdentity
from avss_dist.warehouse.store import Store


@with_options(EvaluationOptions)
def sparsify(
    warehouse: str,
    run: Mapping[str, Any],
    target: float,
    *,
    method: str,
    corpus: str | None = None,
    skip_sequences: int = 0,
    reporter: CellReporter | None = None,
    rule: str = "all",
    pattern: str | None = None,
    corrections: int = 0,
    **options: Unpack[EvaluationOptions],
) -> SparsityPlan:
    """A sparsity plan for the checkpoint of a run that measured ``--site inputs``; nothing is measured twice.

    Args:
        run: its row of ``runs``.
        target: the share of the weights of all linear maps that meet a zero.
        method: see `sparsity.plan.METHODS`.
        corpus: text that ``loss``, ``teal`` and corrections read; the run's own by default.
        skip_sequences: rows at its start that are not read.
        rule, pattern: see `SparsityPlan`.
        corrections: how often thresholds are corrected, each time by a pass with the plan on.
        options: the fields of ``settings.Settings`` and ``settings.Execution``.

    Raises:
        AvssError: a mistake, or a cell that failed; what was measured is kept.
    """
    require_target(target)
    _require_correctable(corrections, method, rule, pattern)
    store, measured = Store(warehouse), Measured.of(Warehouse(warehouse), run)
    if not corrections and (pattern is not None or method in COUNTED):
        return keep_plan(plan_uniform(measured, target, method, rule=rule, pattern=pattern), store, run)
    settings, execution = evaluation_options(dict(options))
    require_whole_weights(execution.partition, method)
    checkpoint = resolve(run["model"], trust_remote_code=settings.trust_remote_code)
    if checkpoint.revision != run["revision"]:
        raise PlanError(f"{checkpoint.name} has changed since {run['run_id']}.", "Score it again.")
    with closing(open_executor(execution, settings)) as executor:
        fixed = pinned(settings, checkpoint, executor.device)
        named = RedactedURI(corpus or run["corpus"])
        reads = corrections or method in READ_TEXT
        ask = Asker(
            checkpoint=checkpoint,
            settings=fixed,
            placement=placed(checkpoint, fixed, execution, executor),
            store=store,
            executor=executor,
            reporter=reporter,
            fresh=execution.fresh,
            corpus=named,
            text=plan_text(checkpoint, named.full, fixed, skip_sequences=skip_sequences) if reads else None,
        )
        made = allocate(ask, measured, target, method, rule=rule, corrections=corrections)
    return keep_plan(made, store, run)


def keep_plan(plan: SparsityPlan, store: Store, run: Mapping[str, Any]) -> SparsityPlan:
    """The plan, which the warehouse has in its table ``sparsity`` from now on."""
    of = RunIdentity(run_id=run["run_id"], model=run["model"], revision=run["revision"], family=run["family"])
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
    store.write_sparsity(of, key[:20], [common | asdict(one) for one in plan.projections])
    return plan


def _require_correctable(corrections: int, method: str, rule: str, pattern: str | None) -> None:
    """Refuse corrections of what has no threshold.

    Raises:
        ConfigError: the message says why.
    """
    if corrections and (pattern is not None or method in CHOSEN_BY_TOKEN):
        what = f"`pattern` {pattern}" if pattern else f"`method` {method}"
        raise ConfigError(f"{what} has no threshold that `corrections` could correct.", "Leave them out.")
    if corrections and rule == "dense-prefill":
        raise ConfigError("`corrections` read prompts, and `rule` dense-prefill makes nothing of a prompt sparse.")
