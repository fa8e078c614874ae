"""`avss plan`: which layers to drop, by a score of each, or by a search among sets of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from avss_dist.cli.choose import choose_run, open_warehouse
from avss_dist.cli.evaluate import EVALUATED
from avss_dist.cli.options import (
    PUBLISHED,
    ProtectOption,
    RecipeOption,
    RunOption,
    SiteOption,
    SkipSequencesOption,
    ThresholdOption,
    WarehouseOption,
    choice,
    output_option,
    protected,
    takes_settings,
)
from avss_dist.errors import ConfigError
from avss_dist.options import refuse_unused
from avss_dist.settings import (
    BLOCK_DISTANCE,
    DEFAULT_WAREHOUSE,
    INTERACTIONS,
    OF_LAYERS,
    RECIPES,
    SCORES,
    SEARCHES,
    SITES,
    SPARSITY_METHODS,
    SPARSITY_RULES,
    searches_instead,
)
from avss_dist.system.streams import console, emit, emit_json

if TYPE_CHECKING:
    from avss_dist.pruning.plan import Plan
    from avss_dist.sparsity.plan import SparsityPlan
    from avss_dist.warehouse.reader import Warehouse

FORMATS = ("plan", "mergekit", "llama-cpp", "thresholds", "teal")  # the others are what other tools take
SEARCHED, HOW_MANY, SPARSE = "Searching", "How many layers", "Sparsity, where no layer is dropped"  # panels of the help
CHOSEN_BY = (*OF_LAYERS, *SCORES, "last", "random")


@takes_settings(*EVALUATED)
def plan(
    output: Annotated[Path, output_option("The plan to write, PLAN.yaml.")],
    warehouse: WarehouseOption = DEFAULT_WAREHOUSE,
    run: RunOption = None,
    by: Annotated[
        str | None,
        choice(
            (*CHOSEN_BY, INTERACTIONS, BLOCK_DISTANCE),
            "What chooses the layers: a measurement of avss ablate, a score, or chance. The loss or the damage by "
            "default.",
            elsewhere={name: searches_instead(name) for name in SEARCHES},
        ),
    ] = None,
    protect: ProtectOption = "",
    share: Annotated[
        float | None, typer.Option(help="Drop this share of the layers; 0.25 by default.", rich_help_panel=HOW_MANY)
    ] = None,
    count: Annotated[int | None, typer.Option(help="Drop this many layers.", rich_help_panel=HOW_MANY)] = None,
    mass: Annotated[
        float | None,
        typer.Option(help="Drop the lowest layers that hold this share of the score.", rich_help_panel=HOW_MANY),
    ] = None,
    parameters: Annotated[
        float | None,
        typer.Option(help="Drop layers until this many parameters are left: 6e9.", rich_help_panel=HOW_MANY),
    ] = None,
    memory: Annotated[
        str | None,
        typer.Option(help="Drop layers until this much weight memory is left: 12GB.", rich_help_panel=HOW_MANY),
    ] = None,
    share_of_parameters: Annotated[
        float | None, typer.Option(help="Drop layers that hold this share of the parameters.", rich_help_panel=HOW_MANY)
    ] = None,
    contiguous: Annotated[
        bool, typer.Option("--contiguous", help="Drop a block of neighbours.", rich_help_panel=HOW_MANY)
    ] = False,
    search: Annotated[
        str | None,
        choice(
            tuple(SEARCHES), "Search for the set by its loss on --corpus; evolve can start from --by.", panel=SEARCHED
        ),
    ] = None,
    corpus: Annotated[
        str | None, typer.Option(help="Text on which a search measures the loss.", rich_help_panel=SEARCHED)
    ] = None,
    budget: Annotated[
        int | None, typer.Option(help="The most sets that a search measures.", rich_help_panel=SEARCHED)
    ] = None,
    sublayers: Annotated[
        bool,
        typer.Option(
            "--sublayers",
            help="Also consider sublayers: attention or MLP alone, half a layer each.",
            rich_help_panel=SEARCHED,
        ),
    ] = False,
    width: Annotated[
        int | None,
        typer.Option(
            help="Sets that beam and evolve continue from at each step; 3 by default.", rich_help_panel=SEARCHED
        ),
    ] = None,
    sparsify: Annotated[
        float | None,
        typer.Option(
            help="Let this share of the weights meet a zero activation; drop no layer.", rich_help_panel=SPARSE
        ),
    ] = None,
    method: Annotated[
        str, choice(SPARSITY_METHODS, "How --sparsify spreads it over the model.", panel=SPARSE)
    ] = SPARSITY_METHODS[0],
    rule: Annotated[str, choice(SPARSITY_RULES, "Tokens that --sparsify applies to.", panel=SPARSE)] = SPARSITY_RULES[
        0
    ],
    pattern: Annotated[
        str | None,
        typer.Option(help="N:M for --sparsify: keep the N largest of every M units.", rich_help_panel=SPARSE),
    ] = None,
    corrections: Annotated[
        int,
        typer.Option(
            min=0,
            help="Passes that correct the thresholds of --sparsify, each with the plan applied.",
            rich_help_panel=SPARSE,
        ),
    ] = 0,
    seed: Annotated[int, typer.Option(help="Seed for --by random, and for --search evolve.")] = 0,
    recipe: RecipeOption = RECIPES[0],
    site: SiteOption = SITES[0],
    threshold: ThresholdOption = PUBLISHED,
    skip_sequences: SkipSequencesOption = 0,
    format: Annotated[str, choice(FORMATS, "Format of the file.", checked=False, panel="Output")] = FORMATS[0],
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.", rich_help_panel="Output")] = False,
    **options: Any,
) -> None:
    """Choose the layers to drop, and write a plan with the reason and what speaks against it."""
    from avss_dist.pruning.formats import OTHERS, require_format

    require_format(format, FORMATS)
    limits: dict[str, Any] = {"parameters": parameters, "memory": memory, "share_of_parameters": share_of_parameters}
    sparse_fields = {"method": method, "rule": rule, "pattern": pattern, "corrections": corrections}
    of_layers = {"by": by, "search": search, "share": share, "count": count, "mass": mass, "contiguous": contiguous}
    _refuse_of_the_other(sparsify, format, of_layers | limits, sparse_fields)
    opened = open_warehouse(warehouse)
    row, hints = _run(opened, run, by, chooses=sparsify is None and search is None)
    text: dict[str, Any] = {"corpus": corpus, "skip_sequences": skip_sequences}
    if sparsify is not None:
        where = {"warehouse": warehouse, "run": row["run_id"]}
        sparse = _sparsify(output, sparsify, format, where | text | sparse_fields | options)
        if not as_json:
            from avss_dist.report.sparsity import thresholds_table
            from avss_dist.report.terminal.tables import FittedTable

            console().print(FittedTable(thresholds_table(sparse)))
        _tell(opened, row, output, sparse, hints, format, as_json)
        return
    how = {"share": share, "count": count, "mass": mass, "contiguous": contiguous, "seed": seed}
    how |= dict(zip(("first", "last"), protected(protect), strict=True))
    effort = {"budget": budget, "width": width, "sublayers": sublayers, "reading": (site, recipe, threshold)}
    made = _choose(opened, row, by=by, search=search, limits=limits, options=options, **text, **effort, **how)
    hints = [*_saved(row, made), *hints]
    if by is None and search is None:
        hints.append(f"No --by was given: {made.why['by']} is measured in {opened.root}.")
    if format in OTHERS:
        from avss_dist.pruning.plan import write_text

        write_text(output, OTHERS[format](made))
    else:
        made.write(output)
    _tell(opened, row, output, made, hints, "" if made.evaluated else format, as_json)


def _run(opened: Warehouse, name: str | None, by: str | None, *, chooses: bool) -> tuple[dict[str, Any], list[str]]:
    """Return the run to plan for, and what to say of the choice: of several, the newest that can be planned for."""
    passed: list[str] = []
    if name or not chooses:
        row = choose_run(opened, name)
    else:
        from avss_dist.analysis.plans import plannable_run

        row, passed = plannable_run(opened, by)
    number = opened.runs().num_rows
    if passed:
        return row, [f"This is the newest of {number} runs that can be planned for; --run names another.", *passed]
    return row, [f"This is the newest of {number} runs; --run names another."] if number > 1 and not name else []


def _refuse_of_the_other(
    sparsify: float | None, format: str, of_layers: Mapping[str, Any], of_sparsity: Mapping[str, Any]
) -> None:
    """Refuse options of plans of layers with `sparsify`, and options of sparsity plans without."""
    defaults = {"method": SPARSITY_METHODS[0], "rule": SPARSITY_RULES[0]}
    given, said = (of_sparsity, "without") if sparsify is None else (of_layers, "with")
    refuse_unused(given, defaults, f"{said} `sparsify`")
    if format in ("thresholds", "teal") and sparsify is None:
        raise ConfigError(f"`format` {format} is of sparsity, and a plan of layers has none.", "Use plan or mergekit.")


def _choose(opened: Warehouse, row: Mapping[str, Any], **how: Any) -> Plan:
    from avss_dist.api.change import choose_layers
    from avss_dist.report.terminal.progress import SearchProgress

    with SearchProgress() as progress:
        made, found = choose_layers(opened, row, reporter=progress, **how)
    if found:
        from avss_dist.report.terminal.search import search_table

        console().print(search_table(found))
    return made


def _tell(
    opened: Warehouse,
    row: Mapping[str, Any],
    output: Path,
    made: Plan | SparsityPlan,
    hints: Sequence[str],
    format: str,
    as_json: bool,
) -> None:
    """Say what was written, and what comes next."""
    from avss_dist.pruning.ground_truth import describe_headless
    from avss_dist.warehouse.checks import has_head

    if as_json:
        emit_json({"output": str(output), **asdict(made)})
        return
    emit("\n  ".join([f"{output}:", *made.describe(), *hints]))
    if format == FORMATS[0] and not has_head(row):
        emit(f"  {describe_headless(row)}")
    elif format == FORMATS[0]:
        emit(f"  Evaluate it: avss evaluate {output} --task perplexity:CORPUS -w {opened.root}")


def _sparsify(output: Path, target: float, format: str, how: dict[str, Any]) -> SparsityPlan:
    """Write a sparsity plan."""
    from avss_dist.pruning.formats import OTHERS

    if format in OTHERS:
        raise ConfigError(
            f"`format` {format} is of layers that stay, and sparsity drops none.", "Use plan, thresholds or teal."
        )
    from avss_dist.api.change import sparsify
    from avss_dist.pruning.plan import write_text
    from avss_dist.report.terminal.progress import CellProgress
    from avss_dist.sparsity.files import thresholds_json, write_teal

    with CellProgress() as progress:
        made = sparsify(target, reporter=progress, **how)
    if format == "thresholds":
        write_text(output, thresholds_json(made))
    elif format == "teal":
        write_teal(made, output)
    else:
        made.write(output)
    return made


def _saved(run: Mapping[str, Any], made: Plan) -> list[str]:
    """What a plan saves, in words; nothing where the checkpoint is not on this machine."""
    from avss_dist.evaluation.sizes import known_size
    from avss_dist.pruning.savings import Savings

    size = known_size(run) if made.drop else None
    return [Savings.of(made, size).describe()] if size else []
