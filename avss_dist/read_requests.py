"""Requests of commands that read a warehouse. Apart from others, because their commands end soon after they start.

The docstring of the request of a command is the start of its help, and the docstrings of the fields are those of its
options.
"""

from __future__ import annotations

from dataclasses import field
from pathlib import Path
from typing import Annotated

from pydantic import Field

from avss_dist.core.endings import PAGES, require_ending
from avss_dist.core.errors import ConfigError, first_names
from avss_dist.core.request import Request
from avss_dist.core.sites import EVERY_SITE, SITES
from avss_dist.core.text import RedactedURI
from avss_dist.core.thresholds import PUBLISHED_THRESHOLD, parse_threshold
from avss_dist.core.validation import Accepts, OneOf, Option, PathOrText, check, checked
from avss_dist.stats.catalog import FROM_ACTIVATIONS, LOWEST_SHARE, RECIPES, is_own, name_values, score_functions

LISTINGS = ("runs", "plans", "evaluations")
AXES = {
    "step": "training_step",
    "tokens": "training_tokens",
    "size": "num_parameters",
    "sequence_length": "sequence_length",
}
"""Axes along which layer scores are followed, each with the column of ``runs`` that has the place on it, a number."""
READINGS = ("recipe", "threshold", "site")
"""Properties of a reading of AVSS."""
BETWEEN_RUNS = ("run", "family", "size", "revision", "seed", "corpus", "dtype")
"""Properties in which two runs that are compared can differ."""
WITHIN_A_RUN = (*READINGS, "score")
"""Properties in which two profiles of one run that are compared can differ."""
COMPARED = (*BETWEEN_RUNS, *WITHIN_A_RUN)
COMPARED_OTHERWISE = {"model": "`by` run compares runs of any two models, and `by` revision those of one model."}
"""Hints by name, for properties by which nothing is compared."""


def require_warehouse(name: str | Path) -> str | Path:
    """Return the name of a warehouse.

    Raises:
        ConfigError: the name is empty, or not UTF-8 text.
    """
    if not str(name):
        raise ConfigError("the name is empty.", "Name a folder, or an s3://, gs://, hdfs:// URI.")
    try:
        str(name).encode()
    except UnicodeEncodeError:
        raise ConfigError("the name is not UTF-8 text.", "Rename the folder.") from None
    return name


def _own_score(name: str) -> RedactedURI:
    """Return the name of a score that people bring."""
    if not is_own(name):
        installed = first_names([*score_functions()]) or "none"
        raise ConfigError(
            f"'{name}' is not a score of your own.",
            f"Write FILE.csv:COLUMN or FILE.parquet:COLUMN, or the name of an installed score: {installed}.",
        )
    return RedactedURI(name)


def _require_threshold(value: str | float) -> str | float:
    parse_threshold(value)
    return value


def _run_name(run: object) -> str | None:
    """Return the id of a `runs.result.Run`, or the name as it is."""
    name = getattr(run, "run_id", run)
    if name is not None and not isinstance(name, str):
        raise ConfigError(f"expected the name of a run, or a run, not {run!r}.", "avss ls lists the runs.")
    return name


def _run_names(runs: object) -> tuple[str, ...]:
    return tuple(str(_run_name(run)) for run in _listed(runs))


def _listed(runs: object) -> list[object]:
    """Return runs or their names as a list, which may be given as one."""
    if runs is None:
        return []
    return [*runs] if isinstance(runs, list | tuple | set) else [runs]


def _with_warehouse_of_runs(values: dict[str, object]) -> dict[str, object]:
    """Return keywords with the warehouse of the `runs.result.Run` of ``run``, unless they name a warehouse.

    Raises:
        ConfigError: the runs are in several warehouses.
    """
    warehouses = {run.warehouse for run in _listed(values.get("run")) if hasattr(run, "warehouse")}
    if "warehouse" in values or not warehouses:
        return values
    if len(warehouses) > 1:
        raise ConfigError(
            f"The runs of `run` are in several warehouses: {', '.join(sorted(warehouses))}.",
            "Name runs of one warehouse, or the `warehouse` that has all of them.",
        )
    return values | {"warehouse": warehouses.pop()}


