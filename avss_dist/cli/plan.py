"""`avss plan`: which layers to drop, by a score of each, or by a search among sets of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from avss_dist.cli.choose import choose_run, open_warehouse
from avss_dist.cli.evaluate import EVALUATED
from avss_dist.cli.options import (
    ProtectOption,
    RecipeOption,
    RunOption,
    SiteOption,
    SkipSequencesOption,
    ThresholdOption,
    WarehousePath,
    choice,
    format_option,
    protected,
    takes_settings,
)
from avss_dist.errors import ConfigError
from avss_dist.settings import (
    BLOCK_DISTANCE,
    INTERACTIONS,
    OF_LAYERS,
    PUBLISHED_THRESHOLD,
    RECIPES,
    SCORES,
    SEARCHES,
    SITES,
    SPARSITY_METHODS,
    SPARSITY_RULES,
    Execution,
    Settings,
)
from avss_dist.system.streams import console, emit
from avss_dist.text import parse_threshold

if TYPE_CHECKING:
    from avss_dist.pruning.plan import Plan
    from avss_dist.warehouse.reader import Warehouse

FORMATS = ("plan", "mergekit", "json", "teal")  # of mergekit: the slices to merge; of TEAL: a folder
CHOSEN_BY = (*OF_LAYERS, *SCORES, "last", "random")


@takes_settings(*EVALUATED, *Execution.__dataclass_fields__)
def plan(
    warehouse: WarehousePath,
    output: Annotated[Path, typer.Option("--output", "-o", help="PLAN.yaml.")],
    run: RunOption = None,
    by: Annotated[
        str | None,
        choice(
            (*CHOSEN_BY, INTERACTIONS, BLOCK_DISTANCE),
            "What layers are chosen by: what avss ablate measures, a score, or chance. The loss, or the damage, by "
            "default.",
        ),
    ] = None,
    search: Annotated[
        str | None, choice(tuple(SEARCHES), "Search the set by its loss on --corpus; evolve may begin with --by too.")
    ] = None,
    corpus: Annotated[str | None, typer.Option(help="Text that a search measures the loss on.")] = None,
    budget: Annotated[int | None, typer.Option(help="Sets that a search measures at most.")] = None,
    sublayers: Annotated[
        bool,
        typer.Option("--sublayers", help="Search among sublayers too: attention or MLP alone, half a layer."),
    ] = False,
    width: Annotated[
        int | None, typer.Option(help="Sets that beam and evolve go on from at each step; 3 by default.")
    ] = None,
    share: Annotated[float | None, typer.Option(help="Drop this share of the layers; 0.25 by default.")] = None,
    count: Annotated[int | None, typer.Option(help="Drop so many layers.")] = None,
    mass: Annotated[float | None, typer.Option(help="Drop the lowest that hold this share of the score.")] = None,
    protect: ProtectOption = "",
    contiguous: Annotated[bool, typer.Option("--contiguous", help="Drop neighbours.")] = False,
    sparsify: Annotated[
        float | None, typer.Option(help="Make this share of the weights meet a zero activation, and drop no layer.")
    ] = None,
    method: Annotated[str, choice(SPARSITY_METHODS, "How --sparsify spreads it.")] = SPARSITY_METHODS[0],
    rule: Annotated[str, choice(SPARSITY_RULES, "At which tokens --sparsify holds.")] = SPARSITY_RULES[0],
    pattern: Annotated[
        str | None, typer.Option(help="N:M for --sparsify: of M units in a row, the N largest stay.")
    ] = None,
    corrections: Annotated[
        int, typer.Option(min=0, help="Passes with the plan of --sparsify on, each of which corrects its thresholds.")
    ] = 0,
    seed: Annotated[int, typer.Option(help="Seed for --by random, and for --search evolve.")] = 0,
    recipe: RecipeOption = RECIPES[0],
    site: SiteOption = SITES[0],
    threshold: ThresholdOption = f"{PUBLISHED_THRESHOLD:g}",
    skip_sequences: SkipSequencesOption = 0,
    format: Annotated[str, format_option(*FORMATS)] = FORMATS[0],
    **options: Any,
) -> None:
    """Choose the layers to drop, and write them down with the reason and what speaks against it."""
    from avss_dist.analysis.plans import plan_layers
    from avss_dist.pruning.plan import mergekit_slices, write_text

    if format in ("json", "teal") and sparsify is None:
        raise ConfigError(
            f"`format` {format} is of thresholds, and a plan of layers has none.", "Use plan or mergekit."
        )
    opened = open_warehouse(warehouse)
    chosen = choose_run(opened, run)
    if sparsify is not None:
        text = {"corpus": corpus, "skip_sequences": skip_sequences}
        fields = {"rule": rule, "pattern": pattern, "corrections": corrections}
        _sparsify(opened, chosen, output, sparsify, method, format, fields, text | options)
        return
    how = {"share": share, "count": count, "mass": mass, "contiguous": contiguous, "seed": seed}
    how |= dict(zip(("first", "last"), protected(protect), strict=True))
    reading = (site, recipe, *parse_threshold(threshold))
    effort = {"budget": budget, "width": width}
    if search is None:
        given = {"corpus": corpus, "sublayers": sublayers, **effort, "skip_sequences": skip_sequences, **options}
        _refuse_search_options(given)
        made = plan_layers(opened, chosen, by=by, reading=reading, **how)
    else:
        if corpus is None:
            raise ConfigError("A search measures losses on text, and there is none.", "Name it with `corpus`.")
        starts = () if by is None else [plan_layers(opened, chosen, by=by, reading=reading, **how).drop]
        text = {"corpus": corpus, "skip_sequences": skip_sequences}
        wanted = {"by": search, "sublayers": sublayers, **how}
        made = _search(warehouse, chosen, wanted, effort, starts=starts, **text, **options)
    if format == "mergekit":
        write_text(output, mergekit_slices(made))
    else:
        made.write(output)
    emit("\n  ".join([f"{output}:", *made.describe()]))
    if by is None and search is None:
        emit(f"  No --by was given: {made.why['by']} is measured in {opened.root}.")
    others = opened.runs().num_rows - 1
    if others and not run:
        emit(f"  This is the newest of {others + 1} runs; --run names another.")
    if not made.evaluated and format == FORMATS[0]:
        emit(f"  Evaluate it: avss evaluate {output} --task perplexity:CORPUS --warehouse {opened.root}")


def _sparsify(
    opened: Warehouse,
    run: Mapping[str, Any],
    output: Path,
    target: float,
    method: str,
    format: str,
    fields: Mapping[str, Any],
    options: Mapping[str, Any],
) -> None:
    """Write a sparsity plan."""
    if format == "mergekit":
        raise ConfigError(
            "`format` mergekit is of layers that stay, and sparsity drops none.", "Use plan, json or teal."
        )
    from avss_dist.evaluation.sparsify import sparsify
    from avss_dist.pruning.plan import write_text
    from avss_dist.report.terminal.progress import CellProgress
    from avss_dist.report.terminal.sparsity import thresholds_table
    from avss_dist.sparsity.files import thresholds_json, write_teal

    with CellProgress() as progress:
        made = sparsify(opened.root, run, target, method=method, reporter=progress, **fields, **options)
    if format == "json":
        write_text(output, thresholds_json(made))
    elif format == "teal":
        write_teal(made, output)
    else:
        made.write(output)
    console().print(thresholds_table(made))
    emit("\n  ".join([f"{output}:", *made.describe()]))
    if format == FORMATS[0]:
        emit(f"  Evaluate it: avss evaluate {output} --task perplexity:CORPUS --warehouse {opened.root}")


def _search(
    warehouse: str, run: Mapping[str, Any], how: Mapping[str, Any], effort: Mapping[str, Any], **options: Any
) -> Plan:
    from avss_dist.evaluation.search import search
    from avss_dist.pruning.search import Effort
    from avss_dist.pruning.selection import Choice
    from avss_dist.report.terminal.progress import SearchProgress
    from avss_dist.report.terminal.search import search_table

    with SearchProgress() as progress:
        found = search(warehouse, run, Choice(**how), effort=Effort(**effort), reporter=progress, **options)
    console().print(search_table(found))
    return found.plan


def _refuse_search_options(given: Mapping[str, Any]) -> None:
    """Refuse what has no effect where nothing is measured."""
    defaults = Settings().as_dict() | asdict(Execution())
    for name, value in given.items():
        if value and value != defaults.get(name):
            raise ConfigError(f"`{name}` has no effect without a search.", "Leave it out, or name a `search`.")
