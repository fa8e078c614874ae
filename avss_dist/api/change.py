"""Which layers go, which activations become zero, and the checkpoint without them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

import pyarrow as pa

from avss_dist.analysis.plans import evaluated_lines, plan_layers, plannable_run
from avss_dist.api.names import RunName, named_run
from avss_dist.errors import ConfigError
from avss_dist.options import EvaluationOptions, WorkOptions, refuse_unused, with_options
from avss_dist.pruning.plan import Plan, read_plan
from avss_dist.pruning.search import Effort
from avss_dist.pruning.selection import Choice
from avss_dist.results import TabularResult
from avss_dist.settings import (
    DEFAULT_REPAIR,
    DEFAULT_WAREHOUSE,
    NO_REPAIR,
    PUBLISHED_THRESHOLD,
    RECIPES,
    SEARCHES,
    SITES,
    SPARSITY_METHODS,
    SPARSITY_RULES,
    Execution,
    Settings,
    searches_instead,
    split_options,
)
from avss_dist.text import parse_threshold
from avss_dist.warehouse.reader import Warehouse

if TYPE_CHECKING:
    from avss_dist.evaluation.engine import CellReporter
    from avss_dist.evaluation.search import Found, SearchReporter
    from avss_dist.pruning.repair.repair import Repair, Repaired
    from avss_dist.sparsity.plan import SparsityPlan


def choose_layers(
    opened: Warehouse,
    row: Mapping[str, Any],
    *,
    by: str | None,
    search: str | None,
    corpus: str | None,
    skip_sequences: int,
    budget: int | None,
    width: int | None,
    sublayers: bool,
    reading: tuple[str, str, str | float],
    limits: Mapping[str, Any],
    reporter: SearchReporter | None,
    options: Mapping[str, Any],
    **how: Any,
) -> tuple[Plan, Found | None]:
    """What `plan` makes of a row of ``runs``, and what a search found."""
    if by in SEARCHES:
        raise ConfigError(f"Unknown `by` '{by}'.", searches_instead(by))
    site, recipe, threshold = reading
    if any(value is not None for value in limits.values()):
        how["count"] = _count(row, limits, how)
    wanted = {"reading": (site, recipe, *parse_threshold(threshold)), **how}
    text: dict[str, Any] = {"corpus": corpus, "skip_sequences": skip_sequences}
    if search is None:
        measuring = {**text, "sublayers": sublayers, "budget": budget, "width": width, **options}
        defaults = Settings().as_dict() | asdict(Execution())
        refuse_unused(measuring, defaults, "without a search", "Leave it out, or name a `search`.")
        return plan_layers(opened, row, by=by, **wanted), None
    if corpus is None:
        raise ConfigError("A search measures losses on text, and there is none.", "Name it with `corpus`.")
    starts = () if by is None else [plan_layers(opened, row, by=by, **wanted).drop]
    choice, effort = Choice(by=search, sublayers=sublayers, **how), Effort(budget=budget, width=width)
    from avss_dist.evaluation.search import search as measured_search

    found = measured_search(
        opened.root.full, row, choice, effort=effort, starts=starts, reporter=reporter, **text, **options
    )
    return found.plan, found


def _count(run: Mapping[str, Any], limits: Mapping[str, Any], how: Mapping[str, Any]) -> int:
    """How many layers a budget takes."""
    from avss_dist.evaluation.sizes import run_size
    from avss_dist.pruning.savings import Budget

    budget = Budget(**limits)
    if given := [name for name in ("share", "count", "mass") if how.get(name) is not None]:
        raise ConfigError(f"{budget.given[0]} and `{given[0]}` were given; they exclude each other.", "Keep one.")
    return budget.count(run_size(run))


@with_options(EvaluationOptions)
def plan(
    *,
    warehouse: str | Path = DEFAULT_WAREHOUSE,
    run: RunName | None = None,
    by: str | None = None,
    search: str | None = None,
    corpus: str | None = None,
    budget: int | None = None,
    sublayers: bool = False,
    width: int | None = None,
    share: float | None = None,
    count: int | None = None,
    mass: float | None = None,
    parameters: float | None = None,
    memory: int | str | None = None,
    share_of_parameters: float | None = None,
    first: int = 0,
    last: int = 0,
    contiguous: bool = False,
    seed: int = 0,
    site: str = SITES[0],
    recipe: str = RECIPES[0],
    threshold: str | float = PUBLISHED_THRESHOLD,
    skip_sequences: int = 0,
    reporter: SearchReporter | None = None,
    **options: Unpack[EvaluationOptions],
) -> Plan:
    """Which layers of a run's model to drop, with the reason and what speaks against it; `Plan.write` makes a file.

    Args:
        run: by default the newest that layers can be chosen for by ``by``; of a search, the newest.
        by: what they are chosen by: see ``avss plan --help``; the measured loss, or the damage, by default.
        search: search the set by its loss on ``corpus``: one of ``settings.SEARCHES``; ``budget`` and ``width`` are
            those of `pruning.search.Effort`, and ``options`` of the measuring.
        parameters, memory, share_of_parameters: in place of a share, see `pruning.savings.Budget`.
        share, count, mass, first, last, contiguous, sublayers, seed: see `pruning.selection.Choice`.
        site, recipe, threshold: of AVSS.

    Raises:
        AvssError: a mistake, or a measurement that failed; what was measured is kept.
    """
    opened = Warehouse(warehouse)
    made, _ = choose_layers(
        opened,
        named_run(opened, run) if run is not None or search else plannable_run(opened, by)[0],
        by=by,
        search=search,
        corpus=corpus,
        skip_sequences=skip_sequences,
        budget=budget,
        width=width,
        sublayers=sublayers,
        reading=(site, recipe, threshold),
        limits={"parameters": parameters, "memory": memory, "share_of_parameters": share_of_parameters},
        reporter=reporter,
        options=options,
        share=share,
        count=count,
        mass=mass,
        first=first,
        last=last,
        contiguous=contiguous,
        seed=seed,
    )
    return made


@with_options(EvaluationOptions)
def sparsify(
    target: float,
    *,
    warehouse: str | Path = DEFAULT_WAREHOUSE,
    run: RunName | None = None,
    method: str = SPARSITY_METHODS[0],
    rule: str = SPARSITY_RULES[0],
    pattern: str | None = None,
    corrections: int = 0,
    corpus: str | None = None,
    skip_sequences: int = 0,
    reporter: CellReporter | None = None,
    **options: Unpack[EvaluationOptions],
) -> SparsityPlan:
    """Which activations of a run's model become zero: see `evaluation.sparsify.sparsify`; of the newest by default."""
    from avss_dist.evaluation.sparsify import sparsify as measure

    opened = Warehouse(warehouse)
    text: dict[str, Any] = {"corpus": corpus, "skip_sequences": skip_sequences}
    how: dict[str, Any] = {"method": method, "rule": rule, "pattern": pattern, "corrections": corrections}
    return measure(opened.root, named_run(opened, run), target, reporter=reporter, **text, **how, **options)