WAREHOUSE = Option(short="-w", environment="AVSS_WAREHOUSE")
OUTPUT = Option(short="-o")
RunName = Annotated[str | None, check(_run_name, before=True), Accepts("str | Run | None")]
RunNames = Annotated[tuple[str, ...], check(_run_names, before=True), Accepts("str | Run | Sequence[str | Run] | None")]
Output = Annotated[PathOrText, OUTPUT]
OptionalOutput = Annotated[PathOrText | None, OUTPUT]
Shares = Annotated[tuple[Annotated[float, Field(strict=False, ge=0, le=1)], ...], Field(strict=False)]
OwnScore = Annotated[str, check(_own_score), check(name_values, before=True), Accepts("str | Mapping[int, float]")]
OwnScores = Annotated[tuple[OwnScore, ...], Field(strict=False), Option(metavar="FILE:COLUMN")]
Threshold = Annotated[str | float, check(_require_threshold)]
RankingScore = Annotated[str, OneOf(FROM_ACTIVATIONS, accepts=is_own), check(RedactedURI)]
Site = Annotated[str, OneOf(EVERY_SITE)]
Recipe = Annotated[str, OneOf(RECIPES)]


@checked
class WarehouseRequest(Request):
    """A command that reads or writes a warehouse."""

    warehouse: Annotated[PathOrText, check(require_warehouse), WAREHOUSE] = "warehouse"
    """Folder of results, or s3://, gs://, hdfs:// URI."""

    complete = staticmethod(_with_warehouse_of_runs)


@checked
class RunRequest(WarehouseRequest):
    """A command about one run of a warehouse."""

    run: RunName = None
    """A run: id, part of it, model or glob; of several, the newest that will do."""


@checked
class RunsRequest(WarehouseRequest):
    """A command about several runs of a warehouse."""

    run: RunNames = ()
    """A run: its id, a unique part of it, its model, or a glob such as 'smollm2-*'. All by default."""


@checked
class PlaceRequest(Request):
    """A command about one reading of AVSS."""

    threshold: Threshold = PUBLISHED_THRESHOLD
    """Near zero means below this: 1e-5, or 0.1rms (relative)."""
    site: Site = SITES[0]
    """Site whose activations are read."""
    recipe: Recipe = RECIPES[0]
    """AVSS pooled (as released), by element or by unit."""


@checked
class CompareRequest(PlaceRequest, RunsRequest):
    """Compare layer rankings between runs: how far they agree, or how they move along training, size or row length."""

    by: Annotated[str, OneOf(COMPARED, COMPARED_OTHERWISE)] = "run"
    """Property in which the two runs or readings of each pair differ."""
    along: Annotated[str, OneOf(tuple(AXES))] | None = None
    """Follow each layer's rank along this property instead; step and tokens also tell which changes are real."""
    score: Annotated[RankingScore, check(name_values, before=True), Accepts("str | Mapping[int, float]")] = "avss"
    """Score that ranks the layers; FILE.csv:COLUMN is one of your own."""
    share: Annotated[float, Field(ge=0, le=1)] = LOWEST_SHARE
    """Number of lowest layers to compare, as a share of the layers."""
    allow_mismatch: bool = False
    """Also compare runs on different corpora, dtypes and so on."""
    output: OptionalOutput = None
    """Map of runs, ordered by similarity, or of ranks along a property: FILE.png, .svg or .html."""

    def __post_init__(self) -> None:
        if self.along and self.by != "run":
            raise ConfigError("`along` and `by` exclude each other.", "Give one of them.")
        if self.score not in FROM_ACTIVATIONS and self.by != "score":
            self._refuse_readings()

    def _refuse_readings(self) -> None:
        """Raise ConfigError if a reading of AVSS is chosen, of which a score of people's own has none."""
        if self.by in READINGS:
            raise ConfigError(f"`by` {self.by} compares readings of AVSS, and {self.score} has one value for a layer.")
        if parse_threshold(self.threshold) != (PUBLISHED_THRESHOLD, "absolute"):
            raise ConfigError(f"`threshold` has no effect on {self.score}.", "Leave it out.")
        if self.site != SITES[0]:
            raise ConfigError(f"`site` has no effect on {self.score}.", "Leave it out.")
        if self.recipe != RECIPES[0]:
            raise ConfigError(f"`recipe` has no effect on {self.score}.", "Leave it out.")


@checked
class FindingsRequest(PlaceRequest, RunsRequest):
    """List findings that speak against scores: they track depth, noise, rounding, single units, and so on."""

    every: bool = False
    """Show findings of every site and recipe."""
    truth: bool = False
    """Show how far each score agrees with the measured ground truth instead: which finds the layers that can go."""
    by: OwnScores = ()
    """A score of your own to compare with the truth as well, FILE.csv:COLUMN."""

    def __post_init__(self) -> None:
        if self.by and not self.truth:
            raise ConfigError("`by` has no effect without `truth`.", "Add `truth`.")


