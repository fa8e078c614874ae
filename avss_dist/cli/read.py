"""Commands that read a warehouse, and functions for all commands about one: open it, find runs, print a table."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import replace
from inspect import unwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

from avss_dist import read_commands
from avss_dist.cli.declarations import COMMANDS
from avss_dist.cli.program import at_end, interruptible, spelled
from avss_dist.core.endings import PICTURES, require_table_file
from avss_dist.core.errors import ConfigError, QueryError, first_names
from avss_dist.core.streams import ask, can_ask, console, emit, say
from avss_dist.core.suggestions import command_line
from avss_dist.core.text import basename, count_of, describe_count
from avss_dist.core.thresholds import describe_threshold, parse_threshold
from avss_dist.read_requests import (
    CompactRequest,
    CompareRequest,
    ContrastCommandRequest,
    FindingsRequest,
    ListRequest,
    PublishRequest,
    QueryCommandRequest,
    RemoveCommandRequest,
    ReportRequest,
    ShowRequest,
    WarehouseRequest,
)
from avss_dist.stats.catalog import is_own

if TYPE_CHECKING:
    import pyarrow as pa
    from rich.console import RenderableType

    from avss_dist.analysis.comparison import RankingComparison
    from avss_dist.analysis.curves import RankingCurves
    from avss_dist.stats.scores import Threshold
    from avss_dist.warehouse.reader import Warehouse
    from avss_dist.warehouse.removal import Removal
    from avss_dist.warehouse.schema import Damage


GLOB_CHARACTERS = {*"*?["}
MOST_NAMED = 5  # runs that a message names
MOST_OPENED = 20  # finished runs of a list, the newest, whose files are opened; that takes 1 ms or 2 for each


def _say_damaged(damaged: Mapping[str, Damage]) -> None:
    """Print the runs and evaluations that cannot be read, with a line for each command that replaces their files."""
    by_command: dict[tuple[str, str], list[str]] = {}
    for run_id, damage in sorted(damaged.items()):
        by_command.setdefault((damage.subject, damage.hint), []).append(f"{run_id} ({damage})")
    for (subject, hint), texts in by_command.items():
        say(f"{count_of(len(texts), subject)} cannot be read: {first_names(texts, MOST_NAMED, '; ')}. {hint}")


def open_for(request: WarehouseRequest, **options: Any) -> Warehouse:
    """Open the warehouse of a request as it is now. When the command ends, runs that could not be read are listed.

    If the request names one run by a part of its id, that run is printed.

    Args:
        options: of `chosen.choose_runs`.
    """
    from avss_dist.analysis.chosen import choose_runs
    from avss_dist.warehouse.reader import Warehouse

    opened = Warehouse(str(request.warehouse), snapshot=True)
    at_end(lambda: _say_damaged(opened.damaged))
    name = _only_run(request)
    if name is not None and not {*name} & GLOB_CHARACTERS:
        run_row, *more = choose_runs(opened, [name], columns=("run_id", "model"), **options)
        full_names = (run_row["run_id"], run_row["model"], basename(run_row["model"]))
        if not more and name not in full_names:
            say(f"Run {run_row['run_id']} is the one with '{name}' in its id.")
    return opened


def _only_run(request: WarehouseRequest) -> str | None:
    """Return the one name of a run that a request has, or None if it has none or several."""
    run = getattr(request, "run", None)
    if isinstance(run, str):
        return run or None
    if isinstance(run, tuple) and len(run) == 1:
        return str(run[0])
    return None


def ls(request: ListRequest, format: str) -> None:
    """Print the list that the request names. On a terminal, runs are shortened to its width."""
    import pyarrow.compute as pc

    from avss_dist.reports.output import write_table

    opened = open_for(request)
    table = unwrap(read_commands.ls)(opened, request).table()
    if request.what == "runs":
        finished = table.filter(pc.equal(table["status"], "done"))
        if finished.num_rows:
            opened.note_damaged({*finished["run_id"][:MOST_OPENED].to_pylist()})
    if request.what == "runs" and format == "table":
        from avss_dist.reports.terminal.runs import runs_list

        table, left_out = runs_list(table, console().width)
        if left_out:
            say(f"Not shown, as lines would be too long: {', '.join(left_out)}. All columns: --format csv.")
    write_table(table, format, console(), newest_first=True)


def show(request: ShowRequest, format: str) -> None:
    """Print what the request shows of each run, or write it to a file: as a picture or a table."""
    from avss_dist.reports.output import print_result, printed_to

    output = None if request.output is None else Path(request.output)
    can_draw = format == "table" and not (request.experts or request.shares)
    is_picture = output is not None and output.suffix.lower() in PICTURES
    if output is not None and not (can_draw and is_picture):
        require_table_file(output, format, COMMANDS["show"].formats, draws=can_draw)
    opened = open_for(request)
    if can_draw and is_picture:
        unwrap(read_commands.show)(opened, request)
        emit(output)
    else:
        with printed_to(output) if output else nullcontext():
            table = unwrap(read_commands.show)(opened, replace(request, output=None)).table()
            print_result(format, _describe_runs(opened, request, table), lambda: table)
    more = opened.runs().num_rows - 1
    if more and not request.run and format == "table":
        emit(f"{more} more in {opened.root}: {command_line('ls', '-w', opened.root)}")


def _describe_runs(opened: Warehouse, request: ShowRequest, table: pa.Table) -> Iterator[RenderableType]:
    """Yield the scores, the quantiles or the experts of each run."""
    import pyarrow.compute as pc

    from avss_dist.analysis.chosen import choose_runs
    from avss_dist.analysis.experts import experts_by_layer, experts_section
    from avss_dist.analysis.own_scores import own_labels
    from avss_dist.analysis.scorecard import describe_agreement
    from avss_dist.reports.terminal.scores import describe_exactness, layer_table, quantiles_table
    from avss_dist.reports.terminal.tables import rendered

    for run_row in choose_runs(opened, request.run):
        rows = table.filter(pc.equal(table["run_id"], run_row["run_id"]))
        if not rows:
            continue
        if request.experts:
            label = f"{run_row['model']}  ({run_row['run_id']})"
            yield rendered(experts_section(label, run_row, experts_by_layer(rows)))
        elif request.shares:
            yield quantiles_table(rows.to_pylist())
        else:
            layers = read_commands.score_rows(rows)
            own = [*own_labels(request.by).values()]
            yield layer_table(run_row, layers, own)
            yield from describe_agreement(opened, run_row, layers, own)
            yield from describe_exactness(layers)


def query(request: QueryCommandRequest, format: str) -> None:
    """Print the rows of a query, or the schema, or write them to a file."""
    from avss_dist.reports.output import printed_to, write_table

    if format == "parquet" and request.output is None and sys.stdout.isatty():
        raise QueryError("`format` parquet cannot be printed on a terminal.", "Name a file with `output`.")
    if request.output is not None:
        require_table_file(request.output, format, COMMANDS["query"].formats)
    with printed_to(Path(request.output)) if request.output else nullcontext():
        if request.schema and format == "table":
            from avss_dist.reports.terminal.schema import schema_page

            console().print(schema_page())
            return
        if request.schema and format == "markdown":
            from avss_dist.reports.terminal.schema import schema_markdown

            emit(schema_markdown())
            return
        opened = open_for(request)
        # Thousands of runs are read at first.
        with console().status("Reading ...") if sys.stdout.isatty() else nullcontext():
            table = interruptible(lambda: unwrap(read_commands.query)(opened, request)).table()
        write_table(table, format, console())
        if not table.num_rows:
            say(f"No row.{_query_comment(str(request.sql))}")


def _query_comment(sql: str) -> str:
    """Return the comment of a ready-made query, which describes its rows, or an empty text for another query."""
    from avss_dist.warehouse.query import ready_queries

    if not sql.startswith("@"):
        return ""
    comment = []
    for line in ready_queries().get(sql.removeprefix("@"), "").splitlines():
        if not line.startswith("--"):
            break
        comment.append(line.removeprefix("-- "))
    return f" {sql}: {' '.join(comment)}" if comment else ""


MAX_TABLED = 20_000  # pairs of which all are compared in full for a table on a terminal


def compare(request: CompareRequest, format: str) -> None:
    """Print the pairs of runs with their agreement, or the curves of ranks."""
    from avss_dist.analysis.comparison import MAX_PAIRS, RankingComparison
    from avss_dist.reports.output import print_result
    from avss_dist.warehouse.reader import grouped

    opened = open_for(request)
    max_listed = MAX_TABLED if format == "table" else MAX_PAIRS
    result = unwrap(read_commands.compare)(opened, request, max_listed=max_listed)
    if isinstance(result, RankingComparison) and result.conditions:
        say(
            f"Only runs with the same {', '.join(result.conditions)} are compared with each other; "
            "--allow-mismatch compares all."
        )
    for reason, run_ids in grouped(result.left_out, result.left_out.__getitem__).items():
        say(f"Left out: {first_names(run_ids, MOST_NAMED)}: {reason}.")
    if request.output is not None:
        for line in _describe_picture(result, request):
            say(line)
    if not isinstance(result, RankingComparison):
        print_result(format, _describe_curves(result), result.table)
        return
    if format != "table" and len(result.pairs) < result.number:
        say(f"Of {result.number:,} pairs, the {len(result.pairs):,} most and least alike are listed.")
    print_result(format, _describe_pairs(opened, result, request), result.table)


def _describe_curves(result: RankingCurves) -> Iterator[RenderableType]:
    """Yield the tables and sentences of curves."""
    from avss_dist.analysis.curves import curve_section, seed_section
    from avss_dist.reports.terminal.tables import rendered

    sections = [curve_section(curve, "curve") for curve in result.curves]
    sections += [seed_section(seeds, "seeds") for seeds in result.seeds]
    for section in sections:
        sentences = [spelled(sentence) for sentence in section.sentences]
        yield rendered(replace(section, sentences=sentences))
    yield from (spelled(note) for note in result.notes)


def _describe_picture(result: RankingComparison | RankingCurves, request: CompareRequest) -> Iterator[str]:
    """Yield what the picture of a comparison shows, and what it does not."""
    from avss_dist.analysis.comparison import RankingComparison
    from avss_dist.reports.chart import describe_mismatched

    if not isinstance(result, RankingComparison):
        yield f"Ranks along {request.along}: {request.output}"
        return
    assert result.similarity is not None
    yield f"Map of {count_of(result.similarity.scores, 'run')}: {request.output}"
    if result.similarity.mismatched:
        yield f"{describe_mismatched(result.similarity)} --allow-mismatch draws all."


def _describe_pairs(
    opened: Warehouse, comparison: RankingComparison, request: CompareRequest
) -> Iterator[RenderableType]:
    """Yield the agreement of pairs of runs, and the findings that speak against it."""
    from avss_dist.analysis.chosen import choose_runs, run_labels
    from avss_dist.analysis.findings import findings as find_all
    from avss_dist.analysis.findings import of_rankings
    from avss_dist.reports.terminal.scores import comparison_tables, findings_list, shown_pairs
    from avss_dist.stats.scores import Threshold

    threshold = Threshold(*parse_threshold(request.threshold))
    shown = shown_pairs(comparison)
    shown_ids = sorted({*shown["a_run_id"].to_pylist(), *shown["b_run_id"].to_pylist()})
    labels = dict(zip(shown_ids, run_labels(choose_runs(opened, shown_ids)), strict=True))
    title = f"by {request.by}  {_describe_ranking(request, threshold)}"
    yield comparison_tables(comparison, title, labels, console().width)

    compared_ids = {*read_commands.chosen_ids(opened, request.run)} - {*comparison.left_out}
    bearing = find_all(
        opened,
        sorted(compared_ids),
        threshold=threshold,
        site=None if request.by == "site" else request.site,
        recipe=None if request.by == "recipe" else request.recipe,
        rankings_alone=True,
    )
    score = "avss" if request.by == "score" else request.score
    yield findings_list(of_rankings(bearing, score))
    findings_command = command_line("findings", "-w", opened.root)
    say(f"{findings_command} lists what else speaks against each of these runs.")


def _describe_ranking(request: CompareRequest, threshold: Threshold) -> str:
    """Return the score that ranks layers, and its site, recipe and threshold, without what is compared."""
    from avss_dist.analysis.own_scores import own_labels

    if is_own(request.score) and request.by != "score":
        return own_labels([request.score])[request.score]
    fixed = {
        "score": request.score,
        "site": request.site,
        "recipe": request.recipe,
        "threshold": f"|x| < {describe_threshold(threshold.value, threshold.kind)}",
    }
    return " / ".join(text for name, text in fixed.items() if name != request.by)


def findings(request: FindingsRequest, format: str) -> None:
    """Print the findings, or the score cards."""
    from avss_dist.reports.output import print_result

    table = unwrap(read_commands.findings)(open_for(request), request).table()
    print_result(format, _describe_findings(request, table), lambda: table)


def _describe_findings(request: FindingsRequest, table: pa.Table) -> Iterator[RenderableType]:
    """Yield the score cards, or the findings."""
    from avss_dist.analysis.scorecard import scorecard_sections
    from avss_dist.reports.terminal.scores import findings_list
    from avss_dist.reports.terminal.tables import rendered

    if request.truth:
        yield rendered(*scorecard_sections(table))
        return
    yield findings_list(table)
    if not request.every:
        yield "--every also lists findings at other sites and recipes."


def contrast(request: ContrastCommandRequest, format: str) -> None:
    """Print the contrast and what it finds."""
    from avss_dist.analysis.contrast import contrast_section
    from avss_dist.reports.output import print_result
    from avss_dist.reports.terminal.tables import rendered

    result = unwrap(read_commands.contrast)(open_for(request), request)
    table = result.predictions if request.predictions else result.layers
    label = f"{result.reading['model']}  ({result.reading['run_id']})"
    print_result(format, [rendered(contrast_section(label, result))], lambda: table)
    if format != "table":
        for line in result.findings:
            say(line)


def report(request: ReportRequest) -> None:
    """Write the page, and print its path."""
    emit(unwrap(read_commands.report)(open_for(request, failed=True), request))


def publish(request: PublishRequest) -> None:
    """Write the published folder, and print the number of rows of each table."""
    rows = unwrap(read_commands.publish)(open_for(request), request).table().to_pylist()
    tables = ", ".join(f"{describe_count(row['rows'])} {row['table']}" for row in rows)
    emit(f"{request.folder}: {tables}.")


def compact(request: CompactRequest) -> None:
    """Compact the warehouse, and print the number of runs that were copied."""
    opened = open_for(request)
    rows = unwrap(read_commands.compact)(opened, request).table().to_pylist()
    copied = [f"{row['table']} of {count_of(row['runs'], 'run')}" for row in rows if row["runs"]]
    if copied:
        outcome = f"copied {', '.join(copied)}"
    elif opened.damaged:
        outcome = "every finished run that can be read was compacted before"
    else:
        outcome = "every finished run was compacted before"
    emit(f"{opened.root}: {outcome}.")


def rm(request: RemoveCommandRequest, format: str) -> None:
    """Print what would be removed, ask unless told not to, and remove it."""
    from avss_dist.reports.output import print_result
    from avss_dist.reports.terminal.removal import removal_table
    from avss_dist.warehouse.reader import Warehouse

    opened = Warehouse(str(request.warehouse))
    removal = read_commands.plan_removal(opened, request)
    if not (removal.is_empty or request.yes or request.dry_run or can_ask()):
        message = "Nobody can be asked: standard input is no terminal."
        raise ConfigError(message, "Look with `dry_run`; `yes` removes without a question.")
    if removal.is_empty:
        emit(f"{opened.root}: nothing is unused.")
    else:
        print_result(format, [removal_table(removal)], removal.table)
    for line in _about_evaluations(removal):
        say(line)
    if request.dry_run:
        say(f"Nothing is removed in a dry run. Without it: {removal.summary()}.")
    elif removal.is_empty or request.yes or ask(f"Remove {removal.summary()} from {opened.root}?"):
        _remove_runs(removal)
    else:
        say("Nothing was removed.")


def _about_evaluations(removal: Removal) -> Iterator[str]:
    """Yield the rules by which evaluations go with runs or stay, where there are any."""
    from avss_dist.warehouse.removal import EVALUATION, RUN

    kinds = set(removal.kinds.values())
    if {RUN, EVALUATION} <= kinds:
        yield "Evaluations go with the last finished run of their checkpoint; --keep-evaluations keeps them."
    if len(removal.shared) == 1:
        yield "1 evaluation stays, as other runs share it."
    elif removal.shared:
        yield f"{count_of(len(removal.shared), 'evaluation')} stay, as other runs share them."


def _remove_runs(removal: Removal) -> None:
    """Remove, and say so."""
    try:
        removal.apply()
    except KeyboardInterrupt as stop:
        stop.add_note("a part is removed")
        raise
    if not removal.is_empty:
        say(f"Removed {removal.summary()}.")