class Pruned(TabularResult):
    """A checkpoint that was written; its attributes are what `pruning.checkpoint.prune` returns, and ``plan``.

    ``pushed`` is its address on the hub; None where it was not pushed.
    """

    def __init__(self, plan: Plan, done: Mapping[str, Any]) -> None:
        self.plan = plan
        self.folder, self.bytes, self.difference = str(done["folder"]), int(done["bytes"]), done["difference"]
        self.notes, self.repair = done["notes"], done["repair"]
        self.pushed: str | None = done.get("pushed")

    def table(self) -> pa.Table:
        """One row."""
        values = {"folder": self.folder, "bytes": self.bytes, "difference": self.difference, "drop": [*self.plan.drop]}
        values |= {"notes": self.notes, "repair": self.repair and self.repair.repair, "pushed": self.pushed}
        return pa.Table.from_pylist([values])

    def summary(self) -> str:
        """Where it is, and how much is left."""
        return f"{self.folder}, {len(self.plan.keep)} of {self.plan.num_layers} layers"


@with_options(EvaluationOptions)
def prune(
    model: str | Path,
    plan: Plan | str | Path,
    output: str | Path,
    *,
    repair: str | None = None,
    repair_corpora: Sequence[str] = (),
    skip_sequences: int = 0,
    warehouse: str | Path | None = None,
    push: str | None = None,
    reporter: CellReporter | None = None,
    **options: Unpack[EvaluationOptions],
) -> Pruned:
    """Write a checkpoint without the layers that a plan drops; on request, a repaired one.

    Args:
        plan: a `Plan`, or its file.
        output: a folder that does not exist, or is empty.
        repair: one of ``settings.REPAIRS``; ``refit`` by default where ``repair_corpora`` names text.
        repair_corpora: what the repair is fitted on: CORPUS or CORPUS=WEIGHT.
        warehouse: whose evaluations of the plan go into the model card, beside those that the plan has; the repair is
            fitted on workers, kept there and found there. Without it, the repair is fitted in this process.
        push: where on the hub it goes too, ``ORG/NAME``; what is not there yet is made, as a private model.
        reporter: hears of the fit, where there is a warehouse.
        options: of the text of the repair, and where it is fitted.

    Raises:
        AvssError: see `pruning.checkpoint.prune`; it cannot be pushed, and is in the folder.
    """
    from avss_dist.models.checkpoints import resolve
    from avss_dist.pruning.checkpoint import prune as write
    from avss_dist.system.hub import require_access, upload

    made = plan if isinstance(plan, Plan) else read_plan(plan)
    settings, execution = split_options(dict(options))
    wanted = _repair(repair, repair_corpora, skip_sequences, settings)
    code = settings.trust_remote_code
    if wanted is None or warehouse is None:
        _refuse_workers(settings, execution)
    if push:
        require_access(push, "model")
    fitted: Repair | Repaired | None = wanted
    if wanted is not None and warehouse is not None:
        from avss_dist.evaluation.kept_repair import kept_repair

        where: dict[str, Any] = {"warehouse": warehouse, "execution": execution, "reporter": reporter}
        fitted = kept_repair(str(model), made, wanted, Path(output), **where)
    if warehouse is not None:
        checkpoint = resolve(str(model), trust_remote_code=code)
        lines = evaluated_lines(Warehouse(warehouse), {"revision": checkpoint.revision}, made.removed)
        made = replace(made, evaluated=tuple(dict.fromkeys([*made.evaluated, *lines])))
    done = write(str(model), made, output, repair=fitted, execution=execution, trust_remote_code=code)
    if push:
        what = f"{Path(made.model).name} without {len(made.removed)} of its layers"
        hint = f"The checkpoint is whole, in {output}: hf upload {push} {output}"
        replaced = ["*.safetensors", "*.json"]
        done = {**done, "pushed": upload(Path(output), push, "model", message=what, replaced=replaced, hint=hint)}
    return Pruned(made, done)