@checked
class ContrastRequest(PlaceRequest, RunRequest):
    """Contrast hallucinated with truthful answers, layer by layer."""

    threshold: Threshold = PUBLISHED_THRESHOLD
    """Near zero means below this: one that the run counted, or 0.1rms."""
    hallucinated: str | None = None
    """Label of hallucinated answers."""
    truthful: str | None = None
    """Label of truthful answers."""


@checked
class ContrastCommandRequest(ContrastRequest):
    """Contrast hallucinated with truthful answers, layer by layer, with controls; for a run on paired text."""

    predictions: bool = False
    """With csv or json: how well each layer predicts the label."""


@checked
class ListRequest(WarehouseRequest):
    """List runs (with stored shards of unfinished ones), evaluated sets of layers, or evaluations, newest first."""

    what: Annotated[str, OneOf(LISTINGS), Option(argument=True)] = field(default=LISTINGS[0], kw_only=False)
    """Table to list: runs, evaluated sets of removed layers, or evaluations."""


@checked
class ShowRequest(PlaceRequest, WarehouseRequest):
    """Show scores by layer, at any threshold, or draw them; the lowest 25% of layers are marked."""

    run: RunNames = ()
    """A run: its id, a unique part of it, its model, or a glob such as 'smollm2-*'. The newest by default."""
    output: OptionalOutput = None
    """File to write to instead of standard output. FILE.png, .svg or .html draws the scores by depth."""
    experts: bool = False
    """Show routed experts instead of layers."""
    quantiles: bool = False
    """Show the size of activations instead: the values that half, 90% and 99% of the elements do not exceed."""
    sparsity: Shares = ()
    """Show the threshold below which this share of the elements is, 0 to 1, instead."""
    by: OwnScores = ()
    """A score of your own to show beside AVSS, FILE.csv:COLUMN."""

    @property
    def shares(self) -> tuple[float, ...]:
        """Shares of the elements whose largest absolute value is shown instead of scores."""
        return self.sparsity or ((0.5, 0.9, 0.99) if self.quantiles else ())


@checked
class ReportRequest(RunsRequest):
    """Write a self-contained web page: findings, score card, charts across runs and by depth, tables."""

    output: Annotated[Output, check(require_ending(PAGES, "a page"))] = "report.html"
    """The page to write."""
    by: OwnScores = ()
    """A score of your own to compare with the measured truth as well, FILE.csv:COLUMN."""


@checked
class PublishRequest(WarehouseRequest):
    """Write the finished runs for others: the page, a Parquet file for each table, and a dataset card."""

    folder: Annotated[PathOrText, Option(argument=True, metavar="FOLDER")] = field(kw_only=False)
    """A new or empty folder."""

    def __post_init__(self) -> None:
        if "://" in str(self.folder):
            raise ConfigError("`folder` is a URI: expected a folder of this machine.", "Write one, and upload that.")


@checked
class CompactRequest(WarehouseRequest):
    """Copy many finished runs into few large files, so that every reader opens them in a moment."""


@checked
class RemoveRequest(WarehouseRequest):
    """Remove runs from a warehouse."""

    run: Annotated[RunNames, Option(argument=True, metavar="RUN")] = field(default=(), kw_only=False)
    """A run to remove: its id, a unique part of it, its model, or a glob such as 'smollm2-*'."""
    unused: bool = False
    """Remove what nobody reads, too: cells that no evaluation is made of, repairs that no cell names, leftovers."""
    keep_evaluations: bool = False
    """Keep evaluations, ablations included, which otherwise go with the last run of their checkpoint."""
    dry_run: bool = False
    """Show what would be removed, and remove nothing."""

    def __post_init__(self) -> None:
        if "" in self.run:
            raise ConfigError("`run` is empty.", "Name a run: avss ls lists them.")
        if not self.run and not self.unused:
            raise ConfigError("no `run` is named.", "Name one: avss ls lists them. Or add `unused`.")


@checked
class RemoveCommandRequest(RemoveRequest):
    """Remove runs, and evaluations of checkpoints that have no other run; it shows what goes, and asks."""

    yes: Annotated[bool, Option(short="-y")] = False
    """Do not ask before anything is removed."""


@checked
class QueryRequest(WarehouseRequest):
    """Query a warehouse with SQL."""

    sql: Annotated[str | None, Option(argument=True, metavar="SQL")] = field(default=None, kw_only=False)
    """One SELECT over the tables (--schema lists them), or @name, a ready-made query."""
    schema: bool = False
    """Describe every table, column and ready-made query."""


@checked
class QueryCommandRequest(QueryRequest):
    """Query a warehouse with SQL (DuckDB). It only reads, and only the warehouse."""

    output: OptionalOutput = None
    """File to write to instead of standard output."""
