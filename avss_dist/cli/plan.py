"""`avss plan`: choice of the layers to drop, by a score or by a search among sets, or of routed experts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from avss_dist.cli.choose import choose_run, newest_of, open_warehouse
from avss_dist.cli.options import (
    output_option,
    takes,
)
from avss_dist.core.registry import GREEDY
from avss_dist.requests import PlanRequest
from avss_dist.system.streams import console, emit, say

if TYPE_CHECKING:
    from avss_dist.pruning.plan import Plan
    from avss_dist.warehouse.reader import Warehouse


@takes(PlanRequest)
def plan(
    output: Annotated[Path, output_option("The plan to write, PLAN.yaml.")],
    **values: Any,
) -> None:
    """Choose the layers or routed experts to drop, and write a plan with the reason and what speaks against it."""
    request = PlanRequest(**values)
    opened = open_warehouse(str(request.warehouse))
    row, hints = _run(opened, request)
    chosen = _choose(opened, row, request)
    hints = [*_saved(row, chosen), *hints]
    if request.by is None:
        hints.append(f"No --by was given: {chosen.why['by']} is measured in {opened.root}.")
    chosen.write(output)
    emit("\n  ".join([f"{output}:", *chosen.describe(), *hints]))
    if not chosen.evaluated:
        say(f"  {evaluation_hint(opened, row, output)}")


def evaluation_hint(opened: Warehouse, row: Mapping[str, Any], output: Path) -> str:
    """Return the command that evaluates a plan for a run, or why there is none."""
    from avss_dist.pruning.ground_truth import describe_headless, repeated_options
    from avss_dist.warehouse.checks import has_head

    if not has_head(row):
        return describe_headless(row)
    words = ["avss", "evaluate", str(output), "--task", "perplexity:CORPUS", "-w", opened.root, *repeated_options(row)]
    return f"Evaluate it: {' '.join(words)}"


def _run(opened: Warehouse, request: PlanRequest) -> tuple[dict[str, Any], list[str]]:
    """Return the run to plan for, by default the newest suitable one, and lines about this choice."""
    if request.run or request.by == GREEDY:
        row = choose_run(opened, request.run, measured=request.by != GREEDY)
        return row, newest_of(opened, request.run)
    from avss_dist.analysis.plans import plannable_run

    row, passed = plannable_run(opened, request.by, experts=request.experts is not None)
    if not passed:
        return row, newest_of(opened, None)
    number = opened.runs().num_rows
    return row, [f"This is the newest of {number} runs that can be planned for; --run names another.", *passed]


def _choose(opened: Warehouse, row: Mapping[str, Any], request: PlanRequest) -> Plan:
    """Return the plan for a run. The table of a search is printed."""
    from avss_dist.api.change import choose_layers
    from avss_dist.report.terminal.progress import CellProgress

    with CellProgress() as progress:
        chosen, result = choose_layers(opened, row, request, progress)
    if result:
        from avss_dist.report.terminal.evaluation import search_table

        console().print(search_table(result))
    return chosen


def _saved(run: Mapping[str, Any], plan: Plan) -> list[str]:
    """Return a line on what a plan saves, if the checkpoint is on this machine."""
    from avss_dist.pruning.plan import describe_savings, local_run_size

    size = local_run_size(run) if plan.dropped_layers else None
    return [describe_savings(plan, size)] if size else []