def _refuse_workers(settings: Settings, execution: Execution) -> None:
    """Refuse options of workers where nothing is fitted on them."""
    here = {"partition", "max_memory", "offload_folder"} | ({"executor"} if execution.executor == "local" else set())
    given = {name: getattr(execution, name) for name in WorkOptions.__annotations__ if name not in here}
    why = "without workers, which fit a repair into a warehouse"
    hint = "Leave it out, or name a `repair` and a `warehouse`."
    refuse_unused(given | {"threads": settings.threads}, Settings().as_dict() | asdict(Execution()), why, hint)


def _repair(by: str | None, corpora: Sequence[str], skip_sequences: int, settings: Settings) -> Repair | None:
    """What was asked for; options of a repair without one are refused."""
    from avss_dist.pruning.repair.repair import Repair

    by = by or (DEFAULT_REPAIR if corpora else NO_REPAIR)
    if by != NO_REPAIR and not corpora:
        raise ConfigError(f"`repair` {by} is fitted on text, and there is none.", "Name it with `repair_corpora`.")
    if by != NO_REPAIR:
        return Repair(by=by, corpora=tuple(corpora), skip_sequences=skip_sequences, settings=settings)
    default = Settings(trust_remote_code=settings.trust_remote_code)
    given = [name for name, value in settings.as_dict().items() if value != getattr(default, name)]
    given += [name for name, value in (("skip_sequences", skip_sequences), ("repair_corpora", corpora)) if value]
    if given:
        raise ConfigError(f"`{given[0]}` has no effect without a repair.", "Leave it out, or name a `repair`.")
    return None
